"""Steps that are alike, compiled by the compiler of ``torch.compile`` and taken several at a time.

What a step calls fills tensors that stay where they are. It is written down once, as PyTorch dispatches it, and turned
into a graph of values, in which nothing is overwritten: a storage is cut where any operation begins or ends to read or
write it, and each piece has a value of its own from one writing to the next. At the end of the graph only what the next
step reads goes back to where it lies; all else is the compiler's to fuse, or to leave out. The last step is always
taken as it is, so that nothing in memory tells how those before it were taken.
"""

from __future__ import annotations

import threading
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pcsim.engine.batched.places import Arena, where
from pcsim.errors import PCWarning

aten = torch.ops.aten
FEWEST = 8
"""Steps that are alike, below which they are not compiled."""
STEPS, OPERATIONS = 16, 256
"""At most in one compiled call: entering one costs as much as ten compiled steps of a small network, and compiling
takes time in proportion to what is in it.
"""
PRODUCTS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.linear.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
"""Products of matrices, with the place of the first among their arguments."""
_COMPILING = threading.Lock()
"""The compiler's settings, and the filter of warnings, are those of all threads."""


class UncompilableError(Exception):
    """An operation that the graph has no place for."""


class _Called(NamedTuple):
    """An operation, with the tensors that it was called with, and what it has made."""

    operation: OpOverload
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    made: Any


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Called] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls.append(_Called(func, args, kwargs or {}, made))
        return made


def compile_graph(graph: fx.GraphModule, given: Sequence[Tensor]) -> Callable[..., object]:
    """The graph in C++ that calls no Python, by what ``torch.compile`` calls once it has a graph.

    Asked for directly, it takes the tensors as they are: to look at them once more would take half of the time.
    """
    from torch._dynamo import lookup_backend  # takes seconds, for which only who compiles should wait

    compile_by: Callable[..., Callable[..., object]] = lookup_backend("inductor")
    with _COMPILING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the compiler calls of PyTorch's own
        return compile_by(graph, [*given], config_patches={"cpp_wrapper": True})


class CompiledSteps:
    """Steps of one kind; compiled at the first call that takes enough of them.

    Args:
        step: what one consists of, each of which leaves all that it makes in tensors that are there.
        arena: where what is compiled is kept, for another program whose steps do the same with tensors of its own.
    """

    def __init__(self, step: Sequence[Callable[[], object]], arena: Arena) -> None:
        self._step, self._arena = step, arena
        self._compiled: Callable[..., object] | None = None
        self._at_a_time = 0
        self._given: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._places: list[object] = []
        self._seconds = 0.0
        self._refused = ""

    def __str__(self) -> str:
        if self._refused:
            return f"no steps, since {self._refused}"
        return f"{self._at_a_time} steps at a time, in {self._seconds:.0f} s" if self._compiled else "not yet"

    def take(self, count: int) -> None:
        """Take so many steps."""
        if self._places != [*map(where, self._weights)]:
            self._compiled = None
        if self._compiled is None and not self._refused and count > FEWEST:
            count -= self._compile(count)
        if self._compiled is not None:
            calls = (count - 1) // self._at_a_time
            for _ in range(calls):
                self._compiled(*self._given)
            count -= calls * self._at_a_time
        for _ in range(count):
            for call in self._step:
                call()

    def _compile(self, count: int) -> int:
        """How many steps were taken on the way."""
        start = time.perf_counter()
        with _Record() as record:
            for call in self._step:
                call()
        most = max(1, min(STEPS, OPERATIONS // len(record.calls)))
        self._at_a_time = (count - 2) // -(-(count - 2) // most)
        try:
            graph = _Graph(record.calls)
            steps = graph.of_steps(self._at_a_time)
            self._given, self._weights = graph.given(), graph.weights
            make = partial(compile_graph, steps, self._given)
            compiled: Callable[..., object] = self._arena.kept(("compiled", steps.code, *map(len, self._given)), make)
            self._places = [*map(where, self._weights)]
            compiled(*self._given)
        except Exception as error:  # whatever a compiler may fail by: the calls are there as ever
            self._weights, self._places = [], []
            self._refused = refuse(" ".join(str(error).split("\n\n")[0].split()) or type(error).__name__)
            return 1
        self._compiled, self._seconds = compiled, time.perf_counter() - start
        return 1 + self._at_a_time


def refuse(why: str) -> str:
    """Warn that steps are called one by one, and why; the reason again."""
    warnings.warn(f"compiled: steps are called one by one, since {why}", PCWarning, stacklevel=3)
    return why


@attrs.define(eq=False)
class _Storage:
    """A piece of memory, and the graph's values for what lies in it.

    Args:
        tensor: the first that was seen in it.
        known: whether it was there before.
        bounds: where operations begin and end to read or write it, in numbers from its beginning.
    """

    tensor: Tensor
    known: bool
    bounds: set[int] = attrs.field(factory=set)
    cuts: list[int] = attrs.field(factory=list)
    values: list[fx.Node | None] = attrs.field(factory=list)
    """Of each piece; None before it is first read or written."""
    given: fx.Node | None = None
    carried: set[int] = attrs.field(factory=set)
    """Pieces that are read before they are written."""
    written: set[int] = attrs.field(factory=set)

    @property
    def size(self) -> int:
        return self.tensor.untyped_storage().nbytes() // self.tensor.element_size()

    def whole(self) -> Tensor:
        """All of it, as a vector."""
        return self.tensor.detach().as_strided((self.size,), (1,), 0)


class _Graph:
    """The values of a step's operations.

    Args:
        calls: the operations.

    Raises:
        UncompilableError: one of them has no place in such a graph.
    """

    def __init__(self, calls: Sequence[_Called]) -> None:
        self._calls, self._graph = calls, fx.Graph()
        self._storages: dict[int, _Storage] = {}
        self.weights: list[Tensor] = []
        """Parameters among what is read, whose data may be put elsewhere."""
        for call in calls:
            for tensor in _tensors((call.arguments, call.options)):
                self._see(tensor, known=True)
            for tensor in _tensors(call.made):
                self._see(tensor, known=False)
        for storage in self._storages.values():
            storage.cuts = sorted(storage.bounds | ({0, storage.size} if storage.known else set()))
            storage.values = [None] * (len(storage.cuts) - 1)

    def _see(self, tensor: Tensor, *, known: bool) -> None:
        if tensor.layout is not torch.strided:
            raise UncompilableError(f"a tensor has the layout {tensor.layout}")
        storage = self._storages.setdefault(tensor.untyped_storage().data_ptr(), _Storage(tensor, known))
        if storage.tensor.dtype != tensor.dtype:
            raise UncompilableError("a tensor is read in another dtype than it was written in")
        storage.bounds.update(_span(tensor))
        if isinstance(tensor, nn.Parameter):
            self.weights.append(tensor)

    def of_steps(self, count: int) -> fx.GraphModule:
        """The graph of so many steps."""
        for storage in self._storages.values():
            if storage.known:
                storage.given = self._graph.placeholder(f"given_{len(self._graph.nodes)}")
        for _ in range(count):
            for call in self._calls:
                self._add(call)
        for storage in self._storages.values():
            if storage.carried & storage.written:
                self._call(aten.copy_.default, storage.given, self._joined(storage, range(len(storage.values))))
        self._graph.output(())
        for storage in self._storages.values():
            if storage.given is not None and not storage.given.users:
                self._graph.erase_node(storage.given)
                storage.given = None
        return fx.GraphModule(nn.Module(), self._graph)

    def given(self) -> list[Tensor]:
        """What the graph is given, as vectors."""
        return [each.whole() for each in self._storages.values() if each.given is not None]

    def _add(self, call: _Called) -> None:
        arguments = call.operation._schema.arguments
        written = [each for each in arguments if each.alias_info is not None and each.alias_info.is_write]
        if not written and call.operation.is_view:
            return
        operation, options = call.operation, dict(call.options)
        goal = call.made
        if written:
            [name] = [each.name for each in written]
            operation, goal = _functional(call.operation), options.pop(name, call.arguments[0])
        if not isinstance(goal, Tensor):
            raise UncompilableError(f"{call.operation} makes more than one tensor, or none")
        given, named = tree_map_only(Tensor, self._read, (call.arguments, options))
        if operation in PRODUCTS and call.arguments[PRODUCTS[operation]].shape[-2:-1] == (1,):
            made = self._product(operation, given, named)
        else:
            made = self._call(operation, *given, **named)
        self._write(goal, made)

    def _call(self, operation: OpOverload, *arguments: Any, **options: Any) -> fx.Node:
        return self._graph.call_function(operation, arguments, options)

    def _product(self, operation: OpOverload, given: Sequence[Any], options: dict[str, Any]) -> fx.Node:
        """A row times a matrix, as a sum of products, which can be fused with what is before and after."""
        first = PRODUCTS[operation]
        row, matrix = given[first : first + 2]
        if operation is aten.linear.default:
            added = given[2:]
            product = self._call(aten.mul.Tensor, row, matrix)
            made = self._call(aten.unsqueeze.default, self._call(aten.sum.dim_IntList, product, [-1]), 0)
        else:
            added = given[:first]
            product = self._call(aten.mul.Tensor, self._call(aten.transpose.int, row, -1, -2), matrix)
            made = self._call(aten.sum.dim_IntList, product, [-2], True)
        if (alpha := options.get("alpha", 1)) != 1:
            made = self._call(aten.mul.Tensor, made, alpha)
        added = [term for term in added if term is not None and options.get("beta", 1) != 0]
        return self._call(aten.add.Tensor, made, added[0], alpha=options.get("beta", 1)) if added else made

    def _cut(self, vector: fx.Node, cuts: Sequence[int]) -> list[fx.Node]:
        """Pieces of a vector that begins at the first of the cuts."""
        if len(cuts) == 2:
            return [vector]
        first = cuts[0]
        return [self._call(aten.slice.Tensor, vector, 0, a - first, b - first) for a, b in pairwise(cuts)]

    def _joined(self, storage: _Storage, pieces: range) -> fx.Node:
        """What lies in pieces that follow each other, as a vector."""
        for piece in pieces:
            if storage.values[piece] is None:
                assert storage.given is not None
                bounds = storage.cuts[piece : piece + 2]
                whole = len(storage.values) == 1
                storage.values[piece] = (
                    storage.given if whole else self._call(aten.slice.Tensor, storage.given, 0, *bounds)
                )
        values = [storage.values[piece] for piece in pieces]
        first = values[0]
        assert first is not None
        return first if len(values) == 1 else self._call(aten.cat.default, values)

    def _place(self, tensor: Tensor) -> tuple[_Storage, range]:
        storage = self._storages[tensor.untyped_storage().data_ptr()]
        first, last = (bisect_left(storage.cuts, bound) for bound in _span(tensor))
        return storage, range(first, last)

    def _read(self, tensor: Tensor) -> fx.Node:
        sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        once = tensor.as_strided(sizes, tensor.stride())
        if not _dense(once):
            raise UncompilableError("an operation reads a tensor with gaps")
        storage, pieces = self._place(once)
        storage.carried.update({*pieces} - storage.written)
        order, inverse = _orders(once)
        found = self._call(aten.view.default, self._joined(storage, pieces), [sizes[axis] for axis in order])
        if order != sorted(order):
            found = self._call(aten.permute.default, found, inverse)
        return found if once.shape == tensor.shape else self._call(aten.expand.default, found, tensor.shape)

    def _write(self, tensor: Tensor, made: fx.Node) -> None:
        if not _dense(tensor):
            raise UncompilableError("an operation writes a tensor with gaps")
        storage, pieces = self._place(tensor)
        order, _ = _orders(tensor)
        if order != sorted(order):
            made = self._call(aten.permute.default, made, order)
        vector = self._call(aten.reshape.default, made, [-1])
        storage.values[pieces.start : pieces.stop] = self._cut(vector, storage.cuts[pieces.start : pieces.stop + 1])
        storage.written.update(pieces)


def _tensors(of: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, Tensor)]


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last number of a storage, plus one, among which those of a tensor lie."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first, first + reach + 1


def _dense(tensor: Tensor) -> bool:
    """Whether no number lies between those of a tensor, and none counts twice."""
    first, last = _span(tensor)
    return last - first == tensor.numel()


def _orders(tensor: Tensor) -> tuple[list[int], list[int]]:
    """A tensor's axes as they lie in memory, the outermost first; and where each of them then is."""
    if tensor.is_contiguous():
        return [*range(tensor.dim())], [*range(tensor.dim())]
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    return order, [order.index(axis) for axis in range(tensor.dim())]


def _functional(operation: OpOverload) -> OpOverload:
    """What makes the same in a tensor of its own."""
    schema = operation._schema
    name = schema.name.removeprefix("aten::")
    inputs = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
    packet = getattr(aten, name.removesuffix("_"), None)
    for overload in () if packet is None else packet.overloads():
        found: OpOverload = getattr(packet, overload)
        if [(a.name, str(a.type)) for a in found._schema.arguments] == inputs and not found._schema.is_mutable:
            return found
    raise UncompilableError(f"{operation} is not known to make the same elsewhere")

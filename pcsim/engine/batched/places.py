"""Where the tensors of a program lie, and the operations that bring them where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import BuiltinFunctionType
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from pcsim.engine.kernels.products import FILLING, Products
from pcsim.engine.planning.wiring import Positions

Kept = TypeVar("Kept")
_OUTPUTS = {"out", "grad_input"}
"""By which torch's functions call what they fill."""


class Operation(NamedTuple):
    """What a run calls, and how it is printed."""

    name: str
    call: Callable[[], object]
    members: Sequence[str] = ()
    """Names of the nodes or edges concerned."""

    @property
    def native(self) -> bool:
        """Whether it is a call of torch's own, or like one, that leaves all that it makes in tensors that are there."""
        function = self.call.func if isinstance(self.call, partial) else self.call
        if not isinstance(function, BuiltinFunctionType | OpOverload) and function not in FILLING:
            return False
        fills = isinstance(self.call, partial) and not _OUTPUTS.isdisjoint(self.call.keywords)
        return fills or function.__name__.endswith("_")

    def __str__(self) -> str:
        more = f" and {len(self.members) - 3} more" if len(self.members) > 3 else ""
        return f"{self.name} {', '.join(self.members[:3])}{more}".rstrip()


class Arena:
    """Scratch by key; programs that never hold a state at the same time share one.

    Args:
        batch: number of samples.
        dtype: of all tensors but those of integers.
        device: of all tensors made here; :meth:`on` makes those of another.
        products: by which library matrices are multiplied, and hyperbolic tangents taken.
    """

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device, products: Products = "auto") -> None:
        self.batch, self.dtype, self.device, self.products = batch, dtype, device, products
        self._kept: dict[Hashable, Any] = {}

    def on(self, device: torch.device | None) -> Arena:
        """The arena beside this one whose tensors lie on another device; itself where that is its own, or none."""
        if device in (None, self.device):
            return self
        assert device is not None
        beside: Arena = self.kept(("on", device), partial(Arena, self.batch, self.dtype, device, self.products))
        return beside

    def new(
        self, count: int, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor (count, batch, *shape), of the arena's dtype by default, a single image laid out as asked for."""
        tensor = torch.zeros(count, self.batch, *shape, dtype=dtype or self.dtype, device=self.device)
        if layout is torch.channels_last and count == 1 and len(shape) == 3:
            return tensor[0].contiguous(memory_format=layout).unsqueeze(0)
        return tensor

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is under a key, made when it is first asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def all_of(self, kind: type[Kept]) -> list[Kept]:
        """All of a kind that is kept here."""
        return [kept for kept in self._kept.values() if isinstance(kept, kind)]

    def cell(self, key: Hashable, shape: Callable[[], tuple[int, ...]], *, filled: bool) -> Cell:
        """The cell under a key: of a fixed tensor (batch, *shape) where all that is left there is written into one.

        Images are taken as they come, since every kernel lays them out as it likes.
        """

        def make() -> Cell:
            if filled and len(shape()) != 3:
                return Cell(self.new(1, shape(), torch.contiguous_format)[0])
            return Cell()

        made: Cell = self.kept(key, make)
        return made

    def part(self, key: Hashable, stack: Tensor, rows: Positions) -> Part:
        """Rows of a stack; if they have to be gathered, in scratch under this key."""
        return Part(stack, rows, partial(self.scratch, ("gathered", key), stack))

    def scratch(self, key: Hashable, stack: Tensor, count: int) -> Tensor:
        """Room for so many rows of a stack, for use at once: what asks under the same key next may be given the same.

        Of a power of two, so that parts of many sizes do not each keep their own.
        """
        room = 1 << (count - 1).bit_length()
        made: Tensor = self.kept((key, room), partial(stack.new_empty, (room, *stack.shape[1:])))
        return made[:count]


class Cell:
    """Where operations find and leave a tensor: a fixed one, or whatever was left there last."""

    __slots__ = ("fixed", "tensor")

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.tensor: Tensor | None = tensor
        self.fixed = tensor is not None
        """Whether it is the same tensor at every run, to be written into."""

    def read(self) -> Tensor:
        """What was left here last."""
        assert self.tensor is not None
        return self.tensor

    def write(self, tensor: Tensor) -> None:
        """Leave a tensor here."""
        if not self.fixed:
            self.tensor = tensor
        elif tensor is not self.tensor:
            self.read().copy_(tensor)

    def let_go(self) -> None:
        """Keep no longer what was left here; a fixed tensor stays."""
        if not self.fixed:
            self.tensor = None


def where(tensor: Tensor) -> object:
    """Where a tensor's content lies, and how; another once its data has been put elsewhere."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class Part:
    """Rows of a stacked tensor (k, ...), a single one without the stack axis: a view where they follow each other.

    Others are gathered into scratch before an operation that reads them, and scattered from scratch after one that
    writes them, by operations of their own.
    """

    __slots__ = ("cell", "index", "scratch", "stack")

    def __init__(self, stack: Tensor, rows: Positions, scratch: Callable[[int], Tensor]) -> None:
        self.stack, self.scratch = stack, scratch
        self.index: Tensor | None = None
        run = run_of(rows)
        if run is None:
            self.index = torch.as_tensor(rows, device=stack.device)
            self.cell = Cell(scratch(len(rows)))
        else:
            first, after = run
            self.cell = Cell(stack[first] if after - first == 1 else stack[first:after])

    def gathered(self, operations: list[Operation], members: Sequence[str]) -> Cell:
        """The part's content as a cell, with the operation that brings it there."""
        if self.index is not None:
            call = partial(torch.index_select, self.stack, 0, self.index, out=self.cell.read())
            operations.append(Operation("gather", call, members))
        return self.cell

    def scatter(self, operations: list[Operation], members: Sequence[str]) -> None:
        """Bring what has been left in the part's cell to where it belongs."""
        if self.index is not None:
            call = partial(self.stack.index_copy_, 0, self.index, self.cell.read())
            operations.append(Operation("scatter", call, members))

    def add(
        self,
        operations: list[Operation],
        name: str,
        addend: Cell,
        factor: float,
        members: Sequence[str],
        *,
        over: bool = False,
    ) -> None:
        """Add factor · addend, or write it over what is there; rows that occur twice are added to twice."""
        if over:
            goal = self.cell.read()
            write = (
                partial(torch.mul, addend.read(), factor, out=goal)
                if addend.fixed
                else partial(_write, goal, addend, factor)
            )
            operations.append(Operation(name, write, members))
            self.scatter(operations, members)
            return
        if self.index is not None and addend.fixed and not _overlap(addend.read(), self.stack):
            call: Callable[[], object] = partial(self.stack.index_add_, 0, self.index, addend.read(), alpha=factor)
        elif self.index is not None:
            call = partial(_scatter_add, self.stack, self.index, addend, factor)
        elif addend.fixed:
            call = partial(self.cell.read().add_, addend.read(), alpha=factor)
        else:
            call = partial(_add, self.cell.read(), addend, factor)
        operations.append(Operation(name, call, members))


def cross(cell: Cell, arena: Arena, key: Hashable, operations: list[Operation], members: Sequence[str]) -> Cell:
    """What lies in a cell, where an arena's tensors do, with the operation that brings it there."""
    if cell.fixed:
        there = cell.read()
        made = arena.kept(("crossed", key, *there.shape), partial(torch.empty_like, there, device=arena.device))
        operations.append(Operation("cross", partial(made.copy_, there), members))
        return Cell(made)
    brought = Cell()
    operations.append(Operation("cross", partial(_bring, cell, brought, arena.device), members))
    return brought


def _bring(there: Cell, here: Cell, device: torch.device) -> None:
    here.write(there.read().to(device))


def read(place: Part | Cell, operations: list[Operation], members: Sequence[str]) -> Cell:
    """What lies at a place, as a cell; with the operation that gathers it where it is scattered."""
    return place.gathered(operations, members) if isinstance(place, Part) else place


def written(place: Part | Cell) -> Cell:
    """Where to leave what belongs at a place; :func:`finish` then brings it there."""
    return place.cell if isinstance(place, Part) else place


def finish(place: Part | Cell, operations: list[Operation], members: Sequence[str]) -> None:
    """The operation that scatters what was left, where that is needed."""
    if isinstance(place, Part):
        place.scatter(operations, members)


def run_of(positions: Positions) -> tuple[int, int] | None:
    """First row and the one after the last, if the rows follow each other; else None."""
    first, count = int(positions[0]), len(positions)
    if count == 1 or (int(positions[-1]) - first == count - 1 and bool((np.diff(positions) > 0).all())):
        return first, first + count
    return None


def runs_of(positions: Positions) -> list[tuple[int, int]]:
    """First row and the one after the last of each run of rows that follow each other."""
    ordered = np.sort(positions)
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def _scatter_add(goal: Tensor, index: Tensor, addend: Cell, factor: float) -> None:
    tensor = addend.read()
    if _overlap(tensor, goal):
        tensor = tensor.clone()  # what an identity contributes may be other rows of this very stack
    goal.index_add_(0, index, tensor, alpha=factor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _write(goal: Tensor, addend: Cell, factor: float) -> None:
    torch.mul(addend.read(), factor, out=goal)


def _add(goal: Tensor, addend: Cell, factor: float) -> None:
    goal.add_(addend.read(), alpha=factor)


class Named(Sequence[str]):
    """The names of some rows, looked up when they are asked for: to be printed, of a few of thousands of operations.

    Args:
        names: of all rows.
        rows: places in them.
    """

    __slots__ = ("_names", "_rows")

    def __init__(self, names: Sequence[str], rows: Positions) -> None:
        self._names, self._rows = names, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self._names[row] for row in self._rows[place].tolist()]
        return self._names[int(self._rows[place])]

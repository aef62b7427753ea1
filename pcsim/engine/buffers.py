"""Preallocated tensors of a program: what each stack of nodes and of edges holds, and where its parts lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pcsim.engine.engine import Problem, State
from pcsim.engine.kernel import Autograd, Gain, Kernel, Saved, Weights
from pcsim.engine.plan import Positions
from pcsim.engine.stacks import EdgeStack, Link, NodeStack, Part, Place, Slot, pulls_in_place, rows_of, run_of
from pcsim.graph.evaluation import probe

FIRST = np.zeros(1, np.intp)
"""Position of a single row."""
GATHERED_BYTES = 2**21
"""Rows that have to be gathered are computed in parts of about this size, which stay in a core's cache."""


class Arena:
    """Scratch by key; programs that never hold a state at the same time share one."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._tensors: dict[Hashable, Tensor] = {}
        self._slots: dict[Hashable, Slot] = {}
        self._saved: dict[Hashable, Saved] = {}

    def new(self, count: int, batch: int, shape: tuple[int, ...], images: bool = False) -> Tensor:
        """A tensor (count, batch, *shape), its images channels last if asked for."""
        if images and count == 1 and len(shape) == 3:
            channels, height, width = shape
            empty = torch.zeros(count, batch, height, width, channels, dtype=self.dtype, device=self.device)
            return empty.permute(0, 1, 4, 2, 3)
        return torch.zeros(count, batch, *shape, dtype=self.dtype, device=self.device)

    def shared(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key, made when it is first asked for."""
        if key not in self._tensors:
            self._tensors[key] = make()
        return self._tensors[key]

    def like(self, key: Hashable, tensor: Tensor) -> Tensor:
        """The tensor of a key, of the shape of this one."""
        return self.shared(key, lambda: torch.zeros_like(tensor, requires_grad=False))

    def slot(self, key: Hashable) -> Slot:
        """The slot of a key."""
        return self._slots.setdefault(key, Slot())

    def saved(self, key: Hashable) -> Saved:
        """The place of a key for what a kernel keeps between its calls."""
        return self._saved.setdefault(key, {})


class Bound(NamedTuple):
    """A kernel with all that it is given besides places: its module, weights, and what it keeps between calls."""

    kernel: Kernel[Any]
    module: nn.Module
    weights: Callable[[], Weights]
    saved: Saved
    complete: bool
    """Whether the weights are the same tensors at every call."""


class Stage:
    """One link of a chain with its weights: a module's own parameters, or rows of stacked ones."""

    def __init__(
        self, link: Link, weights: Sequence[Tensor], gradients: Sequence[Tensor], saved: Saved, *, stacked: bool
    ) -> None:
        self.kernel, self.module = link
        self.saved = saved
        self._weights, self._gradients, self._stacked = weights, gradients, stacked
        self._bound: dict[tuple[int, int], Bound] = {}

    def bound(self, rows: Positions) -> Bound:
        """The stage with the weights of these rows of the stacked weights."""
        if not self._stacked:
            rows = FIRST
        key = run_of(rows)
        if key is None:
            return self._make_bound(rows)
        if key not in self._bound:
            self._bound[key] = self._make_bound(rows)
        return self._bound[key]

    def _make_bound(self, rows: Positions) -> Bound:
        parts = self._parts(self._weights, rows)
        tensors = [part.out for part in parts]
        given = tuple(tensor for tensor in tensors if tensor is not None)
        complete = len(given) == len(tensors)
        weights = (lambda: given) if complete else (lambda: tuple(part.read() for part in parts))
        return Bound(self.kernel, self.module, weights, self.saved, complete)

    def gradients(self, rows: Positions) -> list[Part]:
        """Where the gradients of these rows go."""
        return self._parts(self._gradients, rows)

    def _parts(self, tensors: Sequence[Tensor], rows: Positions) -> list[Part]:
        if not self._stacked:
            return [Part(tensor.unsqueeze(0), slice(0, 1)) for tensor in tensors]
        return [Part(tensor, rows_of(rows, tensor.device)) for tensor in tensors]


def merged(kernels: Sequence[Kernel[Any]], first: int) -> list[int]:
    """For each of a chain's places, the later place whose tensor it shares because a kernel works in place.

    Args:
        kernels: the chain; place i is the input of kernel i, the last place the output.
        first: the first place that may be overwritten.
    """
    shares = list(range(len(kernels) + 1))
    for place in reversed(range(first, len(kernels))):
        kernel = kernels[place]
        needed_before = place > 0 and kernels[place - 1].reads == "output"
        if kernel.elementwise and kernel.reads != "input" and not needed_before:
            shares[place] = shares[place + 1]
    return shares


class NodeBuffers:
    """The tensors of one stack of nodes, each (k, batch, *shape).

    Args:
        stack: the nodes.
        problem: sizes, dtype and device.
        arena: where scratch tensors come from.
        key: names the stack in the arena.
        rewritten: whether predictions are evaluated again after the start.
        images: whether to lay images out channels last.
        slotted: whether what arrives before the transfer may be any tensor (a stack of one with one incoming edge).
    """

    def __init__(
        self,
        stack: NodeStack,
        problem: Problem,
        arena: Arena,
        key: Hashable,
        *,
        rewritten: bool,
        images: bool,
        slotted: bool,
    ) -> None:
        self.stack, self._arena, self._key, self._images = stack, arena, key, images
        self._batch, node = problem.batch, stack.nodes[0]
        self.node = node
        clamping = problem.clamping
        self.partial = node.name in clamping.partial
        self.starts_forward = node.predicted and not stack.given and node.name not in clamping.cyclic
        if stack.deterministic:
            self.starts_forward = node.name not in clamping.cyclic
        self.autograd = node.predicted and stack.chain is None
        self.weights = np.array([member.weight for member in stack.nodes])
        own = [member.given_precision if member.log_precision is None else None for member in stack.nodes]
        given = [precision for precision in own if isinstance(precision, float)]
        self.given_precisions = np.array(given) if len(given) == len(own) else None
        """The nodes' own precisions; None where one is a tensor."""
        self.tensors: dict[str, Tensor] = {}
        if node.predicted:
            separate = rewritten or stack.deterministic
            self.tensors["prediction"] = self._scratch("prediction") if separate else self._new()
            self.tensors["forward_prediction"] = self._new() if separate else self.tensors["prediction"]
        self.tensors["value"] = self.tensors["prediction"] if stack.deterministic else self._new()
        self.copies: list[tuple[Tensor, Tensor]] = []
        if node.predicted and self.tensors["forward_prediction"] is not self.tensors["prediction"]:
            self.copies.append((self.tensors["forward_prediction"], self.tensors["prediction"]))
        if stack.given:
            self.tensors["forward_value"] = self.tensors["value"]
        elif self.starts_forward and not self.partial:
            self.tensors["forward_value"] = self.tensors["forward_prediction"]
        else:
            self.tensors["forward_value"] = self._new()
            self.copies.append((self.tensors["forward_value"], self.tensors["value"]))
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.stages = [self._stage(link, arena.saved((key, place))) for place, link in enumerate(stack.chain or ())]
        self._shares = merged([stage.kernel for stage in self.stages], 0)
        if len(stack.nodes) == 1 and self._shares[0] != len(self.stages):
            self._shares[0] = 0  # the inlet of a single node has a place of its own, to which edges may add
        self._slot = arena.slot((key, "inlet")) if slotted else None
        self._inner = [arena.slot((key, "inner", place)) for place in range(len(self.stages))]
        self._pulled = [arena.slot((key, "pulled", place)) for place in range(len(self.stages))]
        self._parts: dict[tuple[str, int, int], Part] = {}
        self.outputs: dict[int, Place] = {}
        """Pulled-back errors by edge position, where the node goes through autograd."""
        self.graph: tuple[dict[int, Tensor], Tensor] | None = None
        self._clamps = problem.clamps

    def _stage(self, link: Link, saved: Saved) -> Stage:
        own = list(link[1].parameters())
        made = [self._arena.like((self._key, "gradient", id(p)), p) for p in own]
        self.gradients.update(zip(own, made, strict=True))
        return Stage(link, own, made, saved, stacked=False)

    def _new(self) -> Tensor:
        return self._arena.new(len(self.stack.nodes), self._batch, self.node.shape, self._images)

    def _scratch(self, name: str) -> Tensor:
        return self._arena.shared((self._key, name), self._new)

    def tensor(self, name: str) -> Tensor:
        """One of the stack's tensors; "delta", "descent" and "velocity" are made when first asked for."""
        if name not in self.tensors:
            self.tensors[name] = self._scratch(name)
        return self.tensors[name]

    def at(self, name: str, rows: Positions) -> Part:
        """Rows of one of the stack's tensors."""
        run = run_of(rows)
        if run is None:
            return Part(self.tensor(name), rows_of(rows, self._arena.device))
        key = (name, *run)
        if key not in self._parts:
            self._parts[key] = Part(self.tensor(name), slice(*run))
        return self._parts[key]

    def load(self, problem: Problem, previous: State | None) -> None:
        """Take over a batch: clamped values, and the start of what no forward pass reaches."""
        self._clamps = problem.clamps
        value = self.tensors["value"]
        if self.stack.given:
            for row, node in enumerate(self.stack.nodes):
                value[row].copy_(problem.clamps[node.name].value)
        elif not self.starts_forward and not self.stack.deterministic:
            for row, node in enumerate(self.stack.nodes):
                value[row].copy_(problem.origin(node.name, previous))
            if self.partial:
                self.clamp()
        if not problem.relaxation.plain and not (self.stack.given or self.stack.deterministic):
            self.tensor("velocity").zero_()  # another program of the same arena may have left its own in it

    def clamp(self) -> None:
        """Put the given units of partially clamped nodes back."""
        for row, node in enumerate(self.stack.nodes):
            value = self.tensors["value"][row]
            value.copy_(self._clamps[node.name].onto(value))

    def place(self, link: int, rows: Positions) -> Place:
        """Place ``link`` of the transfer's chain: 0 what the edges contribute, the last one the prediction."""
        share = self._shares[link]
        if share == len(self.stages):
            return self.at("prediction", rows)
        if len(self.stack.nodes) > 1:
            name = f"inlet {share}"
            if name not in self.tensors:
                self.tensors[name] = self._scratch(name)
            return self.at(name, rows)
        if share > 0:
            return self._inner[share]
        return Part(self._combined, slice(0, 1)) if self._slot is None else self._slot

    @cached_property
    def _combined(self) -> Tensor:
        """The sum of what the edges contribute to a single node, (1, batch, ...)."""
        shape = self.node.incoming[0].contribution_shape
        return self._arena.shared((self._key, "inlet"), lambda: self._arena.new(1, self._batch, shape, self._images))

    @property
    def overwrites_inlet(self) -> bool:
        """Whether what the edges contribute is lost once the transfer has run."""
        return bool(self.stages) and self._shares[0] != 0

    def pulled(self, rows: Positions, edge: int) -> Place:
        """Where the error, pulled back to what the edges contribute, is found."""
        if self.autograd:
            return self.outputs.setdefault(edge, self._arena.slot((self._key, "output", edge)))
        return self.delta_at(rows, 0)

    def delta_at(self, rows: Positions, link: int) -> Place:
        """Where the error, pulled back to place ``link`` of the transfer's chain, is found."""
        for later, stage in enumerate(self.stages[link:], start=link):
            if not pulls_in_place((stage.kernel, stage.module)):
                return self._pulled[later]
        return self.at("delta", rows)

    def inlet_at(self, rows: Positions) -> Part:
        """What several edges contribute to, as a part that can be added to; a row may occur twice."""
        if len(self.stack.nodes) == 1 and self._shares[0] != len(self.stages):
            return Part(self._combined, rows_of(rows, self._arena.device))
        place = self.place(0, rows)
        assert isinstance(place, Part)
        return place


class EdgeBuffers:
    """The tensors of one stack of edges.

    Args:
        stack: the edges.
        source: tensors of the nodes that they read.
        target: tensors of the nodes that they predict.
        problem: sizes, and the seed of random draws.
        arena: where scratch tensors come from.
        key: names the stack in the arena.
        images: whether to lay images out channels last.
        seed: gives the seed of random draws.
    """

    def __init__(
        self,
        stack: EdgeStack,
        source: NodeBuffers,
        target: NodeBuffers,
        problem: Problem,
        arena: Arena,
        key: Hashable,
        *,
        images: bool,
        seed: Callable[[], int],
    ) -> None:
        self.stack, self.source, self.target = stack, source, target
        self._arena, self._key, self._batch, self._images = arena, key, problem.batch, images
        edge = stack.edges[0]
        chain = stack.chain
        if chain is None:
            chain = [(Autograd(lambda value: edge.contribute(value, seed())), edge.module)]
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.stages = [self._stage(link, arena.saved((key, place))) for place, link in enumerate(chain)]
        kernels = [stage.kernel for stage in self.stages]
        self._shares = merged(kernels, 1) if kernels else [0]
        needs_output = bool(kernels) and kernels[-1].reads == "output" and target.overwrites_inlet
        self.direct = len(edge.target.incoming) == 1 and not target.autograd and not needs_output
        """Whether contributions go straight to the target's inlet; otherwise they are kept here, to be combined."""
        units = max(math.prod(source.node.shape), math.prod(target.node.shape))
        self._most_gathered = max(1, GATHERED_BYTES // (problem.batch * units * arena.dtype.itemsize))
        self._inner = [arena.slot((key, "inner", place)) for place in range(len(self.stages))]
        self._shapes = self._inner_shapes(chain) if len(stack.edges) > 1 and len(chain) > 1 else []
        self._messages = [arena.slot((key, "message", place)) for place in range(len(self.stages))]

    def _stage(self, link: Link, saved: Saved) -> Stage:
        kernel, module = link
        if isinstance(kernel, Gain):
            return Stage(link, (), (), saved, stacked=False)
        if self.stack.weights is None:
            own = [p for p in module.parameters() if p.requires_grad or not isinstance(kernel, Autograd)]
            if len(self.stack.edges) > 1:
                own = []
            made = [self._arena.like((self._key, "gradient", id(p)), p) for p in own]
            self.gradients.update(zip(own, made, strict=True))
            return Stage(link, own, made, saved, stacked=False)
        inside = {id(p) for p in module.parameters()}
        columns = [c for c, p in enumerate(self.stack.edges[0].module.parameters()) if id(p) in inside]
        tensors = [self.stack.weights.tensors[column] for column in columns]
        made = [
            self._arena.like((self._key, "gradient", column), tensor)
            for column, tensor in zip(columns, tensors, strict=True)
        ]
        for row in self.stack.weight_rows.tolist():
            for column, gradient in zip(columns, made, strict=True):
                self.gradients[self.stack.weights.members[row][column]] = gradient[row]
        return Stage(link, tensors, made, saved, stacked=True)

    def _inner_shapes(self, chain: Sequence[Link]) -> list[tuple[int, ...]]:
        shapes, value = [], torch.zeros(2, *self.source.node.shape, dtype=self._arena.dtype, device=self._arena.device)
        for kernel, module in chain:
            if not isinstance(kernel, Gain):
                value = probe(module, [value])[0]
            shapes.append(tuple(value.shape[1:]))
        return shapes

    def place(self, link: int, rows: Positions) -> Place:
        """Place ``link`` of the chain: above 0, the output of stage ``link − 1``; the last is the contribution."""
        share, last = self._shares[link], len(self.stages)
        if share == last and self.direct:
            return self.target.place(0, self.stack.target_rows[rows])
        if len(self.stack.edges) == 1:
            return self._inner[share - 1]
        shape = self.stack.edges[0].contribution_shape if share == last else self._shapes[share - 1]
        return self._scratch(("inner", share), shape, rows, len(self.stack.edges))

    def _scratch(self, name: Hashable, shape: tuple[int, ...], rows: Positions, count: int) -> Part:
        tensor = self._arena.shared((self._key, name, count), lambda: self._arena.new(count, self._batch, shape))
        return Part(tensor, rows_of(rows, self._arena.device))

    def message_place(self, link: int, rows: Positions) -> Place:
        """Where the error pulled back through stages ``link`` and later goes."""
        if len(self.stack.edges) == 1:
            return self._messages[link]
        shape = self._shapes[link - 1] if link else self.source.node.shape
        count = self._most_gathered if len(rows) <= self._most_gathered else len(self.stack.edges)
        return self._scratch(("message", link), shape, np.arange(len(rows)), min(count, len(self.stack.edges)))

    def parts(self, rows: Positions) -> list[Positions]:
        """These rows, in parts small enough for a cache where their ends have to be gathered and scattered."""
        ends = (self.stack.source_rows[rows], self.stack.target_rows[rows])
        if all(run_of(end) is not None for end in ends):
            return [rows]
        return np.array_split(rows, -(-len(rows) // self._most_gathered))

    def contribution(self, rows: Positions, activity: Place) -> Place:
        """What these edges contribute, once evaluated; an identity contributes the activity itself."""
        return self.place(len(self.stages), rows) if self.stages else activity

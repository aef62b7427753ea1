"""The tensors of a program: what each group of nodes and of edges holds, and where its parts lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pcsim.engine.batched.groups import EdgeGroup, Groups, Link, NodeGroup, shape_after
from pcsim.engine.batched.operations import Cell, Operation, Part, run_of
from pcsim.engine.kernels.autograd import Traced
from pcsim.engine.kernels.kernel import Call, Kernel
from pcsim.engine.planning.plan import Plan
from pcsim.engine.planning.wiring import Mask, Positions
from pcsim.engine.problem import Batch, State, origin

Activity: TypeAlias = Literal["start", "present", "forward"]
"""Which values edges read: as they start, as they are now, or those of the forward pass."""
FIRST = np.zeros(1, np.intp)
"""Position of a single row."""
GATHERED_BYTES = 2**21
"""Rows that have to be gathered are computed in parts of about this size, which stay in a core's cache."""


class Arena:
    """Scratch by key; programs that never hold a state at the same time share one.

    Args:
        batch: number of samples.
        dtype: of all tensors.
        device: of all tensors.
    """

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch, self.dtype, self.device = batch, dtype, device
        self._kept: dict[Hashable, Any] = {}

    def new(self, count: int, shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
        """A tensor (count, batch, *shape), a single image laid out as asked for."""
        tensor = torch.zeros(count, self.batch, *shape, dtype=self.dtype, device=self.device)
        if layout is torch.channels_last and count == 1 and len(shape) == 3:
            return tensor[0].contiguous(memory_format=layout).unsqueeze(0)
        return tensor

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is under a key, made when it is first asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def shared_places(chain: Sequence[Link], first: int) -> list[int]:
    """For each of a chain's places, the later place whose tensor it shares because a kernel works in place.

    Args:
        chain: place i is the input of link i, the last place the output.
        first: the first place that may be overwritten.
    """
    shares = list(range(len(chain) + 1))
    for place in reversed(range(first, len(chain))):
        needed_before = place > 0 and chain[place - 1].kernel.reads == "output"
        if chain[place].in_place and chain[place].kernel.reads != "input" and not needed_before:
            shares[place] = shares[place + 1]
    return shares


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by name."""
    return dict(module.named_parameters())


class NodeMemory:
    """The tensors of one group of nodes, each (k, batch, *shape).

    Args:
        group: the nodes.
        plan: of which they are part.
        arena: where scratch tensors come from.
        key: names the group in the arena.
        layout: of images.
        batch: the batch at hand.
    """

    def __init__(
        self,
        group: NodeGroup,
        plan: Plan,
        arena: Arena,
        key: Hashable,
        layout: torch.memory_format,
        batch: Callable[[], Batch],
    ) -> None:
        self.group, self._arena, self._key, self._layout, self._batch = group, arena, key, layout, batch
        self.node = node = group.nodes[0]
        self.names = [member.name for member in group.nodes]
        clamping = plan.task.clamping
        self.partial = node.name in clamping.partial
        self.starts_forward = node.predicted and not group.given and node.name not in clamping.cyclic
        self.energy_weight, self.own_precision = (
            own[group.positions] for own in (plan.wiring.energy_weight, plan.wiring.own_precision)
        )
        self.tensors: dict[str, Tensor] = {}
        if node.predicted:
            separate = bool(plan.rewritten[group.positions].any()) or group.deterministic
            self.tensors["prediction"] = self._scratch("prediction") if separate else self._new()
            self.tensors["forward_prediction"] = self._new() if separate else self.tensors["prediction"]
        self.tensors["value"] = self.tensors["prediction"] if group.deterministic else self._new()
        self.copies: list[tuple[Tensor, Tensor]] = []
        """What is kept of the start, and what it is copied from."""
        if node.predicted and self.tensors["forward_prediction"] is not self.tensors["prediction"]:
            self.copies.append((self.tensors["forward_prediction"], self.tensors["prediction"]))
        if group.given:
            self.tensors["forward_value"] = self.tensors["value"]
        elif self.starts_forward and not self.partial:
            self.tensors["forward_value"] = self.tensors["forward_prediction"]
        else:
            self.tensors["forward_value"] = self._new()
            self.copies.append((self.tensors["forward_value"], self.tensors["value"]))
        self.chain: list[Link] = group.chain or []
        self.trace: Traced | None = None
        if node.predicted and group.chain is None:
            own = [parameter for parameter in node.parameters() if parameter is not node.log_precision]
            self.trace = Traced(self._evaluate, own)
        self.calls = [
            Call(link.module, weights_of(link.module), self._kept(("saved", place), dict[str, Tensor]))
            for place, link in enumerate(self.chain)
        ]
        self._shares = shared_places(self.chain, 0)
        single = len(group.nodes) == 1
        if single and self._shares[0] != len(self.chain):
            self._shares[0] = 0  # the inlet of a single node has a place of its own, to which edges may add
        self.takes_any_tensor = single and len(node.incoming) == 1
        """Whether what arrives before the transfer may be any tensor."""
        self._parts: dict[Hashable, Part] = {}
        self.outlets: dict[int, Cell] = {}
        """Errors pulled back to each edge's contribution, by edge position, where the node goes through autograd."""

    def _evaluate(self, inputs: Sequence[Tensor]) -> Tensor:
        if not inputs:
            return self.node.predict_from_prior(self._batch().size)
        return self.node.predict(inputs, self._batch().seed)

    def _kept(self, name: Hashable, make: Callable[[], Any]) -> Any:
        return self._arena.kept((self._key, name), make)

    def _new(self) -> Tensor:
        return self._arena.new(len(self.group.nodes), self.node.shape, self._layout)

    def _scratch(self, name: str) -> Tensor:
        found: Tensor = self._kept(name, self._new)
        return found

    def tensor(self, name: str) -> Tensor:
        """One of the group's tensors; "delta", "descent" and "velocity" are made when first asked for."""
        if name not in self.tensors:
            self.tensors[name] = self._scratch(name)
        return self.tensors[name]

    def part(self, name: str, rows: Positions, reader: Hashable = None) -> Part:
        """Rows of one of the group's tensors; gathered rows lie in scratch of the reader's own, if it is named."""
        return self._part(name, self.tensor(name), rows, reader)

    def _part(self, name: Hashable, stack: Tensor, rows: Positions, reader: Hashable = None) -> Part:
        def scratch(count: int) -> Tensor:
            key = ("gathered", name, reader, count)
            made: Tensor = self._kept(key, lambda: stack.new_zeros(count, *stack.shape[1:]))
            return made

        run = run_of(rows)
        key = (name, run)
        if run is None:
            return Part(stack, rows, scratch)
        if key not in self._parts:
            self._parts[key] = Part(stack, rows, scratch)
        return self._parts[key]

    def load(self, batch: Batch, previous: State | None, plan: Plan) -> None:
        """Take over a batch: clamped values, and the start of what no forward pass reaches."""
        value = self.tensors["value"]
        if self.group.given:
            for row, name in enumerate(self.names):
                value[row].copy_(batch.clamps[name].value)
        elif not self.starts_forward and not self.group.deterministic:
            for row, node in enumerate(self.group.nodes):
                value[row].copy_(origin(plan.task, batch, node, previous))
            if self.partial:
                self.clamp()
        if not plan.task.relaxation.plain and not (self.group.given or self.group.deterministic):
            self.tensor("velocity").zero_()  # another program of the same arena may have left its own in it

    def clamp(self) -> None:
        """Put the given units of partially clamped nodes back."""
        for row, name in enumerate(self.names):
            value = self.tensors["value"][row]
            value.copy_(self._batch().clamped(name, value))

    def place(self, link: int, rows: Positions) -> Part | Cell:
        """Place ``link`` of the transfer's chain: 0 what the edges contribute, the last one the prediction."""
        share = self._shares[link]
        if share == len(self.chain):
            return self.part("prediction", rows)
        if len(self.group.nodes) > 1:
            return self.part(f"inlet {share}", rows)
        if share > 0 or self.takes_any_tensor:
            cell: Cell = self._kept(("place", share), Cell)
            return cell
        return self._part("inlet", self._combined(), rows)

    def _combined(self) -> Tensor:
        """The sum of what the edges contribute to a single node, (1, batch, ...)."""
        shape = self.node.incoming[0].contribution_shape
        found: Tensor = self._kept("inlet", lambda: self._arena.new(1, shape, self._layout))
        return found

    def inlet(self, rows: Positions) -> Part:
        """What several edges contribute to, as a part that can be added to; a row may occur twice."""
        if len(self.group.nodes) == 1 and self._shares[0] != len(self.chain):
            return self._part("inlet", self._combined(), rows)
        place = self.place(0, rows)
        assert isinstance(place, Part)
        return place

    @property
    def overwrites_inlet(self) -> bool:
        """Whether what the edges contribute is lost once the transfer has run."""
        return bool(self.chain) and self._shares[0] != 0

    def pulled(self, rows: Positions, edge: int) -> Part | Cell:
        """Where the error, pulled back to what the edges contribute, is found."""
        if self.trace is not None:
            outlet: Cell = self.outlets.setdefault(edge, self._kept(("outlet", edge), Cell))
            return outlet
        return self.delta(rows, 0)

    def delta(self, rows: Positions, link: int) -> Part | Cell:
        """Where the error, pulled back to place ``link`` of the transfer's chain, is found."""
        for later in range(link, len(self.chain)):
            if not self.chain[later].in_place:
                cell: Cell = self._kept(("pulled", later), Cell)
                return cell
        return self.part("delta", rows)


class EdgeMemory:
    """The tensors of one group of edges.

    Args:
        group: the edges.
        source: tensors of the nodes that they read.
        target: tensors of the nodes that they predict.
        arena: where scratch tensors come from.
        key: names the group in the arena.
        seed: gives the seed of random draws.
    """

    def __init__(
        self,
        group: EdgeGroup,
        source: NodeMemory,
        target: NodeMemory,
        arena: Arena,
        key: Hashable,
        seed: Callable[[], int],
    ) -> None:
        self.group, self.source, self.target = group, source, target
        self._arena, self._key = arena, key
        self.names = [edge.name for edge in group.edges]
        edge = group.edges[0]
        self.trace: Traced | None = None
        if group.chains is None:
            self.trace = Traced(lambda inputs: edge.contribute(inputs[0], seed()), list(edge.module.parameters()))
        self.chain: list[Link] = group.chains[0] if group.chains else []
        self._shares = shared_places(self.chain, 1) if self.chain else [0]
        self.length = 1 if self.trace is not None else len(self.chain)
        needs_output = bool(self.chain) and self.chain[-1].kernel.reads == "output" and target.overwrites_inlet
        self.direct = len(edge.target.incoming) == 1 and target.trace is None and not needs_output
        """Whether contributions go straight to the target's inlet; otherwise they are kept here, to be combined."""
        units = max(math.prod(source.node.shape), math.prod(target.node.shape))
        self._most_gathered = max(1, GATHERED_BYTES // (arena.batch * units * arena.dtype.itemsize))
        self._shapes = self._inner_shapes() if len(group.edges) > 1 and len(self.chain) > 1 else []
        self._calls: dict[tuple[int, tuple[int, int]], Call] = {}
        self._stacked: dict[tuple[int, str], Tensor] = {}

    def _inner_shapes(self) -> list[tuple[int, ...]]:
        shapes, shape = [], self.source.node.shape
        for link in self.chain:
            shape = shape_after(link.module, shape, self.group.edges[0])
            shapes.append(shape)
        return shapes

    def _kept(self, name: Hashable, make: Callable[[], Any]) -> Any:
        return self._arena.kept((self._key, name), make)

    # Weights

    def call(self, link: int, rows: Positions, operations: list[Operation]) -> Call:
        """What a link's kernel is called on for these rows: one module itself, or several with stacked weights."""
        run = run_of(rows)
        if run is None:
            return self._make_call(link, rows, operations)
        if (link, run) not in self._calls:
            self._calls[link, run] = self._make_call(link, rows, operations)
        return self._calls[link, run]

    def _make_call(self, link: int, rows: Positions, operations: list[Operation]) -> Call:
        module, run = self._link(link, int(rows[0])).module, run_of(rows)
        weights: dict[str, Tensor] = dict(weights_of(module))
        for name in weights if len(rows) > 1 else ():
            stack = self._stack(link, name)
            if run is not None:
                weights[name] = stack[slice(*run)]
                continue
            index = torch.as_tensor(rows, device=self._arena.device)
            key = ("gathered weights", link, name, len(rows))
            weights[name] = scratch = self._kept(key, partial(stack.new_empty, len(rows), *stack.shape[1:]))
            gather = partial(torch.index_select, stack, 0, index, out=scratch)
            operations.append(Operation("gather weights", gather, named(self.names, rows)))
        return Call(module, weights, self._kept(("saved", link), dict[str, Tensor]))

    def gradient_call(self, link: int, rows: Positions) -> Call:
        """The same for weight gradients, of a stack without the weights, which they do not read."""
        module = self._link(link, int(rows[0])).module
        weights: dict[str, Tensor] = dict(weights_of(module)) if len(rows) == 1 else {}
        return Call(module, weights, self._kept(("saved", link), dict[str, Tensor]))

    def _link(self, link: int, row: int) -> Link:
        assert self.group.chains is not None
        return self.group.chains[row][link]

    def _stack(self, link: int, name: str) -> Tensor:
        if (link, name) not in self._stacked:
            first = self.parameter(link, name, 0)
            self._stacked[link, name] = self._kept(
                ("stacked", link, name), lambda: first.new_empty(len(self.group.edges), *first.shape)
            )
        return self._stacked[link, name]

    def parameter(self, link: int, name: str, row: int) -> nn.Parameter:
        """A parameter of a link of one of the edges."""
        return self._link(link, row).module.get_parameter(name)

    def stacking(self) -> list[Operation]:
        """Copies the weights of all edges into the stacks that kernels read, whatever has changed them since."""
        return [
            Operation("stack weights", _Stacking(self._column(link, name), stack), self.names)
            for (link, name), stack in self._stacked.items()
        ]

    def _column(self, link: int, name: str) -> list[nn.Parameter]:
        return [self.parameter(link, name, row) for row in range(len(self.group.edges))]

    # Places

    def activity(self, activity: Activity, rows: Positions) -> Part:
        """What these edges read of their sources."""
        source, name = self.source, "value"
        if activity == "start" and reads_prediction_at_start(source):
            name = "prediction"
        if activity == "forward" and not source.group.deterministic:
            name = "forward_value"
        return source.part(name, self.group.source_rows[rows], reader=self._key)

    def contribution(self, rows: Positions, activity: Activity) -> Part | Cell:
        """What these edges contribute, once evaluated; an identity contributes the activity itself."""
        return self.place(self.length, rows) if self.length else self.activity(activity, rows)

    def place(self, link: int, rows: Positions) -> Part | Cell:
        """Place ``link`` of the chain: above 0, the output of link ``link − 1``; the last is the contribution."""
        share = self._shares[link] if self.chain else link
        if share == self.length and self.direct:
            return self.target.place(0, self.group.target_rows[rows])
        if len(self.group.edges) == 1:
            cell: Cell = self._kept(("inner", share), Cell)
            return cell
        shape = self.group.edges[0].contribution_shape if share == self.length else self._shapes[share - 1]
        return self._part(("inner", share), shape, rows)

    def _part(self, name: Hashable, shape: tuple[int, ...], rows: Positions) -> Part:
        count = len(self.group.edges)
        stack: Tensor = self._kept((name, count), lambda: self._arena.new(count, shape, torch.contiguous_format))

        def scratch(size: int) -> Tensor:
            made: Tensor = self._kept(("gathered", name, size), lambda: stack.new_zeros(size, *stack.shape[1:]))
            return made

        return Part(stack, rows, scratch)

    def message_cell(self, link: int, rows: Positions) -> Cell:
        """Where the error pulled back through links ``link`` and later goes."""
        if len(self.group.edges) == 1:
            cell: Cell = self._kept(("message", link), Cell)
            return cell
        shape = self._shapes[link - 1] if link else self.source.node.shape
        count = self._most_gathered if len(rows) <= self._most_gathered else len(self.group.edges)
        count = min(count, len(self.group.edges))
        key = ("message", link, count)
        scratch: Tensor = self._kept(key, lambda: self._arena.new(count, shape, torch.contiguous_format))
        return Cell(scratch[0] if len(rows) == 1 else scratch[: len(rows)])

    def parts(self, rows: Positions) -> list[Positions]:
        """These rows, in parts small enough for a cache where their ends have to be gathered and scattered."""
        ends = (self.group.source_rows[rows], self.group.target_rows[rows])
        if all(run_of(end) is not None for end in ends):
            return [rows]
        return np.array_split(rows, -(-len(rows) // self._most_gathered))


class _Stacking:
    """Copies parameters into a stack, all of them: what has changed a weight does not always leave a sign."""

    def __init__(self, parameters: Sequence[nn.Parameter], stack: Tensor) -> None:
        self._parameters: list[Tensor] = list(parameters)
        self._stack = stack
        self._flat = stack.flatten(0, 1) if stack.dim() > 1 else None

    def __call__(self) -> None:
        if self._flat is None:
            torch.stack(self._parameters, out=self._stack)
        else:
            torch.cat(self._parameters, out=self._flat)


def reads_prediction_at_start(memory: NodeMemory) -> bool:
    """Whether a node's forward prediction serves as its value until the start is over."""
    return memory.starts_forward and not memory.group.deterministic and not memory.partial


class Memory:
    """All tensors of a program.

    Args:
        plan: what to compute.
        groups: which nodes and edges are computed together.
        arena: scratch; programs that never hold a state at the same time may share it.
    """

    def __init__(self, plan: Plan, groups: Groups, arena: Arena) -> None:
        self.plan, self.task, self.wiring, self.arena = plan, plan.task, plan.wiring, arena
        self.batch: Batch | None = None
        layout = _layouts(groups)
        self.nodes = [
            NodeMemory(group, plan, arena, ("node", place), layout[place], self.at_hand)
            for place, group in enumerate(groups.nodes)
        ]
        self.edges = [
            EdgeMemory(group, self.nodes[group.source], self.nodes[group.target], arena, ("edge", place), self._seed)
            for place, group in enumerate(groups.edges)
        ]
        self.rows = {name: (memory, row) for memory in self.nodes for row, name in enumerate(memory.names)}
        """Where each node lies, by name."""

    def at_hand(self) -> Batch:
        """The batch that the program runs on."""
        assert self.batch is not None
        return self.batch

    def _seed(self) -> int:
        return self.at_hand().seed

    def node_rows(self, mask: Mask) -> Iterator[tuple[NodeMemory, Positions]]:
        """Each group of nodes with those of its rows that are in a mask."""
        for memory in self.nodes:
            rows = memory.group.rows(mask)
            if len(rows):
                yield memory, rows

    def edge_rows(self, mask: Mask) -> Iterator[tuple[EdgeMemory, Positions]]:
        """Each group of edges with those of its rows that are in a mask, in parts that fit a cache."""
        for memory in self.edges:
            rows = memory.group.rows(mask)
            if len(rows):
                for part in memory.parts(rows):
                    yield memory, part


def _layouts(groups: Groups) -> list[torch.memory_format]:
    """How the images of each group of nodes lie: as a kernel that reads or makes them wants them."""
    wanted = [torch.contiguous_format] * len(groups.nodes)
    for group in groups.edges:
        for link in (group.chains or [[]])[0]:
            kernel: Kernel[Any] = link.kernel
            if kernel.memory_format is not torch.contiguous_format:
                wanted[group.source] = wanted[group.target] = kernel.memory_format
    return wanted


def named(names: Sequence[str], rows: Positions) -> list[str]:
    """The names of some rows."""
    return [names[row] for row in rows]

"""Stacks: which nodes share a tensor, which edges a kernel call, and weights that are views of one tensor.

Nodes of one kind lie in one tensor (k, batch, *shape), edges of one kind have their weights in one tensor (k, *shape)
of which the modules' parameters are views. Inside a stack the order is by the step at which its members first push, so
that those active at a step are a slice.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias
from weakref import WeakKeyDictionary

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from pcsim.engine.kernel import Gain, Kernel, kernel_for
from pcsim.engine.kernels import Identity
from pcsim.graph.edge import Edge
from pcsim.graph.energy import Gaussian
from pcsim.graph.evaluation import probe, tensor_options
from pcsim.graph.network import Network
from pcsim.graph.node import Node, Sum

if TYPE_CHECKING:
    from pcsim.engine.plan import Mask, Plan, Positions

Rows: TypeAlias = "slice | Tensor"


def run_of(positions: Positions) -> tuple[int, int] | None:
    """First row and the one after the last, if the rows follow each other; else None."""
    first, count = int(positions[0]), len(positions)
    if count == 1 or (int(positions[-1]) - first == count - 1 and bool((positions[1:] > positions[:-1]).all())):
        return first, first + count
    return None


def rows_of(positions: Positions, device: torch.device) -> Rows:
    """Rows of a stack: a slice if they follow each other, so that they are a view; else their positions."""
    run = run_of(positions)
    return torch.as_tensor(positions, device=device) if run is None else slice(*run)


class Part:
    """Rows of a stacked tensor (k, ...): a view where they are a slice, gathered and scattered where not.

    A single row is without the stack axis.
    """

    __slots__ = ("_rows", "_stack", "out")

    def __init__(self, stack: Tensor, rows: Rows) -> None:
        self._stack, self._rows = stack, rows
        self.out: Tensor | None = None
        """Where a kernel may write the part; None if it has to be scattered."""
        if isinstance(rows, slice):
            self.out = stack[rows.start] if rows.stop - rows.start == 1 else stack[rows]

    def read(self) -> Tensor:
        """The part's content."""
        return self._stack.index_select(0, self._rows) if self.out is None else self.out  # type: ignore[arg-type]

    def write(self, tensor: Tensor) -> None:
        """Replace the part's content."""
        if self.out is None:
            self._stack.index_copy_(0, self._rows, tensor)  # type: ignore[arg-type]
        elif tensor is not self.out:
            self.out.copy_(tensor)

    def add(self, tensor: Tensor, factor: float) -> None:
        """Add factor · tensor; rows that occur twice are added to twice."""
        if self.out is None:
            if tensor.untyped_storage().data_ptr() == self._stack.untyped_storage().data_ptr():
                tensor = tensor.clone()  # what an identity contributes may be other rows of this very stack
            self._stack.index_add_(0, self._rows, tensor, alpha=factor)  # type: ignore[arg-type]
        else:
            self.out.add_(tensor, alpha=factor)


class Slot:
    """A place that holds whatever tensor was written last, of a stack of one."""

    __slots__ = ("out",)

    def __init__(self) -> None:
        self.out: Tensor | None = None

    def read(self) -> Tensor:
        """The tensor."""
        assert self.out is not None
        return self.out

    def write(self, tensor: Tensor) -> None:
        """Hold this tensor from now on."""
        self.out = tensor


Place: TypeAlias = "Part | Slot"
Link: TypeAlias = tuple[Kernel[Any], nn.Module]


def chain_of(module: nn.Module, shape: tuple[int, ...]) -> list[Link] | None:
    """A module as a chain of kernels; None if one of its parts has none, or shares a parameter with another.

    Each link writes the gradients of its parameters, so that only autograd adds up those of several.
    """
    if len({*module.parameters()}) < len([*module.named_parameters(remove_duplicate=False)]):
        return None
    if type(module) is not nn.Sequential or module._forward_hooks or module._forward_pre_hooks:
        kernel = kernel_for(module, shape)
        if kernel is None:
            return None
        return [] if isinstance(kernel, Identity) else [(kernel, module)]
    chain: list[Link] = []
    for child in module:
        links = chain_of(child, shape)
        if links is None:
            return None
        chain += links
        if child is not module[-1] and links:
            dtype, device = tensor_options(child, module)
            value = torch.zeros(2, *shape, dtype=dtype, device=device)
            shape = tuple(probe(child, [value])[0].shape[1:])
    return chain


def pulls_in_place(link: Link) -> bool:
    """Whether a transfer's link pulls an error back over itself: unit by unit, and no weights learn from the error."""
    kernel, module = link
    return kernel.elementwise and next(module.parameters(), None) is None


def _signature(chain: Sequence[Link]) -> Hashable:
    return tuple((type(kernel), kernel.signature(module)) for kernel, module in chain)


@attrs.define(eq=False)
class NodeStack:
    """Nodes that are computed together.

    Args:
        positions: of the nodes in the network, in the order of the rows.
        nodes: the nodes.
        given: whether they are clamped in full.
        deterministic: whether their value is their prediction.
        chain: their transfer; None if it, or how they combine, goes through autograd (a stack of one then).
    """

    positions: Positions
    nodes: list[Node]
    given: bool
    deterministic: bool
    chain: list[Link] | None

    @property
    def by_units(self) -> bool:
        """Whether the transfer takes each unit by itself, so that errors pulled back lie where they were."""
        return self.chain is not None and all(map(pulls_in_place, self.chain))

    def rows(self, mask: Mask) -> Positions:
        """Rows of the nodes in a mask over the network."""
        return np.flatnonzero(mask[self.positions])


@attrs.define(eq=False)
class EdgeStack:
    """Edges that are computed together: of one kind, between the same two stacks of nodes.

    Args:
        positions: of the edges in the network, in the order of the rows.
        edges: the edges.
        source: place of the source nodes' stack.
        target: place of the target nodes' stack.
        source_rows: row of each edge's source in its stack.
        target_rows: row of each edge's target in its stack.
        chain: their module, by that of the first; None if it goes through autograd (a stack of one then).
        weights: stacked weights; None where each module keeps its own (a stack of one).
        weight_rows: row of each edge's weights in them.
    """

    positions: Positions
    edges: list[Edge]
    source: int
    target: int
    source_rows: Positions
    target_rows: Positions
    chain: list[Link] | None
    weights: StackedWeights | None
    weight_rows: Positions

    def rows(self, mask: Mask) -> Positions:
        """Rows of the edges in a mask over the network."""
        return np.flatnonzero(mask[self.positions])


@attrs.define(eq=False)
class Stacks:
    """All stacks of a plan.

    Args:
        nodes: the stacks of nodes.
        edges: the stacks of edges between them.
    """

    nodes: list[NodeStack]
    edges: list[EdgeStack]

    @classmethod
    def of(cls, plan: Plan, *, stacking: bool = True) -> Stacks:
        """Group a plan's nodes and edges, and let parameters become views of stacked weights.

        Args:
            plan: what to compute.
            stacking: for debugging, False makes a stack of each node and edge.
        """
        nodes = stack_nodes(plan, stacking)
        return cls(nodes, stack_edges(plan, nodes, WeightRegistry.of(plan.problem.network), stacking))


class StackedWeights:
    """Parameters of equal modules in one tensor per parameter, (k, *shape); the parameters are views of them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.members = [list(module.parameters()) for module in modules]
        self.tensors = [torch.stack([p.detach() for p in column]) for column in zip(*self.members, strict=True)]
        for row, parameters in enumerate(self.members):
            for tensor, parameter in zip(self.tensors, parameters, strict=True):
                parameter.data = tensor[row]
        self._flat = [parameter for parameters in self.members for parameter in parameters]
        self._addresses = [parameter.data_ptr() for parameter in self._flat]

    def intact(self) -> bool:
        """Whether every parameter is still a view of the stack."""
        return [*map(Tensor.data_ptr, self._flat)] == self._addresses


class WeightRegistry:
    """The stacked weights of one network, shared by all engines that run it."""

    _of: ClassVar[WeakKeyDictionary[Network, WeightRegistry]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.by_edge: dict[str, tuple[StackedWeights, int]] = {}
        self._stacks: list[StackedWeights] = []

    @classmethod
    def of(cls, network: Network) -> WeightRegistry:
        """The registry of a network."""
        return cls._of.setdefault(network, cls())

    def forget_replaced(self) -> None:
        """Forget all stacks if a parameter is no longer a view (after ``net.to(...)``), to be stacked anew."""
        if not all(stack.intact() for stack in self._stacks):
            self.by_edge, self._stacks = {}, []

    def keep(self, parameters: Mapping[str, list[nn.Parameter]]) -> None:
        """Forget the edges whose parameters, given by edge name, are no longer those that were stacked."""
        for name, (stack, row) in list(self.by_edge.items()):
            if [*map(id, parameters.get(name, ()))] != [*map(id, stack.members[row])]:
                del self.by_edge[name]

    def stack(self, edges: Sequence[Edge]) -> StackedWeights:
        """Stack these edges' weights in this order."""
        weights = StackedWeights([edge.module for edge in edges])
        self._stacks.append(weights)
        self.by_edge.update({edge.name: (weights, row) for row, edge in enumerate(edges)})
        return weights


def first_pushes(plan: Plan) -> Positions:
    """Step at which each node first pushes, T + 1 for those that never do."""
    first = np.full(len(plan.wiring.nodes), len(plan.sequence) + 1, np.intp)
    for step in reversed(range(len(plan.sequence))):
        first[plan.phases[plan.sequence[step]].push] = step
    return first


def stack_nodes(plan: Plan, stacking: bool) -> list[NodeStack]:
    """Group the nodes of a plan's network into stacks, in insertion order of their kinds."""
    wiring, clamping = plan.wiring, plan.problem.clamping
    groups: dict[Hashable, list[int]] = {}
    chains: dict[int, list[Link] | None] = {}
    for position, node in enumerate(wiring.nodes):
        shape = next((edge.contribution_shape for edge in node.incoming), node.shape)
        by_hand = isinstance(node.combine, Sum) and not node.stochastic and node.prior is None
        by_hand = by_hand and all(wiring.users[p] == 1 and p.requires_grad for p in node.transfer.parameters())
        chain = chains[position] = chain_of(node.transfer, shape) if by_hand else None
        together = stacking and chain is not None and all(link[0].stacks and pulls_in_place(link) for link in chain)
        kind = (
            None if together else node.name,
            node.name in clamping.full,
            node.name in clamping.partial,
            bool(wiring.deterministic[position]),
            node.predicted,
            node.name in clamping.cyclic,
            node.shape,
            shape,
            None if chain is None else _signature(chain),
            None if type(node.energy_function) is Gaussian else id(node.energy_function),
        )
        groups.setdefault(kind, []).append(position)
    first, level = first_pushes(plan), wiring.level
    stacks = []
    for members in groups.values():
        members.sort(key=lambda p: (first[p], level[p], p))
        nodes = [wiring.nodes[p] for p in members]
        given, inner = nodes[0].name in clamping.full, bool(wiring.deterministic[members[0]])
        stacks.append(NodeStack(np.array(members, np.intp), nodes, given, inner, chains[members[0]]))
    return stacks


def stack_edges(plan: Plan, nodes: Sequence[NodeStack], registry: WeightRegistry, stacking: bool) -> list[EdgeStack]:
    """Group the edges of a plan's network into stacks, and their weights with them."""
    wiring = plan.wiring
    registry.keep({edge.name: own for edge, own in zip(wiring.edges, wiring.edge_parameters, strict=True)})
    crowded = np.bincount(wiring.target, minlength=len(wiring.nodes)) > 1
    stack_at, row_at = np.zeros(len(wiring.nodes), np.intp), np.zeros(len(wiring.nodes), np.intp)
    for place, stack in enumerate(nodes):
        stack_at[stack.positions], row_at[stack.positions] = place, np.arange(len(stack.positions))
    groups: dict[Hashable, list[int]] = {}
    chains: dict[int, list[Link] | None] = {}
    for position, edge in enumerate(wiring.edges):
        chain = None if edge.stochastic else chain_of(edge.module, wiring.nodes[wiring.source[position]].shape)
        if any(wiring.users[p] > 1 or not p.requires_grad for p in wiring.edge_parameters[position]):
            chain = None
        if chain is not None and edge.gain != 1.0:
            chain = [*chain, (Gain(edge.gain), edge.module)]
        chains[position] = chain
        # Any other node keeps the errors that it has pulled back in places of their own, one for each edge.
        alone = chain is None or not nodes[stack_at[wiring.target[position]]].by_units
        together = stacking and not alone and all(kernel.stacks for kernel, _ in chain or ())
        stacked = registry.by_edge.get(edge.name)
        kind = (
            None if together else edge.name,
            stack_at[wiring.source[position]],
            stack_at[wiring.target[position]],
            None if chain is None else _signature(chain),
            bool(crowded[wiring.target[position]]),
            None if stacked is None else id(stacked[0]),
        )
        groups.setdefault(kind, []).append(position)
    stacks = []
    for members in groups.values():
        members.sort(key=lambda p: (row_at[wiring.target[p]], row_at[wiring.source[p]], p))
        edges = [wiring.edges[p] for p in members]
        if stacking and len(edges) > 1 and edges[0].name not in registry.by_edge and wiring.edge_parameters[members[0]]:
            registry.stack(edges)
        weights, rows = None, np.arange(len(edges))
        if stacking and edges[0].name in registry.by_edge:
            weights = registry.by_edge[edges[0].name][0]
            rows = np.array([registry.by_edge[edge.name][1] for edge in edges], np.intp)
            order = np.argsort(rows)
            members, edges, rows = [members[i] for i in order], [edges[i] for i in order], rows[order]
        stacks.append(
            EdgeStack(
                np.array(members, np.intp),
                edges,
                int(stack_at[wiring.source[members[0]]]),
                int(stack_at[wiring.target[members[0]]]),
                row_at[wiring.source[members]],
                row_at[wiring.target[members]],
                chains[members[0]],
                weights,
                rows,
            )
        )
    return stacks

"""The network: nodes and edges, checked as they are added, and the questions a graph answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import networkx as nx
import torch
from torch import Tensor, nn

from pcsim.errors import GraphError
from pcsim.graph import summary
from pcsim.graph.edge import Edge
from pcsim.graph.energy import Energy, LearnedPrecision
from pcsim.graph.evaluation import Snapshot, probe, tensor_options
from pcsim.graph.levels import levels_to
from pcsim.graph.node import Node, StateReader, Sum, instead_of

PROBE_BATCH = 2


class Network(nn.Module):
    """A predictive coding network: a directed graph of nodes and edges, cycles and parallel edges allowed.

    It is an ``nn.Module``: ``parameters()``, ``state_dict()``, ``to()`` and ``torch.optim`` work as everywhere. Which
    nodes are clamped is said per call to a simulator and is not part of it.

    Example:
        >>> net = Network()
        >>> image, digit = net.add_node("image", (64,)), net.add_node("digit", (10,))
        >>> edge = net.add_edge(image, digit, nn.Linear(64, 10))
    """

    picture: ClassVar[Callable[[Network], str] | None] = None
    """Draws a network as SVG for notebooks; set by the drawing, so that the graph needs nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.node = nn.ModuleDict()
        self.edge = nn.ModuleDict()
        self._nodes: dict[str, Node] = {}
        self._edges: dict[str, Edge] = {}
        self._incoming: dict[str, list[Edge]] = {}
        self._outgoing: dict[str, list[Edge]] = {}
        self.revision = 0
        """Grows with every change of the graph; whatever is derived from the graph is stale once it differs."""
        self.reader: StateReader | None = None
        """What the latest run offers to be read; set by the simulator."""

        self._snapshot: tuple[int, Snapshot] | None = None

    def __getstate__(self) -> dict[str, object]:
        # A copy starts without a run of its own; the state that is read belongs to the simulator of the original.
        return {**self.__dict__, "reader": None, "_snapshot": None}

    def snapshot(self) -> Snapshot:
        """The network's modules and parameters as they are now; the same object until one of them is replaced."""
        if self._snapshot is None or self._snapshot[0] != self.revision or not self._snapshot[1].holds():
            self._snapshot = self.revision, Snapshot(self)
        return self._snapshot[1]

    def tensor_options(self, *, otherwise: Tensor | None = None) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of what can be clamped: of the parameters, else the buffers, else ``otherwise``."""
        return self.snapshot().tensor_options or tensor_options(self, otherwise=otherwise)

    # Building

    def add_node(
        self,
        name: str,
        shape: Sequence[int],
        *,
        transfer: nn.Module | None = None,
        combine: nn.Module | None = None,
        energy: Energy | None = None,
        weight: float = 1.0,
        precision: float | Tensor | LearnedPrecision = 1.0,
        deterministic: bool = False,
        prior: float | Tensor | None = None,
    ) -> Node:
        """Add a node.

        Args:
            name: unique among nodes, without a dot.
            shape: of its value, the batch axis left out.
            transfer: g_n, from the combined contributions to a prediction of the node's shape; identity by default.
            combine: a module of as many arguments as there are incoming edges, in the order in which they are added
                (:class:`Sum` by default, :class:`Concatenate`, :class:`Product`, or any other).
            energy: :class:`Gaussian` by default.
            weight: w_n, a fixed factor on the energy, at least 0.
            precision: the node's own π_n, at least 0: a number, one per unit, or :class:`LearnedPrecision`. A
                precision schedule multiplies it.
            deterministic: the node has no latent of its own, v_n ≡ u_n.
            prior: what predicts a root, a number or one per unit; an ``nn.Parameter`` is learned.

        Raises:
            GraphError: the name is taken or not usable, or an argument is out of its range.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise GraphError(f"node name {name!r}: expected a non-empty string without a dot")
        if name in self._nodes:
            raise GraphError(f"node {name!r} exists already, with shape {self._nodes[name].shape}; names are unique")
        if hasattr(self.node, name):
            raise GraphError(f"node name {name!r} is an attribute of PyTorch's module containers; choose another")
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise GraphError(f"node {name!r}: shape {shape!r} given, expected positive numbers, batch axis left out")
        for argument, module in (("transfer", transfer), ("combine", combine)):
            _check_module(f"node {name!r}: {argument}", module)
        node = Node(
            self,
            name,
            sizes,
            transfer=transfer,
            combine=combine,
            energy=energy,
            weight=weight,
            precision=precision,
            deterministic=deterministic,
            prior=prior,
        )
        self.node[name] = node
        self._nodes[name] = node
        self._incoming[name] = []
        self._outgoing[name] = []
        self.revision += 1
        return node

    def add_edge(
        self,
        source: Node | str,
        target: Node | str,
        module: nn.Module | None = None,
        *,
        gain: float = 1.0,
        name: str | None = None,
    ) -> Edge:
        """Add an edge; its module is run once on zeros, without side effects, to check that it fits.

        Args:
            source: node whose value the module reads, or its name.
            target: node that the module helps to predict, or its name; may be the source.
            module: f_e, any ``nn.Module``; identity by default.
            gain: a fixed factor on what the module gives.
            name: unique among edges, without a dot; ``source->target`` by default, with ``#2`` and so on for
                parallel edges.

        Raises:
            GraphError: an end is not in this network, the module's output does not fit, the target has a prior, or
                the edge would close a cycle of deterministic nodes only.
        """
        start, end = self._resolve(source), self._resolve(target)
        edge_name = self._edge_name(start, end, name)
        if end.prior is not None:
            raise GraphError(
                f"edge {edge_name!r}: node {end.name!r} has a prior, which stands where no edge predicts a node; "
                "drop the prior or the edge"
            )
        if start.deterministic and end.deterministic and self._reaches_by_deterministic(end, start):
            raise GraphError(
                f"edge {edge_name!r} would close a cycle of deterministic nodes only, whose values have no solution to "
                "start from; make one node of the cycle latent"
            )
        _check_module(f"edge {edge_name!r}: module", module)
        module = nn.Identity() if module is None else module
        contribution, stochastic = self._probe_edge(edge_name, start, end, module)
        node_stochastic = self._check_prediction(edge_name, end, contribution)
        shape = tuple(contribution.shape[1:])
        edge = Edge(self, edge_name, start.name, end.name, module, gain, shape, stochastic)
        end.stochastic = end.stochastic or node_stochastic
        self.edge[edge_name] = edge
        self._edges[edge_name] = edge
        self._incoming[end.name].append(edge)
        self._outgoing[start.name].append(edge)
        self.revision += 1
        return edge

    def remove_edge(self, edge: Edge | str) -> None:
        """Take an edge out of the network; GraphError if it is not in it."""
        name = edge if isinstance(edge, str) else edge.name
        if name not in self._edges:
            raise GraphError(f"edge {name!r} is not in the network; its edges are {listed(self._edges)}")
        gone = self._edges.pop(name)
        del self.edge[name]
        self._incoming[gone.target_name].remove(gone)
        self._outgoing[gone.source_name].remove(gone)
        self.revision += 1

    def remove_node(self, node: Node | str) -> None:
        """Take a node and its edges out of the network; GraphError if it is not in it."""
        gone = self._resolve(node)
        for edge in {*self._incoming[gone.name], *self._outgoing[gone.name]}:
            self.remove_edge(edge)
        del self.node[gone.name], self._nodes[gone.name], self._incoming[gone.name], self._outgoing[gone.name]
        self.revision += 1

    def _resolve(self, node: Node | str) -> Node:
        name = node if isinstance(node, str) else node.name
        if name not in self._nodes:
            raise GraphError(f"node {name!r} is not in the network; its nodes are {listed(self._nodes)}")
        if not isinstance(node, str) and self._nodes[name] is not node:
            raise GraphError(f"node {name!r} belongs to another network; add it here, or pass its name")
        return self._nodes[name]

    def _edge_name(self, source: Node, target: Node, name: str | None) -> str:
        if name is None:
            name = base = f"{source.name}->{target.name}"
            count = 1
            while name in self._edges:
                count += 1
                name = f"{base}#{count}"
        if not isinstance(name, str) or not name or "." in name:
            raise GraphError(f"edge name {name!r}: expected a non-empty string without a dot")
        if name in self._edges or hasattr(self.edge, name):
            raise GraphError(f"edge name {name!r} is taken; choose another")
        return name

    def _reaches_by_deterministic(self, start: Node, end: Node) -> bool:
        reached, frontier = {start.name}, [start.name]
        while frontier:
            name = frontier.pop()
            if name == end.name:
                return True
            for edge in self._outgoing[name]:
                if edge.target_name not in reached and self._nodes[edge.target_name].deterministic:
                    reached.add(edge.target_name)
                    frontier.append(edge.target_name)
        return False

    def _probe_edge(self, edge: str, source: Node, target: Node, module: nn.Module) -> tuple[Tensor, bool]:
        dtype, device = tensor_options(module, target)
        value = torch.zeros(PROBE_BATCH, *source.shape, dtype=dtype, device=device)
        before = value._version
        try:
            contribution, stochastic = probe(module, [value])
        except Exception as problem:
            raise GraphError(
                f"edge {edge!r}: its module, {module!r}, does not accept a value of node {source.name!r}, shape "
                f"(batch, {_sizes(source.shape)}): {problem}"
            ) from problem
        if not isinstance(contribution, Tensor) or contribution.shape[:1] != (PROBE_BATCH,):
            found = tuple(contribution.shape) if isinstance(contribution, Tensor) else type(contribution).__name__
            raise GraphError(
                f"edge {edge!r}: its module turned (batch, {_sizes(source.shape)}) into {found}, expected one tensor "
                f"that keeps the batch axis, here {PROBE_BATCH}, first"
            )
        if value._version != before:
            raise GraphError(
                f"edge {edge!r}: its module, {module!r}, works in place, so it would overwrite the value of node "
                f"{source.name!r}; give it inplace=False"
            )
        return contribution, stochastic

    def _check_prediction(self, edge: str, target: Node, contribution: Tensor) -> bool:
        """Check what the node makes of its inputs with this edge added; whether it draws random numbers."""
        if not isinstance(target.combine, Sum):
            return False  # its arguments are complete only when the graph is: check() looks then
        first = next(iter(self._incoming[target.name]), None)
        if first is not None and first.contribution_shape != contribution.shape[1:]:
            raise GraphError(
                f"edge {edge!r} contributes (batch, {_sizes(contribution.shape[1:])}), but edge {first.name!r} "
                f"contributes (batch, {_sizes(first.contribution_shape)}) to the same node; a sum takes equal shapes"
            )
        return self._check_node(target, [contribution], edge)

    def _check_node(self, node: Node, contributions: list[Tensor], edge: str) -> bool:
        before = [contribution._version for contribution in contributions]
        try:
            combined, combine_draws = probe(node.combine, contributions)
            before.append(combined._version)
            prediction, transfer_draws = probe(node.transfer, [combined])
        except Exception as problem:
            given = ", ".join(f"(batch, {_sizes(c.shape[1:])})" for c in contributions)
            raise GraphError(
                f"edge {edge!r}: node {node.name!r} cannot turn {given} into a prediction of its shape {node.shape} "
                f"with combine {node.combine!r} and transfer {node.transfer!r}: {problem}"
            ) from problem
        if [tensor._version for tensor in (*contributions, combined)] != before:
            raise GraphError(
                f"edge {edge!r}: node {node.name!r} works in place, in combine {node.combine!r} or transfer "
                f"{node.transfer!r}, so it would overwrite what its edges contribute; give inplace=False"
            )
        if tuple(prediction.shape) != (PROBE_BATCH, *node.shape):
            raise GraphError(
                f"edge {edge!r} predicts (batch, {_sizes(prediction.shape[1:])}) for node {node.name!r}, whose shape "
                f"is (batch, {_sizes(node.shape)}); change the module, the node's transfer, or the node's shape"
            )
        return combine_draws or transfer_draws

    def check(self) -> None:
        """Check what can only be checked once the graph is whole: nodes that combine several arguments, one dtype.

        Raises:
            GraphError: a node's arguments do not fit, or modules differ in dtype or device.
        """
        self._check_one_dtype()
        for node in self._nodes.values():
            incoming = self._incoming[node.name]
            if not incoming:
                continue
            if not isinstance(node.combine, Sum):
                contributions = [self._probe_edge(e.name, e.source, node, e.module)[0] for e in incoming]
                node.stochastic = self._check_node(node, contributions, incoming[-1].name)

    def _check_one_dtype(self) -> None:
        found: tuple[str, Tensor] | None = None
        modules = [(f"edge {name!r}", edge.module) for name, edge in self._edges.items()]
        modules += [(f"node {name!r}", node.transfer) for name, node in self._nodes.items()]
        for place, parameter in ((place, parameter) for place, module in modules for parameter in module.parameters()):
            if not parameter.is_floating_point():
                continue
            found = found or (place, parameter)
            if (parameter.dtype, parameter.device) != (found[1].dtype, found[1].device):
                raise GraphError(
                    f"{place} has parameters of {parameter.dtype} on {parameter.device}, but {found[0]} has "
                    f"{found[1].dtype} on {found[1].device}; convert the whole network with network.to(...)"
                )

    # Asking

    @property
    def nodes(self) -> Mapping[str, Node]:
        """Nodes by name, in the order in which they were added."""
        return MappingProxyType(self._nodes)

    @property
    def edges(self) -> Mapping[str, Edge]:
        """Edges by name, in the order in which they were added."""
        return MappingProxyType(self._edges)

    def __getitem__(self, name: str) -> Node:
        """The node of that name; GraphError lists the known ones."""
        return self._resolve(name)

    def __contains__(self, name: object) -> bool:
        """Whether a node of that name, or that very node, is in the network."""
        return name in self._nodes or (isinstance(name, Node) and self._nodes.get(name.name) is name)

    def incoming(self, node: Node | str) -> list[Edge]:
        """Edges into a node, in the order in which they were added."""
        return list(self._incoming[self._resolve(node).name])

    def outgoing(self, node: Node | str) -> list[Edge]:
        """Edges out of a node, in the order in which they were added."""
        return list(self._outgoing[self._resolve(node).name])

    def in_degree(self, node: Node | str) -> int:
        """How many edges end at a node."""
        return len(self._incoming[self._resolve(node).name])

    def neighbours(self, node: Node | str) -> list[Node]:
        """Nodes at the other ends of a node's edges, each once: those that predict it, then those that it predicts."""
        name = self._resolve(node).name
        names = [e.source_name for e in self._incoming[name]] + [e.target_name for e in self._outgoing[name]]
        return [self._nodes[other] for other in dict.fromkeys(names) if other != name]

    def roots(self) -> list[Node]:
        """Nodes without an incoming edge."""
        return [node for node in self._nodes.values() if not self._incoming[node.name]]

    def sinks(self) -> list[Node]:
        """Nodes without an outgoing edge."""
        return [node for node in self._nodes.values() if not self._outgoing[node.name]]

    def components(self) -> list[list[Node]]:
        """Strongly connected components, sources first; a node on no cycle is a component of its own."""
        condensed = nx.condensation(nx.DiGraph(self.to_networkx()))
        order = {name: position for position, name in enumerate(self._nodes)}
        groups = (condensed.nodes[c]["members"] for c in nx.topological_sort(condensed))
        return [[self._nodes[name] for name in sorted(group, key=order.__getitem__)] for group in groups]

    def topological_order(self) -> list[Node]:
        """Nodes, each after all that predict it; GraphError names a cycle if there is one."""
        graph = self.to_networkx()
        try:
            return [self._nodes[name] for name in nx.topological_sort(graph)]
        except nx.NetworkXUnfeasible:
            cycle = " -> ".join(edge[0] for edge in nx.find_cycle(graph))
            message = f"the network has no topological order: {cycle} is a cycle; ask for components()"
            raise GraphError(message) from None

    def levels(self, targets: Sequence[Node | str] | None = None) -> dict[str, int]:
        """Latent-to-latent hops from each node to the targets, along the longest path (SPEC §2, Arrival).

        Args:
            targets: nodes to count from, the sinks by default.

        Returns:
            Level by node name; a node that reaches no target is left out.
        """
        chosen = self.sinks() if targets is None else [self._resolve(target) for target in targets]
        return levels_to(self, [node.name for node in chosen])

    def unequal_paths(self) -> list[tuple[Node, Node, int, int]]:
        """Pairs of nodes joined by paths of different lengths, counted in latent hops.

        Along such a pair an error arrives too early by the shorter path (SPEC §5).

        Returns:
            (from, to, shortest, longest), for every node where paths part and every node where they meet.

        Raises:
            GraphError: the network has a cycle, in which no path is the longest.
        """
        order = self.topological_order()
        found = []
        for position, start in enumerate(order):
            if len(self._outgoing[start.name]) < 2:
                continue
            lengths = {start.name: (0, 0)}
            for node in order[position + 1 :]:
                hop = 0 if node.deterministic else 1
                reached = [lengths[e.source_name] for e in self._incoming[node.name] if e.source_name in lengths]
                if not reached:
                    continue
                shortest, longest = min(low for low, _ in reached) + hop, max(high for _, high in reached) + hop
                lengths[node.name] = shortest, longest
                if shortest != longest and len(reached) > 1:
                    found.append((start, node, shortest, longest))
        return found

    def to_networkx(self) -> nx.MultiDiGraph:
        """The graph as networkx has it: node names, edge names as keys; ``node`` and ``edge`` hold the objects."""
        graph = nx.MultiDiGraph()
        graph.add_nodes_from((name, {"node": node}) for name, node in self._nodes.items())
        graph.add_edges_from(
            (edge.source_name, edge.target_name, name, {"edge": edge}) for name, edge in self._edges.items()
        )
        return graph

    def __repr__(self) -> str:
        return f"Network({len(self._nodes)} nodes, {len(self._edges)} edges)"

    def __str__(self) -> str:
        return summary.text(self)

    def _repr_html_(self) -> str:
        # A notebook would show HTML or SVG, and not both; so the picture is part of the HTML.
        return summary.html(self, "" if Network.picture is None else Network.picture(self))


def listed(names: Mapping[str, object], most: int = 12) -> str:
    """The first names of a mapping, quoted, for a message."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown or "none yet"


def _check_module(argument: str, given: object) -> None:
    if given is None or isinstance(given, nn.Module):
        return
    mend = instead_of(given, nn.Module, "wrap a function in a module")
    raise GraphError(f"{argument} {given!r} given, expected an instance of nn.Module; {mend}")


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(str(size) for size in shape)

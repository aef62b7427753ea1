"""The network: nodes and edges, checked as they are added, and the questions a graph answers."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from typing import ClassVar, Generic, NoReturn, TypeVar

import networkx as nx
import torch
from torch import Tensor, nn

from pcsim.errors import GraphError, UnknownNameError
from pcsim.graph import checks, summary
from pcsim.graph.combining import Sum
from pcsim.graph.edge import Edge
from pcsim.graph.energy import Energy, LearnedPrecision
from pcsim.graph.fingerprint import Fingerprint
from pcsim.graph.levels import components, levels_to
from pcsim.graph.node import Node, StateReader
from pcsim.graph.part import Part
from pcsim.graph.probing import plain, tensor_options
from pcsim.messages import listed

KEPT_FINGERPRINTS = 4
"""Training and evaluation take turns, and each finds its own again."""

P = TypeVar("P", bound=Part)


class Parts(nn.Module, Mapping[str, P], Generic[P]):
    """A network's nodes or edges by name, in the order in which they were added; to be read, not written."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __getitem__(self, name: str) -> P:
        part = self._modules.get(name)
        if part is None:
            raise UnknownNameError(f"{self._kind} {name!r} is not in the network; it has {listed(self._modules)}")
        return part  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def values(self) -> ValuesView[P]:
        """The nodes or edges."""
        return self._modules.values()  # type: ignore[return-value]

    def items(self) -> ItemsView[str, P]:
        """Each with its name."""
        return self._modules.items()  # type: ignore[return-value]

    __hash__ = nn.Module.__hash__
    __eq__ = object.__eq__


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
        self.nodes: Parts[Node] = Parts("node")
        """Nodes by name, in the order in which they were added."""
        self.edges: Parts[Edge] = Parts("edge")
        """Edges by name, in the order in which they were added."""
        self._incoming: dict[str, list[Edge]] = {}
        self._outgoing: dict[str, list[Edge]] = {}
        self.revision = 0
        """Grows with every change of the graph; whatever is derived from the graph is stale once it differs."""
        self.reader: StateReader | None = None
        """What the latest run offers to be read; set by the simulator."""

        self._fingerprints: list[Fingerprint] = []
        self._constants: tuple[int, dict[str, float]] | None = None

    def __getstate__(self) -> dict[str, object]:
        # A copy starts without a run of its own; the state that is read belongs to the simulator of the original.
        return {**self.__dict__, "reader": None, "_fingerprints": []}

    def forward(self, *_: object, **__: object) -> NoReturn:
        """Refused: a network has no one input and no one output.

        Raises:
            GraphError: always; says what to use.
        """
        raise GraphError(
            "a network is not called like a layer: clamp its nodes with Simulator.infer or Simulator.predict, or make "
            "a module of its forward pass with pcsim.to_module(network, inputs, outputs)"
        )

    @property
    def constants(self) -> dict[str, float]:
        """What nodes are clamped to that are given no clamp, by name."""
        if self._constants is None or self._constants[0] != self.revision:
            known = {name: node.constant for name, node in self.nodes.items() if node.constant is not None}
            self._constants = self.revision, known
        return self._constants[1]

    def fingerprint(self) -> Fingerprint:
        """What the network consists of now; the same object until anything but weights has changed."""
        for known in self._fingerprints:
            if known.holds():
                return known
        checks.whole(self)
        found = Fingerprint(self)
        self._fingerprints = [found, *self._fingerprints][:KEPT_FINGERPRINTS]
        return found

    def tensor_options(self, *, otherwise: Tensor | None = None) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of what can be clamped: of the parameters, else the buffers, else ``otherwise``."""
        return tensor_options(self, otherwise=otherwise)

    @property
    def places(self) -> dict[str, torch.device]:
        """Where each node lies, by name; empty where all lie together."""
        found = {name: node.device for name, node in self.nodes.items() if node.device is not None}
        return found if len(set(found.values())) > 1 else {}

    def place(self, devices: Mapping[str, torch.device | str] | Mapping[Node, torch.device | str]) -> Network:
        """Put nodes, and the edges into them, on devices of their own, once the graph is built.

        A prediction and its error are computed where the node lies; along an edge between two devices a latent crosses
        one way and a message the other. Nothing else does, since every rule is local. ``print(simulator.plan)`` says
        how much crosses at which step. ``to()`` brings all to one place again.

        Args:
            devices: by node or its name; of nodes left out, where they lie already.

        Returns:
            The network itself, its parameters moved as by ``to()``: make optimizers afterwards.

        Raises:
            GraphError: a node is not in the network, or what is given names no device. Nothing is moved then, nor where
                there is no room.
        """
        if not isinstance(devices, Mapping) or not all(isinstance(node, str | Node) for node in devices):
            raise GraphError(
                f"place: {devices!r} given, expected a dictionary from nodes or their names to devices, such as "
                "{'output': 'cuda:1'}"
            )
        known = {node: node.device or self._lies_on(node) for node in self.nodes.values()}
        goals = known | {self._resolve(node): _device(node, device) for node, device in devices.items()}
        moved: list[tuple[Part, torch.device | None, torch.device]] = []
        self.revision += 1
        try:
            for node, device in goals.items():
                for part in (node, *node.incoming):
                    moved.append((part, part.device, known[node]))
                    part.lie_on(device)
        except BaseException:  # such as where there is no room
            for part, placed, before in moved:
                part.lie_on(before)
                if placed is None:
                    del part.where
            raise
        return self

    def _lies_on(self, node: Node) -> torch.device:
        """Where a node that was not placed lies."""
        home = self.tensor_options()
        return tensor_options(node, *node.incoming, otherwise=torch.empty(0, dtype=home[0], device=home[1]))[1]

    # Building

    def add_node(
        self,
        name: str,
        shape: Sequence[int],
        *,
        transfer: nn.Module | None = None,
        combine: nn.Module | None = None,
        energy: Energy | None = None,
        energy_weight: float = 1.0,
        precision: float | Tensor | LearnedPrecision = 1.0,
        deterministic: bool = False,
        prior: object = None,
        constant: float | None = None,
    ) -> Node:
        """Add a node.

        Args:
            name: unique among nodes, without a dot.
            shape: of its value, the batch axis left out.
            transfer: g_n, from the combined contributions to a prediction of the node's shape; identity by default.
            combine: a module of as many arguments as there are incoming edges, in the order in which they are added
                (:class:`Sum` by default, :class:`Concatenate`, :class:`Product`, or any other).
            energy: :class:`Gaussian` by default.
            energy_weight: w_n, a fixed factor on the energy, at least 0.
            precision: the node's own π_n, at least 0: a number, one per unit, or :class:`LearnedPrecision`. A
                precision schedule multiplies it.
            deterministic: the node has no latent of its own, v_n ≡ u_n.
            prior: what predicts a root, a number or one per unit (a tensor, array or list); an ``nn.Parameter`` is
                learned.
            constant: what all units are clamped to in every run that gives the node no clamp.

        Raises:
            GraphError: the name is taken or not usable, or an argument is out of its range.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise GraphError(f"node name {name!r}: expected a non-empty string without a dot")
        if name in self.nodes:
            raise GraphError(f"node {name!r} exists already, with shape {self.nodes[name].shape}; names are unique")
        if hasattr(self.nodes, name):
            raise GraphError(f"node name {name!r} is an attribute of PyTorch's module containers; choose another")
        for argument, module in (("transfer", transfer), ("combine", combine)):
            checks.module(f"node {name!r}: {argument}", module)
        sizes = checks.shape(name, shape)
        node = Node(
            self,
            name,
            sizes,
            transfer=transfer,
            combine=combine,
            energy=energy,
            energy_weight=energy_weight,
            precision=precision,
            deterministic=deterministic,
            prior=prior,
            constant=constant,
        )
        checks.look_at_node(node, node.combine, node.transfer, [])
        self.nodes.add_module(name, node)
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
        checks.module(f"edge {edge_name!r}: module", module)
        module = nn.Identity() if module is None else module
        contribution = checks.contribution(edge_name, start, end, module)
        if type(end.combine) is Sum:  # other arguments are complete only when the graph is: the next run looks then
            checks.fits_the_others(edge_name, end, contribution, self._incoming[end.name])
            checks.prediction(end, [contribution], edge_name, end.combine, end.transfer)
        edge = Edge(self, edge_name, start.name, end.name, module, gain)
        checks.look_at_edge(edge, module, contribution)
        if not plain(end.transfer):
            end.looked_at = ()  # what it keeps can be looked at only now that something is contributed
        self.edges.add_module(edge_name, edge)
        self._incoming[end.name].append(edge)
        self._outgoing[start.name].append(edge)
        self.revision += 1
        return edge

    def add_pathway(
        self,
        source: Node | str,
        target: Node | str,
        module: nn.Module | None = None,
        *,
        precision: float | Tensor | LearnedPrecision = 1.0,
        energy: Energy | None = None,
        name: str | None = None,
    ) -> Node:
        """Add a pathway: a second opinion on a node, with an error and a precision of its own.

        Edges into one node make one prediction together. A pathway predicts its target by itself: F gains
        π E(v_target − f(v_source)), so that several pathways, and the edges, are weighed by their precisions, as cues
        are combined. It is a node that compares the two, 0 at rest, with an edge from either: its ``error`` is the
        pathway's, its ``precision`` may be set, learned, or given trial by trial.

        Args:
            source: node whose value the module reads, or its name.
            target: node that is predicted, or its name.
            module: f, from the source's values to the target's; identity by default.
            precision: π, as of :meth:`add_node`.
            energy: of the difference; :class:`Gaussian` by default.
            name: of the comparing node; ``source~target`` by default.

        Raises:
            GraphError: as :meth:`add_node` and :meth:`add_edge`; the network stays as it was.
        """
        start, end = self._resolve(source), self._resolve(target)
        named = f"{start.name}~{end.name}" if name is None else name
        node = self.add_node(named, end.shape, precision=precision, energy=energy, constant=0.0)
        try:
            self.add_edge(end, node, gain=-1.0)
            self.add_edge(start, node, module)
        except BaseException:
            self.remove_node(node)
            raise
        return node

    def remove_edge(self, edge: Edge | str) -> None:
        """Take an edge out of the network; GraphError if it is not in it."""
        name = edge if isinstance(edge, str) else edge.name
        if name not in self.edges:
            raise GraphError(f"edge {name!r} is not in the network; its edges are {listed(self.edges)}")
        gone = self.edges[name]
        delattr(self.edges, name)
        self._incoming[gone.target_name].remove(gone)
        self._outgoing[gone.source_name].remove(gone)
        self.revision += 1

    def remove_node(self, node: Node | str) -> None:
        """Take a node and its edges out of the network; GraphError if it is not in it."""
        gone = self._resolve(node)
        for edge in {*self._incoming[gone.name], *self._outgoing[gone.name]}:
            self.remove_edge(edge)
        delattr(self.nodes, gone.name)
        del self._incoming[gone.name], self._outgoing[gone.name]
        self.revision += 1

    def _resolve(self, node: Node | str) -> Node:
        name = node if isinstance(node, str) else node.name
        if name not in self.nodes:
            raise GraphError(f"node {name!r} is not in the network; its nodes are {listed(self.nodes)}")
        if not isinstance(node, str) and self.nodes[name] is not node:
            raise GraphError(f"node {name!r} belongs to another network; add it here, or pass its name")
        return self.nodes[name]

    def _edge_name(self, source: Node, target: Node, name: str | None) -> str:
        if name is None:
            name = base = f"{source.name}->{target.name}"
            count = 1
            while name in self.edges:
                count += 1
                name = f"{base}#{count}"
        if not isinstance(name, str) or not name or "." in name:
            raise GraphError(f"edge name {name!r}: expected a non-empty string without a dot")
        if name in self.edges or hasattr(self.edges, name):
            raise GraphError(f"edge name {name!r} is taken; choose another")
        return name

    def _reaches_by_deterministic(self, start: Node, end: Node) -> bool:
        reached, frontier = {start.name}, [start.name]
        while frontier:
            name = frontier.pop()
            if name == end.name:
                return True
            for edge in self._outgoing[name]:
                target = edge.target_name
                if target == end.name or (target not in reached and self.nodes[target].deterministic):
                    reached.add(edge.target_name)
                    frontier.append(edge.target_name)
        return False

    def check(self) -> None:
        """Check what can only be checked once the graph is whole: nodes that combine several arguments, one dtype.

        Raises:
            GraphError: a node's arguments do not fit, or modules differ in dtype or device.
        """
        checks.whole(self)

    def closes_deterministic_cycle(self, node: Node) -> bool:
        """Whether a node lies on a cycle of which all others are deterministic."""
        return any(
            edge.target is node or (edge.target.deterministic and self._reaches_by_deterministic(edge.target, node))
            for edge in self._outgoing[node.name]
        )

    # Asking

    def __getitem__(self, name: str) -> Node:
        """The node of that name; GraphError lists the known ones."""
        return self._resolve(name)

    def __contains__(self, name: object) -> bool:
        """Whether a node of that name, or that very node, is in the network."""
        return name in self.nodes or (isinstance(name, Node) and self.nodes.get(name.name) is name)

    def incoming(self, node: Node | str) -> list[Edge]:
        """Edges into a node, in the order in which they were added."""
        return list(self._incoming[self._resolve(node).name])

    def outgoing(self, node: Node | str) -> list[Edge]:
        """Edges out of a node, in the order in which they were added."""
        return list(self._outgoing[self._resolve(node).name])

    def in_degree(self, node: Node | str) -> int:
        """How many edges end at a node."""
        ends = self._incoming.get(node) if isinstance(node, str) else None
        return len(self._incoming[self._resolve(node).name] if ends is None else ends)

    def neighbours(self, node: Node | str) -> list[Node]:
        """Nodes at the other ends of a node's edges, each once: those that predict it, then those that it predicts."""
        name = self._resolve(node).name
        names = [e.source_name for e in self._incoming[name]] + [e.target_name for e in self._outgoing[name]]
        return [self.nodes[other] for other in dict.fromkeys(names) if other != name]

    def roots(self) -> list[Node]:
        """Nodes without an incoming edge."""
        return [node for node in self.nodes.values() if not self._incoming[node.name]]

    def sinks(self) -> list[Node]:
        """Nodes without an outgoing edge."""
        return [node for node in self.nodes.values() if not self._outgoing[node.name]]

    def components(self) -> list[list[Node]]:
        """Strongly connected components, sources first; a node on no cycle is a component of its own."""
        ends = ((edge.source_name, edge.target_name) for edge in self.edges.values())
        return [[self.nodes[name] for name in members] for members in components(self, ends)]

    def topological_order(self) -> list[Node]:
        """Nodes, each after all that predict it; GraphError names a cycle if there is one."""
        graph = self.to_networkx()
        try:
            return [self.nodes[name] for name in nx.topological_sort(graph)]
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
        graph.add_nodes_from((name, {"node": node}) for name, node in self.nodes.items())
        graph.add_edges_from(
            (edge.source_name, edge.target_name, name, {"edge": edge}) for name, edge in self.edges.items()
        )
        return graph

    def __repr__(self) -> str:
        return f"Network({len(self.nodes)} nodes, {len(self.edges)} edges)"

    def __str__(self) -> str:
        return summary.text(self)

    def _repr_html_(self) -> str:
        # A notebook would show HTML or SVG, and not both; so the picture is part of the HTML.
        return summary.html(self, "" if Network.picture is None else Network.picture(self))


def _device(node: Node | str, device: torch.device | str) -> torch.device:
    try:
        if device is None:
            raise TypeError("None names none")
        return torch.empty(0, device=device).device  # with the number of what is named without one
    except Exception as error:  # of many kinds, if PyTorch has been built without it
        name = node if isinstance(node, str) else node.name
        raise GraphError(f"place {name!r}: {device!r} given, expected a device that is there: {error}") from error

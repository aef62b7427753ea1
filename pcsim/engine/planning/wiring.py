"""A task's graph as arrays: sets of nodes and edges are boolean masks over their positions in the network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pcsim.engine.problem import Task
from pcsim.graph.probing import parameters_of

Mask: TypeAlias = npt.NDArray[np.bool_]
Positions: TypeAlias = npt.NDArray[np.intp]
Factors: TypeAlias = npt.NDArray[np.float64]


class Wiring:
    """Ends of edges, kinds of nodes, and who uses which parameter.

    Args:
        task: of which only the graph, the clamped names and what learns are used.
    """

    def __init__(self, task: Task) -> None:
        clamping, network, self._task = task.clamping, task.network, task
        self.held = task.held
        """Whether predictions stay those of the forward pass."""
        self.nodes = list(network.nodes.values())
        self.edges = list(network.edges.values())
        self._place = place = {node.name: position for position, node in enumerate(self.nodes)}
        self.source = np.array([place[edge.source_name] for edge in self.edges], np.intp)
        self.target = np.array([place[edge.target_name] for edge in self.edges], np.intp)
        self.free = self._mask(clamping.free, place)
        self.energetic = self._mask(clamping.energetic, place)
        self.deterministic = self._mask(clamping.deterministic, place)
        self.energy_weight = np.array([task.weight(node.name) for node in self.nodes])
        numbers = [task.number(node.name) for node in self.nodes]
        self.own_precision = np.array([np.nan if number is None else number for number in numbers], np.float64)
        """The nodes' own precisions; NaN where one is a tensor or learned."""
        partial = self._mask(clamping.partial, place)
        self.gaussian = np.array([node.energy_function.gaussian for node in self.nodes], bool)
        self.proportional = self.gaussian & ~np.isnan(self.own_precision) & ~partial
        """Nodes whose error is a number times value − prediction, all of whose units are free, or all given."""
        self.level = np.array([clamping.levels.get(node.name, -1) for node in self.nodes], np.intp)
        """Level of each node, −1 where it reaches no target."""
        self.deepest = int(self.level.max(initial=0))
        restless = np.array([not node.energy_function.rests_at_prediction for node in self.nodes], bool)
        given = self._mask(clamping.full, place) | partial
        self.live_at_start = self.energetic & (given | self._mask(clamping.placed, place) | restless)
        self.streamed = self._mask((name for name, _ in task.streams), place)
        """Clamped nodes that are given anew during the relaxation."""
        self.probed = self._mask(task.probed, place)
        """Nodes whose prediction is recorded."""
        self.following = self._mask(task.following, place)
        """Nodes whose values follow from their errors, which are what moves."""
        self.passing = self.deterministic | self.following
        """Nodes whose value follows from their prediction within a step, and through which errors pass."""
        order = clamping.sequence if task.following else clamping.deterministic_order
        self.generations = self._generations([place[name] for name in order if self.passing[place[name]]])
        """Passing nodes by how many passing ones lie before them, with the edges into each generation."""
        self.generation = np.full(len(self.nodes), len(self.generations), np.intp)
        """Place in ``generations`` of each passing node; all others come after the last."""
        for number, (members, _) in enumerate(self.generations):
            self.generation[members] = number
        self.displaced = self._mask(clamping.displaced, place) & ~self.following
        """Nodes that may keep what moves them apart from their value."""
        self.multiplied = self._mask(clamping.multiplied if task.relaxation.multipliers else (), place)
        """Nodes that carry a multiplier."""
        self.between = self.passing[self.source]
        """Edges out of passing nodes."""
        self.hears = self.free.copy()
        """Nodes to which messages matter: free, or deterministic and read, somewhere below, from a free one."""
        for generation, into in self.generations:
            self.hears[generation] |= self.any_of(into & self.hears[self.source], self.target)[generation]
        self.crossing = self._find_crossing(task)
        """Bytes of a sample that go along each edge between two devices, either way; 0 along all others."""
        self._find_parameters(task)
        self.learns = self.any_of(np.isin(np.arange(len(self.edges)), self.edge_user), self.target)
        """Nodes from whose errors some parameter learns: of an edge into them, their own, or below a deterministic."""
        self.learns[self.node_user] = True
        for generation, into in self.generations:
            passed = self.any_of(into & (self.deterministic & self.learns)[self.source], self.target)
            self.learns[generation] |= passed[generation]

    @cached_property
    def predicted(self) -> Mask:
        """Nodes that an edge or a prior predicts."""
        return np.array([node.predicted for node in self.nodes], bool)

    @cached_property
    def forward_depth(self) -> Positions:
        """How many predictions lie before each node's own in the forward pass; 0 where none gives its value."""
        clamping, place, predicted = self._task.clamping, self._place, self.predicted.tolist()
        sources: list[list[int]] = [[] for _ in self.nodes]
        for source, target in zip(self.source.tolist(), self.target.tolist(), strict=True):
            sources[target].append(source)
        depth = [0] * len(self.nodes)
        for component in clamping.components:
            for name in sorted(component, key=clamping.position.__getitem__):
                position = place[name]
                moves = name not in clamping.full and name not in clamping.placed and predicted[position]
                if moves or name in clamping.deterministic:
                    depth[position] = 1 + max((depth[before] for before in sources[position]), default=0)
        return np.array(depth, np.intp)

    def changing(self, step: int) -> Mask:
        """Clamped nodes whose next frame takes its place once a step has been taken."""
        return self._mask(self._task.changing(step), self._place)

    def _find_parameters(self, task: Task) -> None:
        self.parameters = list(task.fingerprint.parameters)
        # By identity: a tensor is slow to hash, and a large graph has a hundred thousand.
        place = {id(parameter): position for position, parameter in enumerate(self.parameters)}
        of_edges = [parameters_of(edge.module) for edge in self.edges]
        # A deterministic node has no error, and so nothing to learn a precision from.
        owned = [list(node.parameters()) for node in self.nodes]
        of_nodes = [
            [p for p in own if not (inner and p is node.log_precision)]
            for node, own, inner in zip(self.nodes, owned, self.deterministic, strict=True)
        ]
        self.edge_user, self.edge_used = _uses(place, of_edges)
        self.node_user, self.node_used = _uses(place, of_nodes)
        # A prediction does not depend on the precision.
        both = zip(self.nodes, owned, strict=True)
        predicting = [[p for p in own if p is not node.log_precision] for node, own in both]
        self.transfer_user, self.transfer_used = _uses(place, predicting)

    @cached_property
    def own_edge(self) -> Mask:
        """Edges with modules of a user's own, which may read weights that are not their own."""
        return np.array([edge.stochastic for edge in self.edges], bool)

    @cached_property
    def own_node(self) -> Mask:
        """Nodes with such modules."""
        return np.array([node.stochastic and node.predicted for node in self.nodes], bool)

    def _find_crossing(self, task: Task) -> Positions:
        """Bytes of a sample's latent, and of a message, along each edge between two devices; 0 along all others."""
        devices, fingerprint = [node.device for node in self.nodes], task.fingerprint
        if len(set(devices)) < 2:
            return np.zeros(len(self.edges), np.intp)
        number = (fingerprint.tensor_options or task.network.tensor_options())[0].itemsize
        whole = torch.long.itemsize
        sizes = [math.prod(n.shape) * (whole if n.name in fingerprint.integers else number) for n in self.nodes]
        apart = [devices[s] != devices[t] for s, t in zip(self.source.tolist(), self.target.tolist(), strict=True)]
        return np.where(apart, np.array(sizes, np.intp)[self.source], 0)

    @staticmethod
    def _mask(names: Iterable[str], place: dict[str, int]) -> Mask:
        mask = np.zeros(len(place), bool)
        mask[[place[name] for name in names]] = True
        return mask

    def _generations(self, order: list[int]) -> list[tuple[Positions, Mask]]:
        depth = dict.fromkeys(order, 0)
        incoming: dict[int, list[int]] = {position: [] for position in order}
        for source, target in zip(self.source.tolist(), self.target.tolist(), strict=True):
            if target in incoming:
                incoming[target].append(source)
        for position in order:
            depth[position] = max((depth[before] + 1 for before in incoming[position] if before in depth), default=0)
        members: list[list[int]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
        for position in order:
            members[depth[position]].append(position)
        return [(np.array(each, np.intp), np.isin(self.target, each)) for each in members]

    def any_of(self, edges: Mask, ends: Positions) -> Mask:
        """Nodes at these ends of these edges."""
        mask = np.zeros(len(self.nodes), bool)
        mask[ends[edges]] = True
        return mask

    def upstream(self, nodes: Mask, through: Mask | None = None) -> Mask:
        """Nodes of ``through``, by default the passing ones, among ``nodes`` or read by their predictions."""
        if not self.generations:
            return np.zeros_like(nodes)
        through = self.passing if through is None else through
        between, reached = through[self.source], nodes.copy()
        for generation, _ in reversed(self.generations):
            reached[generation] |= self.any_of(between & reached[self.target], self.source)[generation]
        found: Mask = reached & through
        return found

    def with_upstream(self, nodes: Mask) -> Mask:
        """These nodes, and the deterministic ones that their predictions read."""
        both: Mask = nodes | self.upstream(nodes, self.deterministic)
        return both

    def downstream(self, edges: Mask, nodes: Mask) -> Mask:
        """Nodes with an energy whose predictions change with these edges' contributions or nodes' transfers."""
        changed = nodes | self.any_of(edges, self.target)
        for generation, into in self.generations:
            changed[generation] |= self.any_of(into & self.between & changed[self.source], self.target)[generation]
        if self.generations:
            changed |= self.any_of(self.between & changed[self.source], self.target)
        return changed & self.energetic & ~self.following

    def learned(self, nodes: Mask) -> Mask:
        """Positions of the parameters that learn from the errors of these nodes."""
        learned = np.zeros(len(self.parameters), bool)
        learned[self.edge_used[nodes[self.target[self.edge_user]]]] = True
        learned[self.node_used[nodes[self.node_user]]] = True
        return learned


def masked(members: Positions, size: int) -> Mask:
    """The mask of these positions."""
    mask = np.zeros(size, bool)
    mask[members] = True
    return mask


def _uses(place: dict[int, int], parts: list[list[nn.Parameter]]) -> tuple[Positions, Positions]:
    """Pairs of a part's position and a trainable parameter's that it uses; ``place`` by the parameter's identity."""
    users = [position for position, part in enumerate(parts) for p in part if p.requires_grad]
    used = [place[id(p)] for part in parts for p in part if p.requires_grad]
    return np.array(users, np.intp), np.array(used, np.intp)

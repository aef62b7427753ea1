"""Which nodes are given, and what follows from it: who is free, in which order values start, when errors arrive."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import attrs
import networkx as nx

from pcsim.errors import ClampError, GraphError
from pcsim.graph.levels import components, levels_to
from pcsim.graph.network import Network
from pcsim.messages import listed


@attrs.frozen(slots=False, eq=False)
class Clamping:
    """A network together with the names of its clamped nodes (SPEC §1): all that is known before any tensor exists.

    Args:
        network: the network.
        full: nodes of which every unit is given.
        partial: nodes of which some units are given.
        backprop: treat every free node as deterministic (SPEC §4).
        predicting: treat free sinks whose energy has no minimum as deterministic: their value is what they predict.
        carried: free nodes that start at a given value instead of that of the forward pass.

    Raises:
        ClampError: a name is unknown, or a node cannot be clamped in this way.
        GraphError: a node's value is defined by nothing.
    """

    network: Network
    full: frozenset[str]
    partial: frozenset[str] = frozenset()
    backprop: bool = False
    predicting: bool = False
    carried: frozenset[str] = frozenset()

    def __attrs_post_init__(self) -> None:
        known = self.network.nodes
        for name in sorted(self.full | self.partial):
            if name not in known:
                raise ClampError(f"clamp {name!r}: no such node; the network has {listed(known)}")
        for name in sorted(self.partial):
            if known[name].deterministic:
                raise ClampError(
                    f"clamp {name!r}: a deterministic node has no latent to infer the rest of; clamp all of it, or "
                    "make it latent"
                )
            if self.backprop:
                raise ClampError(f"clamp {name!r}: backprop infers nothing, so it needs every unit; drop the mask")
        for name in self.deterministic:
            if not self.network.in_degree(name) and known[name].prior is None:
                raise GraphError(
                    f"node {name!r} has no incoming edge, no latent of its own here and no clamp, so nothing gives it "
                    "a value; clamp it, or add an edge into it"
                )

    @cached_property
    def deterministic(self) -> frozenset[str]:
        """Nodes whose value is their prediction: a node that is clamped has a value of its own instead."""
        return frozenset(
            name
            for name, node in self.network.nodes.items()
            if name not in self.full and (node.deterministic or self.backprop or self._only_predicted(name))
        )

    def _only_predicted(self, name: str) -> bool:
        node = self.network.nodes[name]
        drifts = self.predicting and node.predicted and not node.energy_function.has_minimum
        return drifts and name not in self.partial and not node.outgoing

    @cached_property
    def drifting(self) -> tuple[str, ...]:
        """Free nodes whose energy has no minimum, in insertion order."""
        nodes, energetic = self.network.nodes, frozenset(self.energetic)
        return tuple(name for name in self.free if name in energetic and not nodes[name].energy_function.has_minimum)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """Nodes that move, in insertion order; of a partially clamped node, its other units do."""
        return tuple(name for name in self.network.nodes if name not in self.full and name not in self.deterministic)

    @cached_property
    def energetic(self) -> tuple[str, ...]:
        """Nodes with an energy, in insertion order: predicted, and with a value of their own."""
        return tuple(
            name for name, node in self.network.nodes.items() if node.predicted and name not in self.deterministic
        )

    @cached_property
    def _gaussian(self) -> tuple[str, ...]:
        """Free nodes that are predicted, all of their units free, with a Gaussian energy."""
        found = (self.network.nodes[name] for name in self.free if name not in self.partial)
        return tuple(node.name for node in found if node.predicted and node.energy_function.gaussian)

    @cached_property
    def displaced(self) -> tuple[str, ...]:
        """Free nodes that start at their prediction, with a Gaussian energy: what moves such a node is kept apart from
        its value, and is its error as long as its prediction stays (SPEC §7).
        """
        return tuple(name for name in self._gaussian if name not in self.placed)

    @cached_property
    def following(self) -> tuple[str, ...]:
        """Free nodes whose values follow from their errors where those are relaxed: predicted."""
        return tuple(name for name in self.free if self.network.nodes[name].predicted)

    @cached_property
    def sequence(self) -> tuple[str, ...]:
        """All nodes, each after its sources, where no cycle is left; edges into clamped nodes do not count."""
        return tuple(name for component in self.components for name in component)

    @cached_property
    def place_in_sequence(self) -> Mapping[str, int]:
        """Place of each node in ``sequence``."""
        return {name: place for place, name in enumerate(self.sequence)}

    @cached_property
    def multiplied(self) -> tuple[str, ...]:
        """Free nodes that may carry a multiplier: predicted, with a Gaussian energy that counts."""
        return tuple(name for name in self._gaussian if self.network.nodes[name].energy_weight != 0)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Clamped nodes with incoming edges, in insertion order."""
        clamped = self.full | self.partial
        return tuple(name for name in self.network.nodes if name in clamped and self.network.in_degree(name))

    @cached_property
    def components(self) -> tuple[tuple[str, ...], ...]:
        """Components in the order in which values start; edges into clamped nodes do not count (SPEC §2, Start)."""
        kept = (edge for edge in self.network.edges.values() if edge.target_name not in self.full)
        return tuple(components(self.network, ((edge.source_name, edge.target_name) for edge in kept)))

    @cached_property
    def cyclic(self) -> frozenset[str]:
        """Nodes on a cycle that no clamp cuts: no feed-forward pass defines their values."""
        on_cycle = {name for component in self.components if len(component) > 1 for name in component}
        loops = {e.source_name for e in self.network.edges.values() if e.source_name == e.target_name}
        return frozenset(on_cycle | (loops - self.full))

    @cached_property
    def placed(self) -> frozenset[str]:
        """Free nodes to which no forward pass gives their value at the start: on a cycle, unpredicted, or carried."""
        nodes, apart = self.network.nodes, self.cyclic | self.carried
        return frozenset(name for name in self.free if name in apart or not nodes[name].predicted)

    @cached_property
    def feedforward(self) -> bool:
        """Whether one forward pass gives every value exactly: no cycle, no target, no root to infer (SPEC §2, Test)."""
        inferred_roots = [n for n in self.free if not self.network.nodes[n].predicted]
        return not self.cyclic and not self.targets and not inferred_roots

    @cached_property
    def deterministic_order(self) -> tuple[str, ...]:
        """Deterministic nodes, each after its deterministic sources."""
        inner, graph = self.deterministic, nx.DiGraph()
        graph.add_nodes_from(name for name in self.network.nodes if name in inner)
        ends = ((edge.source_name, edge.target_name) for edge in self.network.edges.values())
        graph.add_edges_from(both for both in ends if inner.issuperset(both))
        try:
            return tuple(nx.topological_sort(graph))
        except nx.NetworkXUnfeasible:
            cycle = " -> ".join(edge[0] for edge in nx.find_cycle(graph))
            raise GraphError(
                f"{cycle} is a cycle of deterministic nodes only, which has no value to start from; clamp or make "
                "latent one of its nodes (backprop treats every free node as deterministic and needs a network without "
                "cycles)"
            ) from None

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Deterministic nodes, each after its deterministic sources, then all others: the order of prediction.

        Reversed, it is the order in which errors pass through deterministic nodes.
        """
        return self.deterministic_order + tuple(n for n in self.network.nodes if n not in self.deterministic)

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Place of each node in ``order``."""
        return {name: place for place, name in enumerate(self.order)}

    @cached_property
    def levels(self) -> Mapping[str, int]:
        """Level of each node that reaches a target: the step at which an error arrives there (SPEC §2, Arrival)."""
        return levels_to(self.network, self.targets, self.deterministic)

"""From one graph to another: auxiliary nodes that make all paths between two nodes equally long (SPEC §5)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import attrs
import networkx as nx
from torch import nn

from pcsim.errors import GraphError, SettingError
from pcsim.graph.edge import Edge
from pcsim.graph.energy import LearnedPrecision
from pcsim.graph.levels import simple_graph
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.messages import is_number

AUXILIARY_NAME = re.compile(r"/aux[1-9]\d*$")


def balance_paths(
    net: Network,
    rate: float,
    *,
    peak: float = 1.0,
    targets: Sequence[Node | str] | None = None,
    share: bool = True,
) -> Network:
    """The same network with auxiliary nodes on every short path, so that no error arrives early (arXiv 2506.23800).

    An edge whose ends are more than one level apart gets one node for every latent hop that it lacks: level(source) −
    level(target) − 1 of them into a latent node, level(source) − level(target) into a deterministic one. The edge's
    module and gain stay on its first hop; the other hops are identities. A node that is predicted by an identity has
    weight 1/(rate · peak): with plain gradient descent and precision ``peak`` at the arrival it hands its whole
    displacement to its source in one step and clears itself, a pure delay. A node that is predicted by a module of
    the edge's own has weight 1. The delay is not exact with Nesterov momentum, and under a constant precision chains
    of such nodes diverge: use a spiking or decaying schedule.

    The forward pass is that of the given network. An edge with a module of its own keeps its name on the first hop,
    so that the two networks load each other's ``state_dict``; an identity edge keeps it on the last. Auxiliary nodes
    are named ``<edge>/aux1``, ``<edge>/aux2``, ... from the source on (:func:`is_auxiliary`).

    Args:
        net: a network without cycles; it stays as it is.
        rate: of the relaxation that the result is meant for, > 0.
        peak: precision at the arrival of an error, > 0: 1/rate with ``Spiking.for_rate(rate)``.
        targets: the nodes that will be clamped as targets, from which levels count; the sinks by default. Edges that
            lead to none of them, and those that leave them, stay as they are.
        share: let identity edges with the same source and gain share one chain, each leaving it where it has been
            delayed enough. With spiking(alpha=0) and plain gradient descent this is exactly equal to chains of their
            own. Otherwise the edges' targets read from the shared nodes what the other targets have displaced them by
            (as they do in the given network, where all of them read the source).

    Returns:
        A new network that shares modules and parameters with the given one; precisions and priors that are no
        parameters are copied.

    Raises:
        GraphError: the network has a cycle, or a target is not in it.
        SettingError: the rate or the peak is not positive.
    """
    if not is_number(rate) or rate <= 0:
        raise SettingError(f"balance_paths: rate {rate!r} given, expected the positive rate of the relaxation")
    if not is_number(peak) or peak <= 0:
        raise SettingError(
            f"balance_paths: peak {peak!r} given, expected the positive precision of the relaxation at the arrival"
        )
    weight = 1.0 / (rate * peak)
    _refuse_cycles(net)
    lacking = _lacking_hops(net, targets)
    routes = _routes(net, lacking, share)
    balanced = Network()
    for node in net.nodes.values():
        for edge in node.incoming:
            _add_auxiliaries(balanced, edge, routes.get(edge.name), weight)
        add_copy(balanced, node)
    for edge in net.edges.values():
        _add_hops(balanced, edge, routes.get(edge.name))
    if net.places:
        delays = {aux: net.edges[name].target for name, route in routes.items() for aux in route.names}
        places = {**delays, **net.nodes}
        balanced.place({name: node.device for name, node in places.items() if node.device is not None})
    return balanced


def is_auxiliary(node: Node) -> bool:
    """Whether a node was put on a short path by :func:`balance_paths`, by its name."""
    return AUXILIARY_NAME.search(node.name) is not None


@attrs.frozen
class _Route:
    """The auxiliary nodes on an edge's way, from its source on; edges with the same chain share their first nodes."""

    chain: str
    length: int

    @property
    def names(self) -> list[str]:
        return [f"{self.chain}/aux{place}" for place in range(1, self.length + 1)]


def _refuse_cycles(net: Network) -> None:
    graph = simple_graph(net, ((edge.source_name, edge.target_name) for edge in net.edges.values()))
    if nx.is_directed_acyclic_graph(graph):
        return
    cycle = [edge[0] for edge in nx.find_cycle(graph)]
    raise GraphError(
        f"balance_paths: {' -> '.join((*cycle, cycle[0]))} is a cycle, and on a cycle no path is the longest; remove "
        "one of its edges, or leave this network as it is"
    )


def _lacking_hops(net: Network, targets: Sequence[Node | str] | None) -> dict[str, int]:
    levels = net.levels(targets)
    chosen = net.sinks() if targets is None else targets
    ends = {target if isinstance(target, str) else target.name for target in chosen}
    lacking = {}
    for edge in net.edges.values():
        if edge.source_name in ends or edge.target_name not in levels:
            continue
        # A clamped deterministic node has a value of its own, so an edge into it is a latent hop.
        passes_through = edge.target.deterministic and edge.target_name not in ends
        apart = levels[edge.source_name] - levels[edge.target_name]
        lacking[edge.name] = apart - (0 if passes_through else 1)
    return {name: count for name, count in lacking.items() if count}


def _routes(net: Network, lacking: dict[str, int], share: bool) -> dict[str, _Route]:
    # When one chain equals several: messages add up and identities are linear, so a shared node receives and hands on
    # the sum of what the separate ones would (SPEC §2). What differs is what the targets read from it, the sum of the
    # displacements instead of each its own. They do not read it where their precision is zero while it is displaced:
    # spiking(alpha=0), since they have been active one step before; and it is back at its prediction one step later, by
    # rate · peak · weight = 1 without momentum, so that a rule which reads the relaxed state sees no difference either.
    chains: dict[Hashable, str] = {}
    taken: set[str] = set()
    routes = {}
    for name, length in lacking.items():
        edge = net.edges[name]
        shared = share and _is_identity(edge)
        key: Hashable = (edge.source_name, edge.gain) if shared else name
        if key not in chains:
            chain = name
            while chain in taken or f"{chain}/aux1" in net.nodes:
                chain += "'"
            chains[key] = chain
            taken.add(chain)
        routes[name] = _Route(chains[key], length)
    return routes


def _is_identity(edge: Edge) -> bool:
    return type(edge.module) is nn.Identity


def _add_auxiliaries(balanced: Network, edge: Edge, route: _Route | None, weight: float) -> None:
    for place, name in enumerate(route.names if route else ()):
        if name not in balanced:
            own = 1.0 if place == 0 and not _is_identity(edge) else weight
            balanced.add_node(name, edge.contribution_shape, energy_weight=own)


def add_copy(network: Network, node: Node) -> None:
    """Add a node like one of another network, with its modules and parameters, without its edges."""
    copied = network.add_node(
        node.name,
        node.shape,
        transfer=node.transfer,
        combine=node.combine,
        energy=node.energy_function,
        energy_weight=node.energy_weight,
        precision=node.own_precision if node.log_precision is None else LearnedPrecision(),
        deterministic=node.deterministic,
        prior=node.prior,
        constant=node.constant,
    )
    if node.log_precision is not None:
        copied.log_precision = node.log_precision


def _add_hops(balanced: Network, edge: Edge, route: _Route | None) -> None:
    """The hops of one edge; the last is added in the edge's own turn, since combining may depend on the order."""
    if route is None:
        balanced.add_edge(edge.source_name, edge.target_name, edge.module, gain=edge.gain, name=edge.name)
        return
    identity = _is_identity(edge)
    first, *others = route.names
    if not balanced.in_degree(first):
        balanced.add_edge(edge.source_name, first, edge.module, gain=edge.gain, name=None if identity else edge.name)
    last = first
    for name in others:
        if not balanced.in_degree(name):
            balanced.add_edge(last, name)
        last = name
    balanced.add_edge(last, edge.target_name, name=edge.name if identity else None)

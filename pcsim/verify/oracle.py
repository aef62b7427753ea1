"""The energy as one differentiable function of everything: the oracle of the local rules.

Nothing here is local, and nothing of the engines is used: F_t is written down as in SPEC §1, deterministic nodes are
substituted, and autograd does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import networkx as nx
import torch
from torch import Tensor

from pcsim.graph.energy import Energy
from pcsim.graph.network import Network
from pcsim.verify.case import Case, fully_clamped

Factor = Tensor | float
Objective = Callable[[Energy, Tensor, Tensor, Factor], Tensor]
"""From a node's energy, value, prediction, (batch, *shape), and π w to what is summed."""


def predictions(network: Network, activity: Mapping[str, Tensor], deterministic: Collection[str]) -> dict[str, Tensor]:
    """u_n of every predicted node, differentiable in ``activity`` and in all parameters, (batch, *shape).

    Args:
        network: the graph.
        activity: what the edges read, by node name, (batch, *shape); of deterministic nodes it is not used.
        deterministic: names of the nodes whose value is their prediction.
    """
    batch = len(next(iter(activity.values())))
    through = nx.DiGraph(network.to_networkx().subgraph(deterministic))
    value = {name: tensor for name, tensor in activity.items() if name not in deterministic}
    found: dict[str, Tensor] = {}
    for name in (*nx.topological_sort(through), *(n for n in network.nodes if n not in deterministic)):
        node = network.nodes[name]
        if node.incoming:
            given = [edge.gain * edge.module(value[edge.source_name]) for edge in node.incoming]
            found[name] = node.transfer(node.combine(*given))
        elif node.prior is not None:
            found[name] = node.prior.expand(batch, *node.shape)
        if name in deterministic:
            value[name] = found[name]
    return found


def energetic(network: Network, deterministic: Collection[str]) -> list[str]:
    """Names of the nodes with an energy: predicted, and with a value of their own."""
    return [name for name, node in network.nodes.items() if node.predicted and name not in deterministic]


def own_precision(network: Network, name: str) -> Factor:
    """The node's own precision, differentiable where it is learned: a number, 0-d or (*shape)."""
    node = network.nodes[name]
    return node.own_precision if node.log_precision is None else node.log_precision.exp()


def total_energy(
    network: Network,
    value: Mapping[str, Tensor],
    deterministic: Collection[str],
    factors: Mapping[str, float] | None,
    *,
    activity: Mapping[str, Tensor] | None = None,
    only: Collection[str] | None = None,
    objective: Objective | None = None,
) -> Tensor:
    """F = Σ π w E over nodes, units and samples, with −½ w log π where the precision is learned, 0-d.

    Args:
        network: the graph.
        value: v_n, by name, (batch, *shape).
        deterministic: names of the nodes whose value is their prediction.
        factors: the schedule's factor by node; None leaves precision out altogether.
        activity: what the edges read where that is not ``value``.
        only: names of the nodes whose energies count; all by default.
        objective: in place of π w E of each node, from its energy, value, prediction and π w.
    """
    predicted = predictions(network, value if activity is None else activity, deterministic)
    batch = len(next(iter(value.values())))
    total = torch.zeros((), dtype=torch.float64)
    for name in energetic(network, deterministic):
        if only is not None and name not in only:
            continue
        node = network.nodes[name]
        precision = 1.0 if factors is None else factors[name] * own_precision(network, name)
        of, scale = (node.energy_function, value[name], predicted[name]), node.energy_weight * precision
        total = total + (scale * of[0].unit_energy(*of[1:]) if objective is None else objective(*of, scale)).sum()
        if factors is not None and node.log_precision is not None:
            total = total - 0.5 * node.energy_weight * batch * node.log_precision.expand(node.shape).sum()
    return total


def moving_of(case: Case, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What moves of each free node at a state: its value, or, where errors are relaxed, its error, (batch, *shape).

    Args:
        case: the network, and how it is relaxed.
        state: v_n of every node, (batch, *shape).
    """
    predicted = predictions(case.network, state, case.deterministic) if case.relaxation.relaxes_errors else {}
    return {name: (state[name] - predicted[name] if name in predicted else state[name]).detach() for name in case.free}


def values_of(case: Case, state: Mapping[str, Tensor], moving: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values where what moves is given, differentiable in it, (batch, *shape); in error coordinates v = u + ε.

    Args:
        case: the network, and how it is relaxed.
        state: v_n of the nodes that are given.
        moving: of each free node, as of :func:`moving_of`.
    """
    if not case.relaxation.relaxes_errors:
        return {**state, **moving}
    network, full = case.network, fully_clamped(case.clamps)
    kept = nx.DiGraph((e.source_name, e.target_name) for e in network.edges.values() if e.target_name not in full)
    kept.add_nodes_from(network.nodes)
    value = {name: state[name] for name in full}
    for name in nx.topological_sort(kept):
        node = network.nodes[name]
        if name in full:
            continue
        if node.incoming:
            given = [edge.gain * edge.module(value[edge.source_name]) for edge in node.incoming]
            prediction = node.transfer(node.combine(*given))
        else:
            prediction = torch.zeros(()) if node.prior is None else node.prior
            prediction = prediction.to(torch.float64).expand(case.batch, *node.shape)
        own = prediction if name in case.deterministic else prediction + moving[name]
        value[name] = own if name in case.deterministic else torch.where(case.free_units(name), own, state[name])
    return value


def brute_force_levels(network: Network, targets: Collection[str], deterministic: Collection[str]) -> dict[str, int]:
    """Latent hops along the longest path to a target, by walking every path (SPEC §2, Arrival).

    For small graphs without cycles only.
    """
    longest: dict[str, int] = {}

    def walk(name: str, hops: int) -> None:
        longest[name] = max(longest.get(name, 0), hops)
        for edge in network.incoming(name):
            if edge.source_name not in targets:
                walk(edge.source_name, hops + (name not in deterministic))

    for target in targets:
        walk(target, 0)
    return longest

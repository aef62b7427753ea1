"""What goes wrong in a deep network, in numbers: energy by level, its imbalance, the error's front, the updates.

The figures of these numbers are in :mod:`pcsim.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs
import torch
from torch import Tensor, nn

from pcsim.clamps import Clamps, read
from pcsim.dynamics.learning import Backprop
from pcsim.engine.landscape import Landscape
from pcsim.engine.problem import Gradients
from pcsim.errors import SettingError, StateError
from pcsim.graph.combining import Sum
from pcsim.graph.edge import Edge
from pcsim.graph.energies import OfDifference
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.profiling import Profile as Profile
from pcsim.profiling import profile as profile
from pcsim.random_state import random_state_kept
from pcsim.simulator import Simulator
from pcsim.trace import Trace


def level_energies(trace: Trace) -> Tensor:
    """E_n summed over the nodes of a level and averaged over the batch, (steps + 1, levels), float64 on the CPU.

    Level 0 holds the targets (SPEC §2, Arrival).

    Raises:
        StateError: the trace holds no energies.
        SettingError: no node with an energy reaches a target.
    """
    return _by_level(trace, trace.energies)


def level_errors(trace: Trace) -> Tensor:
    """‖ε‖ over the units and nodes of a level, root mean square over the batch, (steps + 1, levels), as above.

    Raises:
        StateError, SettingError: as :func:`level_energies`.
    """
    norms = trace.error_norms
    return _by_level(trace, None if norms is None else norms.square()).sqrt()


def imbalance(trace: Trace) -> Tensor:
    """The largest energy of a level over the smallest, by step, (steps + 1,), at least 1; infinite while one has none.

    Raises:
        StateError, SettingError: as :func:`level_energies`.
    """
    energies = level_energies(trace)
    occupied = energies[:, sorted({trace.levels[name] for name in trace.nodes if name in trace.levels})]
    return occupied.amax(1) / occupied.amin(1)


def arrivals(trace: Trace, *, above: float = 0.0) -> dict[int, int]:
    """The first step before which a level's energy per sample exceeds ``above``, by level; without those it never does.

    With a feed-forward start and paths of equal lengths, the error arrives at each level at the step of its number.

    Raises:
        StateError, SettingError: as :func:`level_energies`.
    """
    reached = level_energies(trace) > above
    return {level: int(column.nonzero()[0]) for level, column in enumerate(reached.T) if bool(column.any())}


def update_similarity(simulator: Simulator, clamps: Clamps) -> dict[str, float]:
    """The cosine between the gradient that an edge's weights learn from and backprop's on the same graph.

    Weights, their ``.grad``, running statistics, modes and the random state stay as they are; nodes and edges show the
    simulator's relaxed state. Random draws are the same for both.

    Args:
        simulator: with a rule that learns after the relaxation.
        clamps: what is given, a target among it.

    Returns:
        By the name of each edge with parameters, −1 to 1; NaN where either gradient is zero or no error arrived.

    Raises:
        PCError: as :meth:`Simulator.infer` and :meth:`Simulator.gradients`; the network has a cycle, for backprop.
    """
    if simulator.rule.every_step:
        raise StateError(
            f"update_similarity: {type(simulator.rule).__name__} learns at every inference step; compare a "
            "rule that learns after it"
        )
    network = simulator.network
    backprop = Simulator(network, rule=Backprop(), engine=type(simulator.engine))
    with random_state_kept():
        backprop.infer(clamps)
        exact = {parameter: gradient.clone() for parameter, gradient in backprop.gradients().items()}
    with random_state_kept():
        simulator.infer(clamps)
        own = simulator.gradients()
    return {
        name: _cosine(edge, own, exact) for name, edge in network.edges.items() if any(True for _ in edge.parameters())
    }


@attrs.frozen
class Outliers:
    """How many outliers a relaxation leaves to a robust energy.

    Args:
        forward: units whose error of the forward pass is more than twice what the energy begins to call outlying
            (``outlying``: the Laplace's width, Huber's threshold, √ν of Student's t).
        relaxed: those of them whose error is still outlying after the relaxation.
    """

    forward: int
    relaxed: int

    @property
    def absorbed(self) -> bool:
        """Whether fewer than one in ten are left, so that the energy tells next to none of them from the rest."""
        return 10 * self.relaxed < self.forward


def outliers(simulator: Simulator) -> dict[str, Outliers]:
    """What the latest relaxation has left of the outliers at targets with a robust energy, by node name.

    Latents explain a part of every error away. In a linear network with Gaussian latents and one target of precision
    π an error r is left as r/S at rest, S = 1 + π Σ J Jᵀ over the latents, J = ∂u/∂v; so a Huber energy of threshold
    δ acts on r as one of S δ does (its Moreau envelope), and what learns from the relaxed errors learns from outliers
    as from other samples. Rules that learn from errors of the forward pass, or as they arrive, do not.

    Only networks where every free node starts at its prediction from what is given have such outliers: where causes
    are still to be inferred, an error of the forward pass is none of the data's.

    Raises:
        StateError: nothing was inferred.
    """
    state = simulator.engine.shown
    if state is None:
        raise StateError("outliers needs a relaxed state: call infer first")
    clamping, nodes, found = state.task.clamping, simulator.network.nodes, dict[str, Outliers]()
    if clamping.cyclic or any(not nodes[name].incoming for name in clamping.free):
        return found
    for name in clamping.targets:
        node = nodes[name]
        energy, mask = node.energy_function, state.batch.given(name)
        bound = energy.outlying if isinstance(energy, OfDifference) else None
        if bound is not None:
            clear = (node.value - node.forward_prediction).abs() > 2 * bound
            clear = clear if mask is None else clear & mask
            left = clear & (node.error.abs() > bound)
            found[name] = Outliers(int(clear.sum()), int(left.sum()))
    return found


@attrs.frozen
class Curvature:
    """How the energy curves where it rests, and how far a relaxation comes (SPEC §10).

    Args:
        smallest: eigenvalue of the Hessian in the free values; negative at a saddle.
        largest: eigenvalue of it.
        safe_rate: 2 / largest: plain gradient descent near the rest converges below it, and diverges above.
        progress: 1 − ‖v_T − v*‖ / ‖v_0 − v*‖: how much of the way from the start to the rest the T steps go.
        rate: of the relaxation; NaN where it moves otherwise than by rate · descent, and the safe rate is another.
    """

    smallest: float
    largest: float
    safe_rate: float
    progress: float
    rate: float = math.nan

    @property
    def verdict(self) -> str:
        """The regime in words: weights that learn from it learn nearly as by backprop, or from a settled state."""
        if self.rate > self.safe_rate:
            return f"unsafe: at rate {self.rate:.3g}, above {self.safe_rate:.3g}, more steps lead away from the rest"
        if math.isnan(self.progress):
            return "at rest from the start"
        if self.progress < 0:
            return "away from the rest: the relaxation ends further off than it starts"
        if self.progress < 0.3:
            return "backprop-like: the latents hardly leave the forward pass"
        return "at rest" if self.progress > 0.95 else "on the way to the rest"

    def __str__(self) -> str:
        return (
            f"curvature {self.smallest:.3g} to {self.largest:.3g}, safe rates below {self.safe_rate:.3g}; "
            f"{self.progress:.0%} of the way to rest: {self.verdict}"
        )


def curvature(simulator: Simulator, clamps: Clamps, *, tolerance: float | None = None) -> Curvature:
    """The Hessian of the energy in the free values at its rest, and how far the simulator's relaxation comes.

    Nodes and edges show the relaxed state afterwards.

    Args:
        simulator: whose network and relaxation are looked at.
        clamps: what is given.
        tolerance: of the rest, as of :meth:`Simulator.equilibrium`.

    Raises:
        PCError: as :meth:`Simulator.equilibrium` and :meth:`Simulator.infer`; no node is free, or errors are relaxed.
    """
    if simulator.relaxation.relaxes_errors:
        raise SettingError(
            f"curvature: {type(simulator.relaxation).__name__} moves errors, in which the energy curves otherwise than "
            "in the values; give a simulator with Relaxation"
        )
    simulator.equilibrium(clamps, tolerance=tolerance)
    rest = simulator._require("a curvature")
    landscape = Landscape(rest)
    if not len(landscape.start):
        raise StateError("curvature: no unit is free with these clamps, so the energy has nothing to curve in")
    smallest, largest = landscape.curvature(landscape.start)
    simulator.infer(clamps)
    free = [node for node in simulator.network.nodes.values() if node.name in rest.task.clamping.free]
    whole = gone = 0.0
    for node in free:
        at_rest = rest.batch.start[node.name]
        gone += float((node.value - at_rest).double().square().sum())
        whole += float((node.forward_value - at_rest).double().square().sum())
    progress = 1 - math.sqrt(gone / whole) if whole > 0 else math.nan
    rate = simulator.relaxation.rate if simulator.relaxation.plain else math.nan
    return Curvature(smallest, largest, 2 / largest if largest > 0 else math.inf, progress, rate)


def chain_energy_at_rest(network: Network, clamps: Clamps) -> Tensor:
    """F where a linear Gaussian chain rests between its clamped ends, in closed form, (batch,).

    ½ rᵀ S⁻¹ r, with r the gap between the target and its forward prediction, and S the covariance that the precisions
    of all nodes on the way leave it, carried forward by the edges (Innocenti et al., arXiv 2408.11979, here with
    precisions and weights). :meth:`Simulator.equilibrium` finds the same by iteration, on any network.

    Args:
        network: nodes in a row, joined by identities and ``nn.Linear``, without other transfers, combinations and
            energies.
        clamps: all of the first node and of the last.

    Raises:
        SettingError: the network is another; names the node or edge.
    """
    nodes = list(network.nodes.values())
    row = [next((node for node in nodes if not node.incoming), nodes[0])]
    while row[-1].outgoing and len(row) <= len(nodes):
        row.append(row[-1].outgoing[0].target)
    still = "an energy at rest is that of one clamp"
    fits, _, _ = read(network, clamps, network.fingerprint(), still)
    ends = {name for name, clamp in fits.items() if clamp.mask is None}
    alone = len(row) == len(nodes) > 1 and len(network.edges) == len(nodes) - 1
    if not alone or {row[0].name, row[-1].name} != ends or len(fits) != 2:
        raise SettingError(
            f"chain_energy_at_rest: expected a chain clamped at both ends and nowhere else, given {len(nodes)} nodes "
            f"of which {', '.join(map(repr, fits))} are clamped; use Simulator.equilibrium for other networks"
        )
    value = fits[row[0].name].value
    spread = value.new_zeros(value[0].numel(), value[0].numel())
    for node in row[1:]:
        weight, bias = _linear_step(node, value)
        value, spread = value.flatten(1) @ weight.mT + bias, weight @ spread @ weight.mT
        if not node.deterministic or node is row[-1]:
            own = node.energy_weight * torch.as_tensor(node.own_precision, dtype=value.dtype, device=value.device)
            spread = spread + torch.diag(1 / own.detach().expand(node.shape).flatten())
    gap = fits[row[-1].name].value.to(value.device).flatten(1) - value
    solved: Tensor = torch.linalg.solve(spread, gap.mT).mT
    return 0.5 * (gap * solved).sum(1)


def _linear_step(node: Node, like: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix and the shift by which a node of a chain is predicted."""
    edge = node.incoming[0]
    module, shape = edge.module, edge.source.shape
    mend = "; use Simulator.equilibrium for other networks"
    if type(node.transfer) is not nn.Identity or type(node.combine) is not Sum or not node.energy_function.gaussian:
        raise SettingError(
            f"chain_energy_at_rest: node {node.name!r} is not predicted by its edge alone, with the Gaussian energy"
            + mend
        )
    if type(module) is nn.Identity:
        return edge.gain * torch.eye(math.prod(shape), dtype=like.dtype, device=like.device), like.new_zeros(())
    if type(module) is not nn.Linear or len(shape) != 1:
        raise SettingError(f"chain_energy_at_rest: edge {edge.name!r} is a {type(module).__name__}, no nn.Linear{mend}")
    bias = module.bias.detach() if module.bias is not None else module.weight.new_zeros(())
    return edge.gain * module.weight.detach().to(like.device), edge.gain * bias.to(like.device)


def _cosine(edge: Edge, own: Gradients, exact: Gradients) -> float:
    parameters = [parameter for parameter in edge.parameters() if parameter in own and parameter in exact]
    if not parameters:
        return math.nan
    one, other = (_flat(gradients[parameter] for parameter in parameters) for gradients in (own, exact))
    lengths = one.norm() * other.norm()
    return float(one @ other / lengths) if lengths > 0 else math.nan


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    # In float64, since the squares of gradients that have shrunk with depth would vanish in float32.
    return torch.cat([tensor.detach().to("cpu", torch.float64).flatten() for tensor in tensors])


def _by_level(trace: Trace, recorded: Tensor | None) -> Tensor:
    if recorded is None:
        raise StateError("this trace holds no energies: ask for them with infer(..., record=True)")
    reached = [index for index, name in enumerate(trace.nodes) if name in trace.levels]
    if not reached:
        raise SettingError("no node with an energy reaches a clamped target, so there are no levels; clamp a target")
    levels = torch.tensor([trace.levels[trace.nodes[index]] for index in reached])
    means = recorded.detach().to("cpu", torch.float64).mean(2)[:, reached]
    return means.new_zeros(len(means), int(levels.max()) + 1).index_add_(1, levels, means)

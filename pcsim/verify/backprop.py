"""Local updates equal backpropagation's."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pcsim.clamps import Clamps
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import ArrivalUpdate, LearningRule
from pcsim.dynamics.precision import Spiking
from pcsim.errors import GraphError
from pcsim.graph.network import Network
from pcsim.random_state import random_state_kept
from pcsim.verify.case import Case, EngineChoice, fully_clamped, given_units, given_value, in_float64
from pcsim.verify.comparing import compare, largest
from pcsim.verify.oracle import predictions
from pcsim.verify.shrinking import report

ROUNDING = 64
"""Units in the last place of the largest gradient by which any other may differ."""
RATE = 0.5
"""Of the relaxation that is checked by default."""


@random_state_kept()
def check_backprop_agreement(
    network: Network,
    clamps: Clamps,
    relaxation: Relaxation | None = None,
    rule: LearningRule | None = None,
    *,
    engine: EngineChoice = "batched",
    tolerance: float = 1e-9,
) -> None:
    """The gradients that a local rule leaves are backprop's, of every parameter (SPEC §10).

    Backprop's are those of the targets' energies, π left out, over the batch size, by autograd on the whole network
    with every free node put in for its prediction. By default the arrival rule is checked with held predictions and
    with rate · precision = 1 at the arrival, where it is exact on every graph without cycles. Give a relaxation
    without ``hold_predictions`` for a network whose paths are balanced (:func:`pcsim.balance_paths`). Precisions and
    weights of free nodes have to be 1 for that, those of auxiliary nodes 1/(rate · peak).

    Args:
        network: a graph without cycles; a copy is used, in float64.
        clamps: what is given, at least one node with incoming edges among it.
        relaxation: how errors travel; by default long enough for each to arrive.
        rule: the learning rule; :class:`pcsim.ArrivalUpdate` by default.
        engine: what is checked.
        tolerance: relative to the largest number in the gradients of each node's or edge's parameters.

    Raises:
        AssertionError: a gradient differs; names the parameter and the node that it belongs to or leads into, and
            prints the smallest network found on which it does, as code that fails again.
        GraphError: the network has a cycle, no target is given, or a node that predicts others is given in part.
    """
    rule = ArrivalUpdate() if rule is None else rule
    case = in_float64(network, clamps, relaxation, rule)
    if not any(case.network.in_degree(name) for name in case.clamps):
        raise GraphError("check_backprop_agreement: no node with incoming edges is clamped, so there is no target")
    for name, clamp in case.clamps.items():
        if isinstance(clamp, tuple) and case.network[name].outgoing:
            raise GraphError(
                f"check_backprop_agreement: {name!r} is clamped in part and predicts other nodes, which backprop knows "
                "nothing of; clamp all of it, or only sinks in part"
            )
    if relaxation is None:
        steps = max(case.levels.values()) + 1
        relaxation = Relaxation(steps, RATE, precision=Spiking.for_rate(RATE), hold_predictions=True)
        case = attrs.evolve(case, relaxation=relaxation)
    report(_check, case, check_backprop_agreement, {"engine": engine, "tolerance": tolerance})


def backprop_gradients(case: Case) -> dict[str, Tensor]:
    """Gradients of the targets' energies, over the batch size, by parameter name; zero where there is none."""
    network, full = case.network, fully_clamped(case.clamps)
    inner = frozenset(name for name in network.nodes if name not in full)
    given = {name: given_value(clamp) for name, clamp in case.clamps.items() if name in full}
    free_roots = [network[name] for name in inner if not network[name].predicted]
    roots = {node.name: torch.zeros(case.batch, *node.shape, dtype=torch.float64) for node in free_roots}
    predicted = predictions(network, given | roots, inner - roots.keys())
    total = torch.zeros((), dtype=torch.float64)
    for name, clamp in case.clamps.items():
        node = network[name]
        if node.predicted:
            value = torch.where(given_units(clamp), given_value(clamp), predicted[name].detach())
            total = total + node.energy_weight * node.energy_function.unit_energy(value, predicted[name]).sum()
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not total.requires_grad:
        return {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient / case.batch
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }


def _check(case: Case, engine: EngineChoice, tolerance: float) -> None:
    expected = backprop_gradients(case)
    simulator = case.simulator(engine)
    simulator.infer(case.clamps)
    simulator.compute_gradients()
    precisions = {id(n.log_precision) for n in case.network.nodes.values() if n.log_precision is not None}
    rounding = ROUNDING * torch.finfo(torch.float64).eps * largest(*expected.values())
    for part in (*case.network.nodes.values(), *case.network.edges.values()):
        named = {
            name: parameter
            for name, parameter in part.named_parameters(f"{part.kind}s.{part.name}")
            if name in expected and id(parameter) not in precisions
        }
        # Of the whole part, and no less than makes rounding of the largest gradient count: what comes before a batch
        # normalisation may have a gradient of nothing but rounding.
        size = max(largest(*(expected[name] for name in named)), rounding / tolerance) or 1.0
        for name, parameter in named.items():
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            what = f"{type(case.rule).__name__}: gradient of {name!r} over the part's largest, {size:.3g}"
            compare(what, got / size, expected[name] / size, tolerance, 1.0, case)

"""Updates are local: in space, a node's neighbourhood; in time, the present state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from pcsim.clamps import Clamps
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import LearningRule
from pcsim.errors import SettingError
from pcsim.graph.network import Network
from pcsim.random_state import random_state_kept
from pcsim.verify.case import Case, EngineChoice, in_float64
from pcsim.verify.comparing import compare, largest
from pcsim.verify.oracle import energetic, own_precision, predictions
from pcsim.verify.restart import OneStep, clamped_onto, random_state, trajectory
from pcsim.verify.rules import check_rule, shifted
from pcsim.verify.shrinking import report


@random_state_kept()
def check_locality(
    network: Network,
    clamps: Clamps,
    relaxation: Relaxation | None = None,
    rule: LearningRule | None = None,
    *,
    engine: EngineChoice = "batched",
    tolerance: float = 1e-12,
    seed: int = 0,
) -> None:
    """A node's update reads its neighbourhood only, and the present state only; so does what its edges learn.

    Space: from a random state, all values, clamps and parameters outside the neighbourhood of each free node are
    changed, and its displacement must stay. The neighbourhood of a node is itself, what predicts it, what it predicts,
    and what else predicts that; deterministic nodes between count as part of the edges. Time: a relaxation started
    from a state that another one has reached must continue as that one does.

    Where predictions are held, each node keeps its own forward prediction as part of its state. Every update is then
    compared with what follows from the present values and the forward values of the neighbourhood alone, all others
    put to NaN.

    Learning: what a rule hands to a node's edges must stay where other samples, what other nodes show, all weights, or
    what was asked before are changed, the gradients of a node's edges where the nodes beyond them are, and those of a
    rule that learns at every step where the inputs of a later step are.

    Args:
        network: the graph; a copy is used. What it shows, and its weights, are other ones while the rule is asked.
        clamps: what is given.
        relaxation: rate, steps and schedule.
        rule: the learning rule, any of a user's own; none is checked by default.
        engine: what is checked.
        tolerance: relative to the largest number compared, and at least to 1.
        seed: of the random state and the random changes.

    Raises:
        AssertionError: an update changed; names the node, and prints the smallest network found that fails, as code
            that fails again. So it is with :class:`ErrorRelaxation` on every network of more than two hops.
        SettingError: the relaxation has momentum, with which an update depends on the past by design.
    """
    case = in_float64(network, clamps, relaxation, rule)
    if case.relaxation.momentum:
        raise SettingError(
            f"check_locality: momentum {case.relaxation.momentum} given, with which an update depends on the past by "
            "design; set it to 0"
        )
    report(
        _check,
        case,
        check_locality,
        {"engine": engine, "tolerance": tolerance, "seed": seed},
        "net, clamps, relaxation" if rule is None else "net, clamps, relaxation, rule",
        watched=() if rule is None else (network,),
    )


def _check(case: Case, engine: EngineChoice, tolerance: float, seed: int, watched: Sequence[Network]) -> None:
    if watched:
        check_rule(case, (case.network, *watched), engine, tolerance, seed)
    if case.relaxation.hold_predictions:
        _check_held(case, engine, tolerance)
        return
    _check_time(case, engine, tolerance)
    _check_space(case, engine, tolerance, seed)


def _check_time(case: Case, engine: EngineChoice, tolerance: float) -> None:
    states = trajectory(case, engine)
    for step in range(case.relaxation.steps):
        restarted = OneStep(case, step, engine).values_after(states[step], case.clamps)
        for name, expected in states[step + 1].items():
            what = f"node {name!r}: its value after step {step}, restarted from the state before it"
            compare(what, restarted[name], expected, tolerance, largest(states[step][name], expected), case)


def _check_space(case: Case, engine: EngineChoice, tolerance: float, seed: int) -> None:
    state, step = random_state(case, seed), OneStep(case, None, engine)
    expected = step.values_after(clamped_onto(case, state), case.clamps)
    elsewhere = random_state(case, seed + 1)
    for name in case.free:
        inside = _neighbourhood(case, name)
        outside = [other for other in case.network.nodes if other not in inside]
        parameters = _parameters_beyond(case, name, inside)
        if not outside and not parameters:
            continue
        clamps = case.clamps | {o: _given_instead(case.clamps[o], elsewhere[o]) for o in outside if o in case.clamps}
        changed = attrs.evolve(case, clamps=clamps)
        with shifted(parameters):
            start = clamped_onto(changed, state | {other: elsewhere[other] for other in outside})
            moved = step.values_after(start, clamps)
        what = f"node {name!r}: its value after one step, with {outside} and parameters beyond its edges changed"
        compare(what, moved[name], expected[name], tolerance, largest(expected[name], state[name]), case)


def _check_held(case: Case, engine: EngineChoice, tolerance: float) -> None:
    states = trajectory(case, engine)
    for step in range(case.relaxation.steps):
        for name in case.free:
            descent = _held_descent(case, states[0], states[step], name, case.factors(step))
            before, after, units = states[step][name], states[step + 1][name], case.free_units(name)
            expected = before + case.relaxation.rate * descent
            what = f"node {name!r}: its value after step {step}, from the present and forward values about it"
            compare(what, after[units], expected[units], tolerance, largest(before, after), case)


def _held_descent(
    case: Case, forward: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str, factors: Mapping[str, float]
) -> Tensor:
    """−∂F_t/∂v of a node by what lies about it, at predictions and Jacobians of the forward values."""
    network, inside = case.network, _neighbourhood(case, name)
    unknown = {n: torch.full_like(v, torch.nan) if v.is_floating_point() else v * 0 for n, v in forward.items()}
    known = {n: v if n in inside else unknown[n] for n, v in forward.items()}
    leaf = known[name].clone().requires_grad_()
    predicted = predictions(network, {**known, name: leaf}, case.deterministic)
    sent, own = leaf.new_zeros(()), torch.zeros_like(leaf)
    for centre in _centres(case, name) & set(energetic(network, case.deterministic)):
        node = network[centre]
        precision = own_precision(network, centre)
        scale = (
            factors[centre] * node.energy_weight * (precision.detach() if isinstance(precision, Tensor) else precision)
        )
        value, prediction = state[centre], predicted[centre].detach()
        if centre == name:
            own = -node.energy_function.value_gradient(value, prediction, scale)
        if predicted[centre].requires_grad:
            sent = sent - (node.energy_function.prediction_gradient(value, prediction, scale) * predicted[centre]).sum()
    if not sent.requires_grad:
        return own
    message = torch.autograd.grad(sent, leaf, allow_unused=True)[0]
    return own if message is None else own + message


def _neighbourhood(case: Case, name: str) -> set[str]:
    network, deterministic = case.network, case.deterministic
    inside: set[str] = set()
    for centre in _centres(case, name):
        inside |= {centre} | _through(centre, deterministic, lambda n: [e.source_name for e in network.incoming(n)])
    return inside


def _centres(case: Case, name: str) -> set[str]:
    """A node and the nodes with a value of their own that it helps to predict."""
    network, deterministic = case.network, case.deterministic
    return {name} | _through(
        name, deterministic, lambda n: [e.target_name for e in network.outgoing(n)]
    ) - deterministic


def _through(start: str, deterministic: Collection[str], further: Callable[[str], list[str]]) -> set[str]:
    """Nodes one hop further, deterministic nodes not counted as a hop but found as well."""
    found: set[str] = set()
    frontier = further(start)
    while frontier:
        name = frontier.pop()
        if name not in found:
            found.add(name)
            if name in deterministic:
                frontier += further(name)
    return found


def _parameters_beyond(case: Case, name: str, inside: Collection[str]) -> list[nn.Parameter]:
    """Parameters that have no part in the predictions which a node's update reads."""
    read = _centres(case, name) | {other for other in inside if other in case.deterministic}
    parts: list[nn.Module] = [part for n in read for part in (case.network[n], *case.network.incoming(n))]
    inner = {id(parameter) for part in parts for parameter in part.parameters()}
    return [parameter for parameter in case.network.parameters() if id(parameter) not in inner]


def _given_instead(given: Tensor | tuple[Tensor, Tensor], value: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return (value, given[1]) if isinstance(given, tuple) else value

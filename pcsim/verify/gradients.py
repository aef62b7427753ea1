"""The local rules against autograd on the total energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor

from pcsim.clamps import Clamps
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import (
    ArrivalUpdate,
    Backprop,
    ForwardUpdate,
    IncrementalUpdate,
    LearningRule,
    SettledUpdate,
)
from pcsim.errors import SettingError
from pcsim.graph.network import Network
from pcsim.random_state import random_state_kept
from pcsim.simulator import Simulator
from pcsim.verify.case import Case, EngineChoice, in_float64
from pcsim.verify.comparing import compare, largest
from pcsim.verify.oracle import Objective, energetic, moving_of, total_energy, values_of
from pcsim.verify.recording import RecordingOptimizer
from pcsim.verify.restart import plain, trajectory
from pcsim.verify.shrinking import report


@random_state_kept()
def check_gradients(
    network: Network,
    clamps: Clamps,
    relaxation: Relaxation | None = None,
    rule: LearningRule | None = None,
    objective: Objective | None = None,
    *,
    engine: EngineChoice = "batched",
    tolerance: float = 1e-9,
) -> None:
    """The local rules equal autograd's gradient of the total energy, for every node and every parameter.

    The displacement of every free node at every step, divided by the rate, is compared with −∂F_t/∂v; the gradients
    that the learning rule leaves are compared with those of the energy that it descends (SPEC §4), and where it
    leaves None, the gradient must be zero.

    Args:
        network: the graph; a copy is used.
        clamps: what is given.
        relaxation: rate, steps and schedule; momentum, tolerance, temperature, multipliers and least rate are left out,
            as none is part of a gradient. With :class:`ErrorRelaxation` the displacement of errors is compared.
        rule: the learning rule; settled, forward and incremental in turn by default, of errors settled alone.
        objective: what a rule of a user's own descends in place of each node's energy: from the energy, value and
            prediction, (batch, *shape), and the scale, all as ``delta`` takes them, to what is summed; −∂/∂prediction
            of it is what ``delta`` should hand out.
        engine: what is checked.
        tolerance: relative to the largest number compared, and at least to 1.

    Raises:
        AssertionError: they differ; names the node or the parameter, and prints the smallest network found that
            fails, as code that fails again.
        SettingError: the rule is a user's own, and no objective of it is given.
    """
    case = in_float64(network, clamps, relaxation, rule)
    known = [SettledUpdate(), *([] if case.relaxation.relaxes_errors else [ForwardUpdate(), IncrementalUpdate()])]
    rules = known if rule is None else [rule]
    known_one = (SettledUpdate, ForwardUpdate, IncrementalUpdate, ArrivalUpdate, Backprop)
    own = [each for each in rules if type(each) not in known_one]
    if objective is None and own:
        raise SettingError(
            f"check_gradients knows no objective of {type(own[0]).__name__}; give it: objective=, from (energy, value, "
            "prediction, scale) to what the rule descends"
        )
    arguments = {"objective": objective, "engine": engine, "tolerance": tolerance}
    report(partial(_check, rules=rules), case, check_gradients, arguments)


def _check(
    case: Case, rules: Sequence[LearningRule], objective: Objective | None, engine: EngineChoice, tolerance: float
) -> None:
    states = trajectory(case, engine)
    for step in range(case.relaxation.steps):
        before, after = states[step], states[step + 1]
        first, second = moving_of(case, before), moving_of(case, after)
        coordinate = "ε" if case.relaxation.relaxes_errors else "v"
        for name, descent in _descent(case, before, step).items():
            moved = (second[name] - first[name]) / case.relaxation.rate
            units, size = case.free_units(name), largest(before[name], after[name], descent)
            what = f"node {name!r}, step {step}: −∂F_t/∂{coordinate}"
            compare(what, moved[units], descent[units], tolerance, size, case)
    if not any(name in energetic(case.network, case.deterministic) for name in case.clamps):
        return  # no clamped node is predicted, so there is nothing to learn from
    for each in rules:
        _check_parameters(attrs.evolve(case, rule=each), objective, states, engine, tolerance)


def _descent(case: Case, state: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """−∂F_t/∂v, or −∂F_t/∂ε, of every free node, by autograd on the whole of F_t."""
    leaves = {name: tensor.requires_grad_() for name, tensor in moving_of(case, state).items()}
    value = values_of(case, state, leaves)
    energy = total_energy(case.network, value, case.deterministic, case.factors(step))
    gradients = _gradients(energy, list(leaves.values()))
    return {name: -gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _gradients(energy: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    if not inputs or not energy.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(energy, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.detach() for t, g in zip(inputs, found, strict=True)]


def _check_parameters(
    case: Case,
    objective: Objective | None,
    states: list[dict[str, Tensor]],
    engine: EngineChoice,
    tolerance: float,
) -> None:
    rule = case.rule
    if rule.every_step:
        recorder = RecordingOptimizer(case.network, learning_rate=0.0)
        Simulator(case.network, plain(case, case.relaxation.steps), rule, engine=engine).update(case.clamps, recorder)
        for step, found in enumerate(recorder.gradients):
            weighed = _Learning(case, states[step], states[step], case.factors(step), objective=objective)
            _compare([weighed], f"{type(rule).__name__}, step {step}", found, tolerance)
        return
    simulator = Simulator(case.network, plain(case, case.relaxation.steps), rule, engine=engine)
    simulator.infer(case.clamps)
    simulator.compute_gradients()
    found = {name: parameter.grad for name, parameter in case.network.named_parameters()}
    activity = states[0] if rule.at_forward else states[-1]
    learned = [_Learning(case, states[-1], activity, objective=objective)]
    if rule.at_arrival:
        # Each node's own energy, at the state before the step at which the error arrives there.
        arriving = [[n for n, level in case.levels.items() if level == step] for step in range(len(states) - 1)]
        learned = [
            _Learning(case, states[step], states[step], only=names, objective=objective)
            for step, names in enumerate(arriving)
        ]
    _compare(learned, type(rule).__name__, found, tolerance)


@attrs.frozen
class _Learning:
    """The energies that a rule descends.

    Args:
        case: what was run.
        value: v_n that errors are taken of.
        activity: what the edges read.
        factors: the schedule's factors; None leaves precision out, but for its own gradient.
        only: names of the nodes whose energies count; None for all.
        objective: in place of energies; None for these.
    """

    case: Case
    value: Mapping[str, Tensor]
    activity: Mapping[str, Tensor]
    factors: Mapping[str, float] | None = None
    only: Sequence[str] | None = None
    objective: Objective | None = None

    def energy(self, factors: Mapping[str, float] | None, objective: Objective | None = None) -> Tensor:
        network, inner = self.case.network, self.case.deterministic
        told = {"activity": self.activity, "only": self.only, "objective": objective}
        return total_energy(network, self.value, inner, factors, **told)  # type: ignore[arg-type]

    @property
    def own_factors(self) -> Mapping[str, float]:
        """The schedule's factors in the gradients of learned precisions."""
        return dict.fromkeys(self.case.network.nodes, 1.0) if self.factors is None else self.factors

    def without_evidence(self, name: str) -> bool:
        """Whether no error of a node counts, so that nothing but −½ log π is left to learn its precision from."""
        nothing = dict.fromkeys(self.case.network.nodes, 0.0)
        return bool(self.energy(nothing | {name: self.own_factors[name]}) == self.energy(nothing))


def _compare(learned: Sequence[_Learning], where: str, found: Mapping[str, Tensor | None], tolerance: float) -> None:
    """Compare gradients with the sum of those of some energies."""
    case = learned[0].case if learned else None
    if case is None:
        return
    named = {name: parameter for name, parameter in case.network.named_parameters() if parameter.requires_grad}
    owners = {id(n.log_precision): n.name for n in case.network.nodes.values() if n.log_precision is not None}
    inputs = list(named.values())
    weights = [_gradients(each.energy(each.factors, each.objective), inputs) for each in learned]
    precisions = [_gradients(each.energy(each.own_factors), inputs) for each in learned]
    for place, (name, parameter) in enumerate(named.items()):
        owner, got, note = owners.get(id(parameter)), found[name], ""
        parts = [gradients[place] for gradients in (weights if owner is None else precisions)]
        expected = torch.stack(parts).sum(0) / case.batch
        if got is None:
            if owner is not None and all(each.without_evidence(owner) for each in learned):
                continue
            got, note = torch.zeros_like(expected), " (its grad is None)"
        what = f"{where}: gradient of parameter {name!r}{note}"
        compare(what, got, expected, tolerance, largest(expected), case)

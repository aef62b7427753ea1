"""What a user writes, a rule, an energy, a schedule, is told from one that is not what it should be."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import pcsim
from pcsim import verify
from pcsim.errors import SettingError
from pcsim.graph.energy import Scale


def problem() -> tuple[pcsim.Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 4, 4, 2])
    return net, {"input": torch.randn(3, 3), "output": torch.randn(3, 2)}


class Local(pcsim.LearningRule):
    """Twice the error, cubed: odd, but local; of ½ ε⁴."""

    def delta(self, energy: pcsim.Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        return scale * 2 * (value - prediction) ** 3


class LocalForward(Local):
    at_forward: ClassVar[bool] = True


class LocalEachStep(Local):
    every_step: ClassVar[bool] = True


class LocalAtArrival(Local):
    at_arrival: ClassVar[bool] = True


def quartic(energy: pcsim.Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
    return scale * 0.5 * (value - prediction) ** 4


def of_sizes(energy: pcsim.Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
    return scale * (value - prediction).abs() ** 3


RELAXATIONS = {
    Local: pcsim.Relaxation(4, 0.1),
    LocalForward: pcsim.Relaxation(4, 0.1),
    LocalEachStep: pcsim.Relaxation(4, 0.1, precision=pcsim.Constant(0.7)),
    LocalAtArrival: pcsim.Relaxation(4, 0.5, precision=pcsim.Spiking.for_rate(0.5)),
}


@pytest.mark.parametrize("kind", RELAXATIONS)
def test_a_rule_of_ones_own_has_an_objective(kind: type[Local]) -> None:
    net, clamps = problem()
    verify.check_gradients(net, clamps, RELAXATIONS[kind], kind(), quartic)
    with pytest.raises(AssertionError, match="gradient of parameter"):
        verify.check_gradients(net, clamps, RELAXATIONS[kind], kind(), of_sizes)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(verify.cases(verify.networks(nodes=(2, 6)), rules=(Local(), LocalForward(), LocalEachStep(), LocalAtArrival())))
def test_engines_agree_on_rules_of_ones_own(case: verify.Case) -> None:
    verify.check_engines_agree(case)


def test_without_an_objective_a_rule_of_ones_own_is_refused() -> None:
    net, clamps = problem()
    with pytest.raises(SettingError, match="no objective of Local; give it: objective="):
        verify.check_gradients(net, clamps, rule=Local())


@pytest.mark.parametrize("kind", RELAXATIONS)
@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_local_rules_pass(kind: type[Local], engine: str) -> None:
    net, clamps = problem()
    verify.check_locality(net, clamps, RELAXATIONS[kind], kind(), engine=engine)


@pytest.mark.parametrize("rule", [*verify.RULES[:3], pcsim.ArrivalUpdate()], ids=repr)
def test_the_rules_of_the_library_are_local_on_odd_graphs(rule: pcsim.LearningRule) -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.residual_mlp(3, 4, 2, blocks=2)
    net.add_edge(net["output"], net["stem"], nn.Linear(2, 4)) if not rule.at_arrival else None
    clamps = {"input": torch.randn(2, 3), "output": torch.randn(2, 2)}
    precision = pcsim.Spiking.for_rate(0.5) if rule.at_arrival else pcsim.Constant()
    verify.check_locality(net, clamps, pcsim.Relaxation(6, 0.5, precision=precision), rule)


class CentredBatch(pcsim.LearningRule):
    def delta(self, energy: pcsim.Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        delta = self.descent(energy, value, prediction, scale)
        return delta - delta.mean(0)


class SeesAnotherNode(pcsim.LearningRule):
    def __init__(self, network: pcsim.Network) -> None:
        self.network = network

    def delta(self, energy: pcsim.Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        return self.descent(energy, value, prediction, scale) * self.network["output"].error.norm()


class SeesWeights(pcsim.LearningRule):
    def __init__(self, network: pcsim.Network) -> None:
        self.network = network

    def delta(self, energy: pcsim.Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        return self.descent(energy, value, prediction, scale) / next(self.network.parameters()).detach().norm()


class Remembers(pcsim.LearningRule):
    def __init__(self, _: pcsim.Network) -> None:
        self.last = 0.0

    def delta(self, energy: pcsim.Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        before, self.last = self.last, float((value - prediction).norm())
        return self.descent(energy, value, prediction, scale) + before


class OfAnotherShape(pcsim.LearningRule):
    def delta(self, energy: pcsim.Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        return self.descent(energy, value, prediction, scale).sum(0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda net: CentredBatch(), "with other samples changed"),
        (SeesAnotherNode, "all that the network shows and its weights changed"),
        (SeesWeights, "all that the network shows and its weights changed"),
        (Remembers, "asked again after other nodes and values|with other samples changed|all that the network shows"),
        (lambda net: OfAnotherShape(), r"delta gives \(4,\), expected"),
    ],
)
def test_a_rule_that_is_not_local_is_told(make: Callable[[pcsim.Network], pcsim.LearningRule], said: str) -> None:
    net, clamps = problem()
    pcsim.Simulator(net).infer(clamps)
    before, shown = [p.clone() for p in net.parameters()], net["hidden1"].value
    with pytest.raises(AssertionError, match=said):
        verify.check_locality(net, clamps, pcsim.Relaxation(3, 0.1), make(net))
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert torch.equal(net["hidden1"].value, shown)


class FromTheFuture(pcsim.ReferenceEngine):
    """Learns at every step from what is given at the last."""

    def relax(self, task: Any, batch: Any, learn: Any = None) -> Any:
        def late(gradients: Any) -> None:
            last = batch.at(task.relaxation.steps - 1).clamps["output"].value.mean()
            learn({parameter: gradient + last for parameter, gradient in gradients.items()})

        return super().relax(task, batch, None if learn is None else late)


class FromBeyond(pcsim.ReferenceEngine):
    """Teaches every edge what the target knows."""

    def gradients(self, state: Any) -> Any:
        return {p: g + state.value["output"].mean() for p, g in super().gradients(state).items()}


def test_an_engine_that_looks_ahead_or_beyond_is_told() -> None:
    net, clamps = problem()
    with pytest.raises(AssertionError, match="at step 0, with what is given at the last step changed"):
        verify.check_locality(net, clamps, pcsim.Relaxation(3, 0.1), pcsim.IncrementalUpdate(), engine=FromTheFuture)
    with pytest.raises(AssertionError, match="gradients of its edges, with the nodes beyond them changed"):
        verify.check_locality(net, clamps, pcsim.Relaxation(3, 0.1), pcsim.SettledUpdate(), engine=FromBeyond)


# Energies


@pytest.mark.parametrize(
    "energy",
    [
        pcsim.Gaussian(),
        pcsim.Laplace(),
        pcsim.Huber(0.7),
        pcsim.StudentT(3.0),
        pcsim.CorrelatedGaussian(torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 0.5]]).double()),
    ],
    ids=repr,
)
def test_energies_of_the_library_are_what_they_declare(energy: pcsim.Energy) -> None:
    verify.check_energy(energy, (3,))


@pytest.mark.parametrize("energy", [pcsim.CrossEntropy(), pcsim.Bernoulli()], ids=repr)
def test_energies_of_distributions_are_what_they_declare(energy: pcsim.Energy) -> None:
    verify.check_energy(energy, (3,), values=torch.softmax(torch.randn(4, 3).double(), 1))


@attrs.frozen
class Odd(pcsim.Energy):
    """A Gaussian with one thing wrong."""

    wrong: str = ""

    @property
    def rests_at_prediction(self) -> bool:  # type: ignore[override]
        return self.wrong == "rest"

    @property
    def normalised(self) -> bool:  # type: ignore[override]
        return self.wrong == "normalised"

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        error = value - prediction
        if self.wrong == "samples":
            error = error - error.mean(0)
        if self.wrong == "shape":
            return error.square().sum(-1)
        if self.wrong == "rest":
            return 0.5 * (error - 0.1).square()
        if self.wrong == "minimum":
            return -0.5 * error.square()
        return error.abs() ** 3 if self.wrong == "normalised" else 0.5 * error.square()

    def sample_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return (1 + (self.wrong == "sample")) * super().sample_energy(value, prediction)

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        found = super().value_gradient(value, prediction, scale)
        return found if self.wrong != "value" else 2 * found

    def prediction_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        found = super().prediction_gradient(value, prediction, scale)
        return found * (torch.as_tensor(scale).mean() / scale if self.wrong == "prediction" else 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("samples", "the energy of the first sample, with the others changed"),
        ("shape", r"unit_energy gives \(3,\) for values of \(3, 4\)"),
        ("rest", "rests_at_prediction is True, but value_gradient is 0.1"),
        ("minimum", "has_minimum is True, but 1000 away"),
        ("normalised", "normalised is True, but"),
        ("sample", "sample_energy against the sum"),
        ("value", "value_gradient against autograd"),
        ("prediction", "prediction_gradient against autograd"),
    ],
)
def test_an_energy_that_is_not_what_it_declares_is_told(wrong: str, said: str) -> None:
    verify.check_energy(Odd(), (4,))
    with pytest.raises(AssertionError, match=said):
        verify.check_energy(Odd(wrong), (4,))


# Schedules


@pytest.mark.parametrize(
    "schedule", [pcsim.Constant(0.3), pcsim.Spiking(), pcsim.Decaying(), pcsim.Spiking.for_rate(0.2)]
)
def test_schedules_of_the_library_pass(schedule: pcsim.PrecisionSchedule) -> None:
    verify.check_schedule(schedule)


class Counts(pcsim.PrecisionSchedule):
    def __init__(self) -> None:
        self.calls = itertools.count()

    def at(self, step: int, level: int | None, steps: int) -> float:
        return float(next(self.calls))


@attrs.frozen
class Says(pcsim.PrecisionSchedule):
    what: object

    def at(self, step: int, level: int | None, steps: int) -> float:
        return self.what if level == 3 else 1.0  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (Counts(), "it has to be a function of these three alone"),
        (Says(-1.0), "π = -1.0 at step 0 of 12, level 3"),
        (Says(float("nan")), "π = nan"),
        (Says(True), "π = True"),
        (Says(torch.ones(())), "π = tensor"),
    ],
)
def test_a_schedule_that_is_none_is_told(schedule: pcsim.PrecisionSchedule, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        verify.check_schedule(schedule)

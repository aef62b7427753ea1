"""Nudged targets: where they are, which sign the weights learn with, and backprop's gradient in the limit."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn, optim

import pcsim
from pcsim.errors import SettingError

ENGINES = ("batched", "reference")


def chain() -> tuple[pcsim.Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 5, 5, 2]).double()
    return net, {"input": torch.randn(4, 3).double(), "output": torch.randn(4, 2).double()}


def gradients(net: pcsim.Network, clamps: dict[str, Tensor], **options: object) -> list[Tensor]:
    """What a simulator with these options fills in."""
    sim = pcsim.Simulator(net, **options)  # type: ignore[arg-type]
    sim.infer(clamps)
    sim.compute_gradients()
    return [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beta", [0.25, -0.25, 1.0])
def test_a_target_is_so_far_from_its_forward_prediction(engine: str, beta: float) -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), nudging=pcsim.Nudging(beta), engine=engine)
    for _ in range(3):  # in every program that takes turns, and not a little further each time
        sim.infer(clamps)
        prediction = sim.predict({"input": clamps["input"]})["output"]
        torch.testing.assert_close(net["output"].value, prediction + beta * (clamps["output"] - prediction))
        torch.testing.assert_close(net["output"].forward_prediction, prediction)


@pytest.mark.parametrize("precision", [pcsim.Constant(), pcsim.Spiking(0.0)], ids=str)
@pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.ForwardUpdate(), pcsim.Backprop()], ids=str)
@pytest.mark.parametrize(
    "nudging",
    [
        pcsim.Nudging(0.3),
        pcsim.Nudging(-0.3),
        pcsim.Nudging(0.3, centred=True),
        pcsim.SoftNudging(0.3),
        pcsim.SoftNudging(-0.1),
        pcsim.SoftNudging(0.1, centred=True),
    ],
    ids=str,
)
def test_engines_agree(nudging: pcsim.Nudge, rule: pcsim.LearningRule, precision: pcsim.PrecisionSchedule) -> None:
    net, clamps = chain()
    options = {"relaxation": pcsim.Relaxation(6, 0.2, precision=precision), "rule": rule, "nudging": nudging}
    for ours, oracle in zip(*(gradients(net, clamps, **options, engine=name) for name in ENGINES), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-12)


def test_a_negative_target_s_gradients_are_those_of_an_ordinary_clamp_there_with_the_other_sign() -> None:
    net, clamps = chain()
    relaxation = pcsim.Relaxation(6, 0.2)
    prediction = pcsim.Simulator(net).predict({"input": clamps["input"]})["output"]
    there = {**clamps, "output": prediction - 0.3 * (clamps["output"] - prediction)}
    expected = gradients(net, there, relaxation=relaxation)
    for got, other in zip(
        gradients(net, clamps, relaxation=relaxation, nudging=pcsim.Nudging(-0.3)), expected, strict=True
    ):
        torch.testing.assert_close(got, -other)


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_centred_is_the_mean_of_both_and_leaves_the_positive_state_to_be_read(beta: float) -> None:
    net, clamps = chain()
    options = {"relaxation": pcsim.Relaxation(6, 0.2)}
    sides = [gradients(net, clamps, **options, nudging=pcsim.Nudging(side)) for side in (beta, -beta)]
    values = []
    for nudging in (pcsim.Nudging(beta), pcsim.Nudging(beta, centred=True)):
        got = gradients(net, clamps, **options, nudging=nudging)
        values.append(net["hidden2"].value.clone())
    for positive, negative, centred in zip(*sides, got, strict=True):
        torch.testing.assert_close(centred, (positive + negative) / 2)
    torch.testing.assert_close(*values, rtol=0, atol=0)


def test_centred_gradients_go_to_their_limit_an_order_faster() -> None:
    net, clamps = chain()
    relaxation = pcsim.Relaxation(4000, 0.3, tolerance=1e-15)

    def direction(beta: float, centred: bool) -> Tensor:
        nudged = gradients(net, clamps, relaxation=relaxation, nudging=pcsim.Nudging(beta, centred=centred))
        return torch.cat([gradient.flatten() for gradient in nudged]) / beta

    limit = direction(1e-3, centred=True)
    one_sided = [float((direction(beta, centred=False) - limit).norm()) for beta in (0.2, 0.02)]
    centred = [float((direction(beta, centred=True) - limit).norm()) for beta in (0.2, 0.02)]
    assert one_sided[0] / one_sided[1] == pytest.approx(10, rel=0.2)
    assert centred[0] / centred[1] == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize("beta", [0.3, -0.3])
def test_a_linear_network_keeps_the_share_of_the_nudge_that_its_closed_form_says(beta: float) -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 5, 2], activation=nn.Identity).double()
    clamps = {"input": torch.randn(4, 3).double(), "output": torch.randn(4, 2).double()}
    sim = pcsim.Simulator(net, pcsim.Relaxation(4000, 0.2, tolerance=1e-14), nudging=pcsim.Nudging(beta))
    sim.infer(clamps)
    # At rest the hidden error is Wᵀ ε, so that of β (y − u) the output keeps (1 + W Wᵀ)⁻¹.
    weight = net.edges["hidden1->output"].module.weight.detach()
    nudge = beta * (clamps["output"] - net["output"].forward_prediction)
    expected = torch.linalg.solve(torch.eye(2).double() + weight @ weight.mT, nudge.mT).mT
    torch.testing.assert_close(net["output"].error, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(net["hidden1"].error, expected @ weight, rtol=1e-9, atol=1e-12)


def test_incremental_learning_takes_the_sign() -> None:
    net, clamps = chain()
    twin = copy.deepcopy(net)
    for network, nudging, rate in ((net, pcsim.Nudging(-0.5), 0.1), (twin, None, -0.1)):
        sim = pcsim.Simulator(network, pcsim.Relaxation(1, 0.1), pcsim.IncrementalUpdate(), nudging=nudging)
        given = dict(clamps)
        if nudging is None:
            prediction = sim.predict({"input": clamps["input"]})["output"]
            given["output"] = prediction - 0.5 * (clamps["output"] - prediction)
        before = [parameter.detach().clone() for parameter in network.parameters()]
        optimizer = optim.SGD(network.parameters(), lr=abs(rate))
        sim.update(given, optimizer)
        if nudging is None:
            expected = [2 * old - new for old, new in zip(before, network.parameters(), strict=True)]
    for got, other in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(got, other)


class TestErrors:
    @pytest.mark.parametrize("beta", [0, 1.5, -2.0, "much", True, float("nan")])
    def test_strength_out_of_range(self, beta: float) -> None:
        with pytest.raises(SettingError, match=r"Nudging.beta: given .*expected a number from -1 to 1"):
            pcsim.Nudging(beta)

    def test_centred_takes_a_positive_strength(self) -> None:
        with pytest.raises(SettingError, match="both signs are used"):
            pcsim.Nudging(-0.1, centred=True)

    def test_centred_cannot_learn_during_the_relaxation(self) -> None:
        with pytest.raises(SettingError, match="learns during the relaxation"):
            pcsim.Simulator(chain()[0], rule=pcsim.IncrementalUpdate(), nudging=pcsim.Nudging(0.1, centred=True))

    def test_a_target_that_predicts(self) -> None:
        net, clamps = chain()
        clamps["hidden2"] = torch.zeros(4, 5).double()
        with pytest.raises(SettingError, match="target 'hidden2': it predicts 'output'"):
            pcsim.Simulator(net, nudging=pcsim.Nudging(0.1)).infer(clamps)

    def test_a_target_clamped_in_part(self) -> None:
        net, clamps = chain()
        given = {"input": clamps["input"], "output": (clamps["output"], torch.tensor([True, False]))}
        with pytest.raises(SettingError, match="target 'output': it is clamped in part"):
            pcsim.Simulator(net, nudging=pcsim.Nudging(0.1)).infer(given)

    @pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.Backprop()], ids=str)
    def test_a_target_with_another_energy(self, rule: pcsim.LearningRule) -> None:
        net = pcsim.Network()
        net.add_node("x", (2,))
        net.add_node("y", (3,), energy=pcsim.CrossEntropy())
        net.add_edge("x", "y", nn.Linear(2, 3))
        with pytest.raises(SettingError, match="target 'y': it has a CrossEntropy energy"):
            pcsim.Simulator(net, rule=rule, nudging=pcsim.Nudging(0.1)).infer(
                {"x": torch.zeros(2, 2), "y": torch.eye(3)[:2]}
            )

    def test_what_is_changed_between_runs_is_checked_again(self) -> None:
        net, clamps = chain()
        sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), pcsim.IncrementalUpdate())
        sim.infer(clamps)
        sim.nudging = pcsim.Nudging(0.5, centred=True)
        with pytest.raises(SettingError, match="learns during the relaxation"):
            sim.infer(clamps)
        sim.rule = pcsim.SettledUpdate()
        sim.infer(clamps)
        with pytest.raises(SettingError, match="target 'output': it is clamped in part"):
            sim.infer({**clamps, "output": (clamps["output"], torch.tensor([True, False]))})


@pytest.mark.parametrize("energy", [pcsim.Gaussian(), pcsim.CrossEntropy()], ids=repr)
def test_soft_nudging_tends_to_backprop_as_beta_does_to_zero_and_centred_as_its_square(energy: pcsim.Energy) -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 5, 5, 2], energy=energy).double()
    clamps = {"input": torch.randn(4, 3).double(), "output": torch.softmax(torch.randn(4, 2).double(), 1)}
    exact = gradients(net, clamps, rule=pcsim.Backprop())

    def gap(nudging: pcsim.Nudge) -> float:
        found = gradients(net, clamps, relaxation=pcsim.Relaxation(500, 0.2), nudging=nudging)
        return apart(found, exact)

    one_sided = [gap(pcsim.SoftNudging(beta)) for beta in (0.04, 0.02, 0.01)]
    centred = [gap(pcsim.SoftNudging(beta, centred=True)) for beta in (0.04, 0.02, 0.01)]
    for first, second in pairwise(one_sided):
        assert 1.8 < first / second < 2.2
    for first, second in pairwise(centred):
        assert 3.6 < first / second < 4.4


def test_hard_nudging_does_not_tend_to_backprop() -> None:
    net, clamps = chain()
    exact = gradients(net, clamps, rule=pcsim.Backprop())
    nudging = pcsim.Nudging(0.001, centred=True)
    found = gradients(net, clamps, relaxation=pcsim.Relaxation(500, 0.2), nudging=nudging)
    assert apart([gradient / 0.001 for gradient in found], exact) > 0.2


def apart(found: list[Tensor], exact: list[Tensor]) -> float:
    """The relative distance of two lists of gradients."""
    gap = sum(float((one - other).square().sum()) for one, other in zip(found, exact, strict=True))
    return (gap / sum(float(gradient.square().sum()) for gradient in exact)) ** 0.5


def test_a_soft_target_weighs_so_much_of_the_energy() -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), nudging=pcsim.SoftNudging(0.25))
    trace = sim.infer(clamps, record=True)
    assert torch.equal(net["output"].value, clamps["output"])
    assert trace.energies is not None
    assert trace.free_energies is not None
    weights = torch.tensor([0.25 if name == "output" else 1.0 for name in trace.nodes], dtype=torch.float64)
    torch.testing.assert_close(trace.free_energies, (trace.energies.sum(2) * weights).sum(1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("nudging", [pcsim.Nudging(0.4, centred=True), pcsim.SoftNudging(0.4, centred=True)], ids=str)
def test_centred_nudging_goes_on_from_where_the_last_run_ended_on_both_sides(engine: str, nudging: pcsim.Nudge) -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    for name, size in (("x", 3), ("a", 4), ("b", 4), ("y", 2)):
        net.add_node(name, (size,))
    for source, target in (("x", "a"), ("a", "b"), ("b", "a"), ("b", "y")):
        net.add_edge(source, target, nn.Sequential(nn.Tanh(), nn.Linear(net[source].shape[0], net[target].shape[0])))
    clamps = {"x": torch.randn(3, 3).double(), "y": torch.randn(3, 2).double()}
    relaxation = pcsim.Relaxation(3, 0.1, start="previous")
    sim = pcsim.Simulator(net.double(), relaxation, nudging=nudging, engine=engine)
    sim.infer(clamps)
    start = {name: net[name].value for name in "ab"}
    sim.infer(clamps)
    found = sim.gradients()
    sides = []
    for sign in (1, -1):
        one = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1), engine="reference")
        one.nudging = type(nudging)(sign * nudging.beta)
        one.infer(clamps, init=start)
        sides.append(one.gradients())
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, (sides[0][parameter] + sides[1][parameter]) / 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_predictions_know_nothing_of_nudging_temperature_and_earlier_runs(engine: str) -> None:
    """Two sinks, one of which is given: the other one's logits follow the relaxed values."""
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 4, 2])
    net["hidden1"].transfer = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    net.add_node("classes", (3,), energy=pcsim.CrossEntropy())
    net.add_edge("hidden1", "classes", nn.Linear(4, 3))
    clamps = {"input": torch.randn(3, 3).double(), "output": torch.randn(3, 2).double()}
    plain = pcsim.Simulator(net.double(), pcsim.Relaxation(5, 0.1), engine=engine).predict(clamps)
    torch.testing.assert_close(plain["classes"], net.edges["hidden1->classes"].module(plain["hidden1"]).detach())
    noisy = pcsim.Relaxation(5, 0.1, temperature=0.1)
    sim = pcsim.Simulator(net, noisy, nudging=pcsim.Nudging(0.3), engine=engine)
    sim.infer(clamps)
    before = torch.get_rng_state()
    for name, value in sim.predict(clamps).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_soft_nudging_weighs_the_target_s_energy_beside_its_own_weight(engine: str) -> None:
    net, clamps = chain()
    net["output"].energy_weight = 3.0
    options = {"relaxation": pcsim.Relaxation(4, 0.1), "engine": engine}
    nudged = gradients(net, clamps, nudging=pcsim.SoftNudging(0.25), **options)
    net["output"].energy_weight = 0.75
    for got, plain in zip(nudged, gradients(net, clamps, **options), strict=True):
        torch.testing.assert_close(got, 4 * plain)

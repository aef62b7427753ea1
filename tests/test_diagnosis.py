"""Diagnosis: numbers against their definition, and figures that show them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import Noisy, generators
from torch import Tensor, nn

import pcsim
from pcsim import diagnosis, plots
from pcsim.errors import DivergenceError, SettingError, StateError


def chain(depth: int = 5) -> tuple[pcsim.Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([4, *[6] * (depth - 1), 3]).double()
    return net, {"input": torch.randn(7, 4).double(), "output": torch.randn(7, 3).double()}


def recorded(precision: pcsim.PrecisionSchedule | None = None, engine: str = "batched", depth: int = 5) -> pcsim.Trace:
    net, clamps = chain(depth)
    relaxation = pcsim.Relaxation(depth, 0.5, precision=precision or pcsim.Constant())
    return pcsim.Simulator(net, relaxation, engine=engine).infer(clamps, record=True)


@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_error_norms_are_those_of_gaussian_energies(engine: str) -> None:
    trace = recorded(engine=engine)
    torch.testing.assert_close(0.5 * trace.error_norms.square(), trace.energies)
    torch.testing.assert_close(0.5 * diagnosis.level_errors(trace).square(), diagnosis.level_energies(trace))


def test_an_error_arrives_at_each_level_at_its_step() -> None:
    depth = 5
    assert diagnosis.arrivals(recorded(depth=depth)) == {level: level for level in range(depth)}
    assert diagnosis.arrivals(recorded(), above=1e9) == {}


def test_imbalance_is_infinite_until_all_levels_have_an_error() -> None:
    plain = diagnosis.imbalance(recorded())
    assert torch.isinf(plain[:4]).all()
    energies = diagnosis.level_energies(recorded())[-1]
    assert float(plain[-1]) == pytest.approx(float(energies.max() / energies.min()))
    assert math.isfinite(plain[-1])


def test_precision_that_undoes_the_attenuation_balances_a_chain_of_identities() -> None:
    net = pcsim.Network()
    for name in ("input", "a", "b", "c", "output"):
        net.add_node(name, (3,))
    for source, target in (("input", "a"), ("a", "b"), ("b", "c"), ("c", "output")):
        net.add_edge(source, target)
    clamps = {"input": torch.zeros(2, 3), "output": torch.ones(2, 3)}
    worst = []
    for precision in (pcsim.Constant(), pcsim.Spiking(alpha=0.0, peak=1 / 0.2)):
        trace = pcsim.Simulator(net, pcsim.Relaxation(4, 0.2, precision=precision)).infer(clamps, record=True)
        arrived = [float(diagnosis.level_energies(trace)[level, level]) for level in range(4)]
        worst.append(max(arrived) / min(arrived))
    assert worst[0] == pytest.approx(0.2**-6, rel=1e-3)
    assert worst[1] == pytest.approx(1.0)


def test_levels_without_a_node_do_not_count() -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    for name in ("x", "h", "y"):
        net.add_node(name, (3,))
    net.add_edge("x", "h", nn.Linear(3, 3))
    net.add_edge("h", "y", nn.Linear(3, 3))
    trace = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1)).infer(
        {"x": torch.randn(2, 3), "y": torch.randn(2, 3)}, record=True
    )
    assert torch.isfinite(diagnosis.imbalance(trace)[-1])


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_spiking_with_the_forward_rule_points_where_backprop_does(rate: float) -> None:
    net, clamps = chain(6)
    relaxation = pcsim.Relaxation(6, rate, precision=pcsim.Spiking(0.0))
    found = diagnosis.update_similarity(pcsim.Simulator(net, relaxation, pcsim.ForwardUpdate()), clamps)
    assert list(found) == list(net.edges)
    assert all(cosine == pytest.approx(1.0, abs=1e-9) for cosine in found.values())


def test_similarity_leaves_everything_as_it_was() -> None:
    net, clamps = chain()
    net["hidden1"].transfer = nn.Sequential(nn.BatchNorm1d(6).double(), nn.Tanh())
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(net.state_dict())
    diagnosis.update_similarity(sim, clamps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in net.parameters())
    assert float(net["hidden1"].error.norm()) > 0, "the relaxed state is shown, not backprop's"


def test_similarity_leaves_the_random_state_and_modes() -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    for name in ("input", "hidden", "output"):
        net.add_node(name, (6,), transfer=nn.Sequential(nn.Dropout(0.3), nn.Tanh()) if name == "hidden" else None)
    net.add_edge("input", "hidden", Noisy(6))
    net.add_edge("hidden", "output", nn.Linear(6, 6))
    net["hidden"].transfer[1].eval()
    clamps = {"input": torch.randn(3, 6), "output": torch.randn(3, 6)}
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.3, precision=pcsim.Spiking(0.0)), pcsim.ForwardUpdate())
    state, modes = generators(), [module.training for module in net.modules()]
    first = diagnosis.update_similarity(sim, clamps)
    assert generators() == state
    assert [module.training for module in net.modules()] == modes
    assert first == diagnosis.update_similarity(sim, clamps)
    assert first["hidden->output"] == pytest.approx(1.0, abs=1e-6), "the same units are dropped in both"
    with pytest.raises(DivergenceError):
        diagnosis.update_similarity(pcsim.Simulator(net, pcsim.Relaxation(300, 1e9)), clamps)
    assert generators() == state


def test_similarity_where_no_error_arrives_is_nan() -> None:
    net, clamps = chain(5)
    found = diagnosis.update_similarity(pcsim.Simulator(net, pcsim.Relaxation(2, 0.001)), clamps)
    assert math.isnan(found["input->hidden1"])
    assert found["hidden4->output"] == pytest.approx(1.0, abs=1e-3)


def test_similarity_needs_a_rule_that_learns_afterwards() -> None:
    net, clamps = chain()
    with pytest.raises(StateError, match="learns at every inference step"):
        diagnosis.update_similarity(pcsim.Simulator(net, rule=pcsim.IncrementalUpdate()), clamps)


def test_figures(tmp_path: Path) -> None:
    traces = {"PC": recorded(), "spiking": recorded(pcsim.Spiking(0.0))}
    net, clamps = chain()
    similarity = diagnosis.update_similarity(pcsim.Simulator(net, pcsim.Relaxation(5, 0.1)), clamps)
    figures = {
        "errors": plots.error_by_level(traces),
        "imbalance": plots.imbalance_by_step(traces),
        "front": plots.error_front(traces),
        "similarity": plots.similarity_by_edge({"PC": similarity}),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
    line = figures["front"].axes[0].lines[0]
    assert line.get_xdata().tolist() == line.get_ydata().tolist() == [0, 1, 2, 3, 4]
    assert [text.get_text() for text in figures["imbalance"].axes[0].get_legend().get_texts()] == ["PC", "spiking"]
    assert figures["similarity"].axes[0].lines[0].get_ydata().tolist() == list(similarity.values())


def test_nothing_to_draw_is_refused() -> None:
    for draw in (plots.imbalance_by_step, plots.error_front, plots.similarity_by_edge):
        with pytest.raises(SettingError, match="at least one curve"):
            draw({})
    net, clamps = chain()
    silent = pcsim.Simulator(net).infer(clamps)
    for measure in (diagnosis.level_energies, diagnosis.level_errors, diagnosis.imbalance, diagnosis.arrivals):
        with pytest.raises(StateError, match="record=True"):
            measure(silent)


def regression(energy: pcsim.Energy, weight: float = 2.0) -> tuple[pcsim.Network, float]:
    """A linear chain of Gaussian latents with one output, and 1 + Σ J Jᵀ of it."""
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([2, 3, 3, 1], activation=nn.Identity, energy=energy).double()
    second, last = (net.edges[name].module.weight for name in ("hidden1->hidden2", "hidden2->output"))
    with torch.no_grad():
        last *= weight / last.norm()
        return net, float(1 + last.square().sum() + (last @ second).square().sum())


def test_latents_stretch_the_threshold_of_a_robust_energy() -> None:
    """The energy acts on errors of the forward pass as its Moreau envelope does: a Huber loss of threshold S δ."""
    net, stretch = regression(pcsim.Huber(0.1))
    assert stretch > 4
    sim, images = pcsim.Simulator(net, pcsim.Relaxation(400, 0.1, momentum=0.7)), torch.randn(6, 2).double()
    errors = torch.tensor([[0.05], [-0.15], [0.25], [-0.3], [0.1 * stretch + 0.3], [-9.0]]).double()
    clamps = {"input": images, "output": sim.predict({"input": images})["output"] + errors}
    sim.infer(clamps)
    beyond = errors.abs() > 0.1 * stretch
    left = torch.where(beyond, errors - errors.sign() * 0.1 * (stretch - 1), errors / stretch)
    torch.testing.assert_close(net["output"].error, left, rtol=1e-8, atol=1e-8)
    assert diagnosis.outliers(sim) == {"output": diagnosis.Outliers(forward=4, relaxed=2)}
    sim.infer({**clamps, "output": (clamps["output"], errors < 0)})
    assert diagnosis.outliers(sim) == {"output": diagnosis.Outliers(forward=2, relaxed=1)}


@pytest.mark.parametrize(
    ("energy", "bound"),
    [(pcsim.Laplace(0.5), 0.5), (pcsim.Huber(0.5), 0.5), (pcsim.StudentT(0.25), 0.5)],
)
def test_what_counts_as_an_outlier(energy: pcsim.Energy, bound: float) -> None:
    net, _ = regression(energy)
    sim, images = pcsim.Simulator(net, pcsim.Relaxation(0, 0.1)), torch.zeros(4, 2).double()
    errors = bound * torch.tensor([[1.9], [2.1], [-1.9], [-2.1]]).double()
    sim.infer({"input": images, "output": errors})
    assert diagnosis.outliers(sim) == {"output": diagnosis.Outliers(2, 2)}


def test_outliers_are_of_robust_targets_that_are_predicted_from_what_is_given() -> None:
    net, _ = regression(pcsim.Gaussian())
    sim = pcsim.Simulator(net, pcsim.Relaxation(1, 0.1))
    with pytest.raises(StateError, match="call infer first"):
        diagnosis.outliers(sim)
    clamps = {"input": torch.zeros(1, 2).double(), "output": torch.full((1, 1), 9.0).double()}
    sim.infer(clamps)
    assert diagnosis.outliers(sim) == {}
    for prior in (None, 0.0):
        down = pcsim.Network()
        down.add_node("cause", (2,), prior=prior)
        down.add_node("image", (2,), energy=pcsim.StudentT())
        down.add_edge("cause", "image", nn.Linear(2, 2))
        sim = pcsim.Simulator(down, pcsim.Relaxation(1, 0.1))
        sim.infer({"image": torch.full((1, 2), 99.0)})
        assert diagnosis.outliers(sim) == {}
    net, _ = regression(pcsim.Huber())
    net.add_edge("hidden2", "hidden1", nn.Linear(3, 3).double())
    sim = pcsim.Simulator(net, pcsim.Relaxation(1, 0.1))
    sim.infer(clamps)
    assert diagnosis.outliers(sim) == {}
    assert not diagnosis.Outliers(0, 0).absorbed
    assert not diagnosis.Outliers(10, 1).absorbed
    assert diagnosis.Outliers(11, 1).absorbed


def test_random_parts_are_drawn_alike_for_both_gradients() -> None:
    """Into the target all rules learn what backprop does, if both have dropped out the same units."""
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([5, 6, 6, 3])
    net["hidden1"].transfer = nn.Sequential(nn.Dropout(0.5), nn.Tanh())
    net.edges["hidden2->output"].module = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1, precision=pcsim.Spiking(0.0)), pcsim.ForwardUpdate())
    clamps = {"input": torch.randn(4, 5), "output": torch.randn(4, 3)}
    for _ in range(3):
        found = diagnosis.update_similarity(sim, clamps)
        assert found["hidden2->output"] == pytest.approx(1, abs=1e-6)


def test_thresholds_and_means_at_other_values() -> None:
    energies = torch.tensor([[[4.0, 2.0], [0.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [0.5, 0.1], [3.0, 1.0]]])
    trace = pcsim.Trace(1, ("y", "h", "z"), {"h": 1, "y": 0, "z": 2}, energies)
    torch.testing.assert_close(
        diagnosis.level_energies(trace), torch.tensor([[3.0, 0.0, 1.0], [1.0, 0.3, 2.0]]).double()
    )
    assert diagnosis.arrivals(trace, above=0.2) == {0: 0, 1: 1, 2: 0}
    assert diagnosis.arrivals(trace, above=1.5) == {0: 0, 2: 1}
    assert diagnosis.imbalance(trace)[1] == pytest.approx(2.0 / 0.3)
    assert trace.energy("y").tolist() == energies[:, 0].tolist()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_progress_is_the_share_of_the_distance_that_is_gone(steps: int) -> None:
    """Between two Gaussian errors of precision one every unit's curvature is 2, so that each step leaves 1 − 2 rate."""
    net = pcsim.Network()
    for name in ("x", "h", "y"):
        net.add_node(name, (3,))
    net.add_edge("x", "h", nn.Linear(3, 3))
    net.add_edge("h", "y")
    clamps = {"x": torch.randn(2, 3).double(), "y": torch.randn(2, 3).double()}
    found = pcsim.diagnosis.curvature(pcsim.Simulator(net.double(), pcsim.Relaxation(steps, 0.1)), clamps)
    assert (found.smallest, found.largest) == pytest.approx((2, 2))
    assert found.progress == pytest.approx(1 - 0.8**steps, abs=1e-5)


def test_a_rate_that_is_not_safe_is_told_whatever_the_steps() -> None:
    net = pcsim.topologies.mlp([3, 4, 2], activation=nn.Identity).double()
    clamps = {"input": torch.randn(2, 3).double(), "output": torch.randn(2, 2).double()}
    safe = pcsim.diagnosis.curvature(pcsim.Simulator(net), clamps).safe_rate
    for rate, momentum, unsafe in ((1.02, 0.0, True), (0.98, 0.0, False), (1.02, 0.5, False)):
        relaxation = pcsim.Relaxation(1, rate * safe, momentum=momentum)
        found = pcsim.diagnosis.curvature(pcsim.Simulator(net, relaxation), clamps)
        assert found.verdict.startswith("unsafe: at rate") == unsafe

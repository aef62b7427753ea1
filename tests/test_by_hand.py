"""Small runs whose every number can be worked out on paper."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import pcsim
from pcsim.verify import RecordingOptimizer

ENGINES = pytest.mark.parametrize("engine", ["reference", "batched"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(number: float) -> Tensor:
    """A batch of one unit."""
    return torch.full((1, 1), number, dtype=torch.float64)


def two_weights() -> pcsim.Network:
    """x → h → y of one unit each, with weights ½ and 3."""
    net = pcsim.Network()
    for name in "xhy":
        net.add_node(name, (1,))
    for ends, weight in (("xh", 0.5), ("hy", 3.0)):
        nn.init.constant_(net.add_edge(*ends, nn.Linear(1, 1, bias=False)).module.weight, weight)
    return net.double()


def tanh_chain(*widths: int) -> pcsim.Network:
    """Nodes "n0" ... with tanh on all but the ends."""
    torch.manual_seed(0)
    net = pcsim.Network()
    for index, width in enumerate(widths):
        inner = 0 < index < len(widths) - 1
        net.add_node(f"n{index}", (width,), transfer=nn.Tanh() if inner else None)
        if index:
            net.add_edge(f"n{index - 1}", f"n{index}", nn.Linear(widths[index - 1], width))
    return net.double()


@ENGINES
def test_one_step(engine: str) -> None:
    # x = 2, h = ½ · 2 = 1, y = 3 · 1 = 3. With y clamped to 4 its error is 1, and the message to h is 3 · 1.
    net = two_weights()
    simulator = pcsim.Simulator(net, pcsim.Relaxation(1, 0.1), engine=engine)
    trace = simulator.infer({"x": one(2.0), "y": one(4.0)}, record=True)
    assert net["h"].forward_value.item() == 1.0
    assert net["y"].forward_prediction.item() == 3.0
    shown = {
        1.3: net["h"].value,
        1.0: net["h"].prediction,
        0.3: net["h"].error,
        3.9: net["y"].prediction,
        0.1: net["y"].error,
        0.045: net["h"].energy,
        0.005: net["y"].energy,
    }
    for expected, tensor in shown.items():
        assert tensor.item() == pytest.approx(expected, abs=1e-14)
    assert net.edges["h->y"].message.item() == pytest.approx(3 * 0.1, abs=1e-14)
    assert net.edges["x->h"].message.item() == pytest.approx(0.5 * 0.3, abs=1e-14)
    assert net.edges["h->y"].prediction.item() == pytest.approx(3.9, abs=1e-14)
    assert trace.energy("y").squeeze(1).tolist() == pytest.approx([0.5, 0.005], abs=1e-14)
    assert trace.energy(net["h"]).squeeze(1).tolist() == pytest.approx([0.0, 0.045], abs=1e-14)
    assert trace.free_energies is not None
    assert trace.free_energies.tolist() == pytest.approx([0.5, 0.05], abs=1e-14)
    assert simulator.energy()["h"].item() == pytest.approx(0.045, abs=1e-14)
    simulator.compute_gradients()
    assert net.edges["h->y"].module.weight.grad.item() == pytest.approx(-0.1 * 1.3, abs=1e-14)
    assert net.edges["x->h"].module.weight.grad.item() == pytest.approx(-0.3 * 2.0, abs=1e-14)


@ENGINES
def test_two_steps_of_incremental_learning(engine: str) -> None:
    # Rate 0.1, learning rate 0.01. Step 0: only h->y has an error, 1, and its source is at 1. Step 1: h is at 1.3 and
    # the weight at 3.01, so that the errors are 0.3 and 4 − 3.01 · 1.3.
    net = two_weights()
    simulator = pcsim.Simulator(net, pcsim.Relaxation(2, 0.1), pcsim.IncrementalUpdate(), engine=engine)
    recorder = RecordingOptimizer(net, 0.01)
    simulator.update({"x": one(2.0), "y": one(4.0)}, recorder)
    first, second = recorder.gradients
    error = 4.0 - 3.01 * 1.3
    assert first["edges.x->h.module.weight"] is None
    assert first["edges.h->y.module.weight"] == pytest.approx(-1.0, abs=1e-14)
    assert second["edges.x->h.module.weight"] == pytest.approx(-0.3 * 2.0, abs=1e-14)
    assert second["edges.h->y.module.weight"] == pytest.approx(-error * 1.3, abs=1e-14)
    assert net["h"].value.item() == pytest.approx(1.3 + 0.1 * (3.01 * error - 0.3), abs=1e-14)
    assert net.edges["x->h"].module.weight.item() == pytest.approx(0.5 + 0.01 * 0.6, abs=1e-14)


@ENGINES
def test_weight_gain_and_precision_in_inference_and_learning(engine: str) -> None:
    # π w ε = 5 · ½ · ε moves the values; only w ε teaches the weights. The gain is part of the prediction.
    net = pcsim.Network()
    net.add_node("x", (2,), prior=0.0)
    net.add_node("y", (3,), precision=5.0, energy_weight=0.5)
    edge = net.add_edge("x", "y", nn.Linear(2, 3, bias=False), gain=2.0)
    net.double()
    weight, target = edge.module.weight, normal(4, 3)
    simulator = pcsim.Simulator(net, pcsim.Relaxation(1, 0.1), engine=engine)
    simulator.infer({"y": target})
    torch.testing.assert_close(net["x"].value, 0.1 * 2.0 * 2.5 * target @ weight.detach())
    assert net["y"].precision.item() == 5.0
    simulator.compute_gradients()
    error = target - 2.0 * net["x"].value @ weight.detach().T
    torch.testing.assert_close(weight.grad, -0.5 * 2.0 * error.T @ net["x"].value / 4)


@ENGINES
def test_messages_from_several_targets_add_up(engine: str) -> None:
    net = pcsim.Network()
    net.add_node("x", (2,), prior=0.0)
    for name, gain in (("a", 1.0), ("b", -2.0)):
        net.add_node(name, (2,))
        net.add_edge("x", name, gain=gain)
    net.double()
    a, b = normal(3, 2), normal(3, 2, seed=1)
    pcsim.Simulator(net, pcsim.Relaxation(1, 0.1), engine=engine).infer({"a": a, "b": b})
    torch.testing.assert_close(net["x"].value, 0.1 * (a - 2.0 * b))


@ENGINES
def test_a_mask_holds_the_given_units_and_frees_the_others(engine: str) -> None:
    net = pcsim.Network()
    net.add_node("x", (2,), prior=0.0)
    net.add_node("y", (2,))
    net.add_edge("x", "y", gain=2.0)
    net.double()
    x, y = normal(2, 2), normal(2, 2, seed=1)
    mask = torch.tensor([[True, False], [False, False]])
    simulator = pcsim.Simulator(net, pcsim.Relaxation(1, 0.1), engine=engine)
    simulator.infer({"x": (x, mask), "y": y})
    expected = torch.where(mask, x, 0.1 * 2.0 * y)
    torch.testing.assert_close(net["x"].value, expected)
    torch.testing.assert_close(net["x"].forward_value, torch.where(mask, x, torch.zeros_like(x)))


@ENGINES
def test_the_paper_s_covariance_wipes_the_error_at_the_arrival(engine: str) -> None:
    # rate · peak = 1 at the arrival: v ← u + rate · messages, wherever v was; with level 1 that is at step 1.
    net = tanh_chain(3, 4, 2)
    clamps = {"n0": normal(2, 3), "n2": normal(2, 2, seed=1)}
    schedule = pcsim.Spiking.as_covariance(0.25)
    pcsim.Simulator(net, pcsim.Relaxation(2, 0.25, precision=schedule), engine=engine).infer(clamps)
    read = net.edges["n1->n2"].module
    start = net["n1"].forward_value
    first = start + 0.25 * 4.0 * (clamps["n2"] - net["n2"].forward_prediction) @ read.weight
    second = start + 0.25 * (clamps["n2"] - read(first)) @ read.weight
    torch.testing.assert_close(net["n1"].value, second.detach())


@ENGINES
def test_precision_shown_is_that_of_the_last_step(engine: str) -> None:
    net = tanh_chain(3, 4, 4, 2)
    clamps = {"n0": normal(2, 3), "n3": normal(2, 2, seed=1)}
    simulator = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1, precision=pcsim.Spiking(0.25, 3.0)), engine=engine)
    simulator.infer(clamps)
    assert [net[name].precision.item() for name in ("n1", "n2", "n3")] == [3.0, 0.25, 0.25]


@ENGINES
def test_an_error_arrives_at_its_level(engine: str) -> None:
    net = tanh_chain(2, 3, 3, 3, 2)
    clamps = {"n0": normal(1, 2), "n4": normal(1, 2, seed=1)}
    for steps in range(5):
        trace = pcsim.Simulator(net, pcsim.Relaxation(steps, 0.3), engine=engine).infer(clamps)
        for name in ("n1", "n2", "n3"):
            moved = bool((net[name].value != net[name].forward_value).any())
            assert moved == (steps >= trace.levels[name]), (name, steps)


@ENGINES
def test_momentum_starts_at_zero_for_every_batch(engine: str) -> None:
    net = tanh_chain(3, 4, 2)
    clamps = {"n0": normal(2, 3), "n2": normal(2, 2, seed=1)}
    simulator = pcsim.Simulator(net, pcsim.Relaxation(4, 0.3, momentum=0.9), engine=engine)
    runs = []
    for _ in range(4):
        simulator.infer(clamps)
        runs.append(net["n1"].value.clone())
    assert all(torch.equal(run, runs[0]) for run in runs)


@ENGINES
def test_gradients_accumulate_on_request(engine: str) -> None:
    net = tanh_chain(3, 4, 2)
    simulator = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2), engine=engine)
    batches = [{"n0": normal(2, 3, seed=seed), "n2": normal(2, 2, seed=seed + 5)} for seed in (0, 1)]
    alone = []
    for batch in batches:
        simulator.infer(batch)
        simulator.compute_gradients()
        alone.append([parameter.grad.clone() for parameter in net.parameters()])
    net.zero_grad()
    for batch in batches:
        simulator.infer(batch)
        simulator.compute_gradients(accumulate=True)
    for parameter, first, second in zip(net.parameters(), *alone, strict=True):
        torch.testing.assert_close(parameter.grad, first + second)


@ENGINES
def test_learning_twice_from_one_state_takes_the_weights_as_they_are(engine: str) -> None:
    # h stays at 1.3; the first update (learning rate 1) takes the weight of h->y from 3 to 3.13, that of x->h to 1.1.
    net = two_weights()
    simulator = pcsim.Simulator(net, pcsim.Relaxation(1, 0.1), engine=engine)
    simulator.infer({"x": one(2.0), "y": one(4.0)})
    simulator.learn(torch.optim.SGD(net.parameters(), 1.0))
    weight = net.edges["h->y"].module.weight
    assert weight.item() == pytest.approx(3.13, abs=1e-14)
    simulator.compute_gradients()
    assert weight.grad.item() == pytest.approx(-(4.0 - 3.13 * 1.3) * 1.3, abs=1e-14)
    assert net.edges["x->h"].module.weight.grad.item() == pytest.approx(-(1.3 - 1.1 * 2.0) * 2.0, abs=1e-14)


@ENGINES
def test_free_nodes_built_deterministic_learn_as_by_backprop(engine: str) -> None:
    gradients = []
    for deterministic, rule in (
        (False, pcsim.Backprop()),
        (True, pcsim.SettledUpdate()),
        (True, pcsim.ForwardUpdate()),
    ):
        torch.manual_seed(0)
        net = pcsim.Network()
        net.add_node("x", (3,))
        net.add_node("a", (4,), transfer=nn.Tanh(), deterministic=deterministic)
        net.add_node("b", (4,), transfer=nn.Tanh(), deterministic=deterministic)
        net.add_node("y", (2,), energy=pcsim.CrossEntropy())
        for source, target in ("xa", "ab", "xb", "by", "ay"):
            net.add_edge(source, target, nn.Linear(math.prod(net[source].shape), math.prod(net[target].shape)))
        net.double()
        simulator = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2), rule, engine=engine)
        simulator.infer({"x": normal(2, 3), "y": torch.softmax(normal(2, 2), 1)})
        simulator.compute_gradients()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15)


def drawn(edges: str, deterministic: str = "") -> pcsim.Network:
    """A graph from pairs of letters: "ab bc" is a → b → c."""
    net = pcsim.Network()
    for name in dict.fromkeys(edges.replace(" ", "")):
        net.add_node(name, (1,), deterministic=name in deterministic)
    for source, target in edges.split():
        net.add_edge(source, target)
    return net


@pytest.mark.parametrize(
    ("edges", "deterministic", "targets", "levels"),
    [
        ("ab bc cd", "", "d", {"a": 3, "b": 2, "c": 1, "d": 0}),
        ("ab bc cd ad", "", "d", {"a": 3, "b": 2, "c": 1, "d": 0}),  # the longest path counts
        ("ab bc cd", "c", "d", {"a": 2, "b": 1, "c": 1, "d": 0}),  # a deterministic node is no hop
        ("ab bs as sc", "s", "c", {"a": 2, "b": 1, "s": 1, "c": 0}),  # a residual block
        ("ab bc cd", "", "b", {"a": 1, "b": 0}),  # what lies beyond reaches no target
        ("ab bc cd", "", "bd", {"a": 1, "b": 0, "c": 1, "d": 0}),  # a target passes nothing on
        ("ab bc cb cd", "", "d", {"a": 3, "b": 2, "c": 1, "d": 0}),  # a cycle of two: shortest hops inside
        ("ab bc ca cd", "", "d", {"a": 3, "b": 2, "c": 1, "d": 0}),  # a cycle of three, left at c
        ("ab bc ca ad cd", "", "d", {"a": 3, "b": 3, "c": 2, "d": 0}),  # left at a too: the farther exit counts
        ("ab bb bc", "", "c", {"a": 2, "b": 1, "c": 0}),  # a self-loop
        ("ab ba", "", "b", {"a": 1, "b": 0}),  # a clamp cuts the cycle
        ("ab bc cd db de", "cd", "e", {"a": 2, "b": 1, "c": 1, "d": 1, "e": 0}),  # deterministic nodes in a cycle
        ("ab ac bd ce ef", "", "df", {"a": 3, "b": 1, "c": 2, "d": 0, "e": 1, "f": 0}),  # two targets
    ],
)
def test_levels(edges: str, deterministic: str, targets: str, levels: Mapping[str, int]) -> None:
    assert drawn(edges, deterministic).levels(list(targets)) == levels


@ENGINES
def test_what_started_at_a_learned_prior_stays_when_the_prior_moves(engine: str) -> None:
    net = pcsim.Network()
    net.add_node("x", (1,), prior=nn.Parameter(torch.tensor([1.0])))
    net.add_node("y", (1,))
    net.add_edge("x", "y")
    net.double()
    pcsim.Simulator(net, pcsim.Relaxation(0), engine=engine).infer({"y": one(2.0)})
    with torch.no_grad():
        net["x"].prior.add_(5.0)
    assert net["x"].value.item() == 1.0
    assert net["x"].forward_value.item() == 1.0
    assert net["x"].prediction.item() == 6.0


@ENGINES
def test_free_energy_holds_the_weighted_normaliser_of_a_learned_precision(engine: str) -> None:
    # 1.5 · (2 · ½ · (0.25 + 4) − ½ · 2 · log 2), one sample of two units.
    net = pcsim.Network()
    net.add_node("x", (2,))
    net.add_node("y", (2,), precision=pcsim.LearnedPrecision(initial=2.0), energy_weight=1.5)
    net.add_edge("x", "y")
    net.double()
    clamps = {"x": torch.zeros(1, 2).double(), "y": torch.tensor([[0.5, -2.0]]).double()}
    trace = pcsim.Simulator(net, pcsim.Relaxation(1), engine=engine).infer(clamps, record=True)
    expected = 1.5 * (4.25 - math.log(2.0))
    assert trace.free_energies is not None
    assert trace.free_energies.tolist() == pytest.approx([expected, expected], rel=1e-6)


def test_schedules() -> None:
    spiking = pcsim.Spiking(alpha=0.01, peak=2.0)
    assert [spiking.at(step, 1, 3) for step in range(3)] == [0.01, 2.0, 0.01]
    assert spiking.at(0, 0, 3) == 2.0
    assert spiking.at(0, None, 3) == 0.01, "no error ever arrives there"
    assert pcsim.Spiking() == pcsim.Spiking(alpha=1e-3, peak=1.0)
    assert pcsim.Decaying().at(3, None, 5) == 0.0
    assert pcsim.Constant(0.5).at(7, 3, 9) == 0.5


@ENGINES
def test_clamps_cut_cycles_and_what_lies_on_one_starts_at_zero(engine: str) -> None:
    cut, looped = drawn("ab ba").double(), drawn("ab bb").double()
    pcsim.Simulator(cut, pcsim.Relaxation(0), engine=engine).infer({"a": one(2.0)})
    assert cut["b"].forward_value.item() == 2.0
    pcsim.Simulator(looped, pcsim.Relaxation(0), engine=engine).infer({"a": one(2.0)})
    assert looped["b"].forward_value.item() == 0.0
    assert looped["b"].forward_prediction.item() == 2.0


@ENGINES
def test_what_is_given_in_part_is_a_target(engine: str) -> None:
    net = pcsim.Network()
    for name in "abc":
        net.add_node(name, (2,))
    net.add_edge("a", "b")
    net.add_edge("b", "c")
    part = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([True, False])
    sim = pcsim.Simulator(net.double(), pcsim.Relaxation(2, 0.5), engine=engine)
    trace = sim.infer({"a": torch.ones(1, 2).double(), "c": part})
    assert dict(trace.levels) == {"a": 2, "b": 1, "c": 0}
    assert net["b"].value.tolist() == [[2.0, 1.0]]  # 1 + ½ · 2, then −½ · 1 + ½ · 1
    found = sim.predict({"a": torch.ones(1, 2).double(), "c": part})
    assert found["c"][0, 0] == 3.0


class Tilted(pcsim.Energy):
    """½ (v − u)² + v: at rest one below its prediction."""

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return 0.5 * (value - prediction).square() + value


@ENGINES
def test_prediction_is_a_forward_pass_where_roots_are_given_or_have_priors_and_relaxes_elsewhere(engine: str) -> None:
    net = pcsim.Network()
    for name, options in (("root", {"prior": 3.0}), ("x", {}), ("h", {"energy": Tilted()}), ("y", {})):
        net.add_node(name, (1,), **options)
    for source, target in (("root", "h"), ("x", "h"), ("h", "y")):
        net.add_edge(source, target)
    sim = pcsim.Simulator(net.double(), pcsim.Relaxation(1, 0.5), engine=engine)
    assert sim.predict({"x": one(1.0)})["h"].item() == 4.0
    assert sim.predict({"x": one(1.0), "y": one(4.0)})["h"].item() == 3.5
    classes = pcsim.Network()
    classes.add_node("x", (2,))
    classes.add_node("h", (2,), energy=pcsim.CrossEntropy())
    classes.add_node("y", (2,))
    classes.add_edge("x", "h")
    classes.add_edge("h", "y")
    zeros = torch.zeros(1, 2).double()
    found = pcsim.Simulator(classes.double(), pcsim.Relaxation(1, 0.5), engine=engine).predict({"x": zeros, "y": zeros})
    # Read by y, h keeps a latent: −½ · ∂E/∂h = ½ · log ½ for each.
    torch.testing.assert_close(found["h"], torch.full((1, 2), 0.5 * math.log(0.5)).double())


@ENGINES
def test_a_deterministic_node_has_no_error(engine: str) -> None:
    net = drawn("ab bc", "b").double()
    pcsim.Simulator(net, pcsim.Relaxation(1, 0.5), engine=engine).infer({"a": one(2.0), "c": one(5.0)})
    assert net["b"].prediction.item() == 2.0
    assert net["b"].error.item() == 0.0
    assert net["c"].error.item() == 3.0

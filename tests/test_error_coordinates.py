"""Relaxation in error coordinates (SPEC §2) and rates by sample, against autograd on the energy and closed forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import pcsim
from pcsim.clamps import Clamps
from pcsim.engine.problem import Batch
from pcsim.engine.rates import Rates
from pcsim.errors import SettingError
from pcsim.verify import Case, strategies


@pytest.fixture(params=["reference", "batched"])
def engine(request: pytest.FixtureRequest) -> str:
    """Every engine in turn."""
    return str(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers in every run."""
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def chain(activation: type[nn.Module] = nn.Tanh) -> tuple[pcsim.Network, Clamps]:
    """Four edges."""
    net = pcsim.topologies.mlp([4, 6, 5, 6, 3], activation=activation).double()
    return net, {"input": draw(7, 4), "output": draw(7, 3)}


def branched() -> tuple[pcsim.Network, Clamps]:
    """Skips, a deterministic sum, a free root, a side branch, a target in the middle, and a partly given node."""
    net = pcsim.Network()
    for name, width in (("x", 4), ("z", 2), ("a", 5), ("b", 5), ("c", 3), ("side", 2), ("y", 3)):
        precision = {"a": 0.7, "y": 1.5}.get(name, 1.0)
        net.add_node(name, (width,), transfer=nn.Tanh() if name in "abc" else None, precision=precision)
    net.add_node("sum", (5,), deterministic=True)
    for source, target in (
        ("x", "a"), ("z", "a"), ("a", "b"), ("sum", "c"), ("c", "y"), ("sum", "y"), ("b", "side"), ("x", "c")
    ):  # fmt: skip
        net.add_edge(source, target, nn.Linear(net[source].shape[0], net[target].shape[0]))
    net.add_edge("a", "sum")
    net.add_edge("b", "sum", gain=0.7)
    net.double()
    some = torch.tensor([True, False, True, False, False])
    return net, {"x": draw(6, 4), "y": draw(6, 3), "b": (draw(6, 5), some)}


def energy_of_errors(net: pcsim.Network, clamps: Clamps, moving: Mapping[str, Tensor]) -> Tensor:
    """F as a function of the errors of predicted free nodes, and of the values of free roots, 0-d."""
    batch = len(next(iter(moving.values())))
    given = {n: c if isinstance(c, tuple) else (c, torch.ones_like(c, dtype=torch.bool)) for n, c in clamps.items()}
    value: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    left = list(net.nodes.values())
    while left:
        node = next(n for n in left if all(edge.source_name in value for edge in n.incoming))
        left.remove(node)
        if not node.incoming:
            value[node.name] = given[node.name][0] if node.name in given else moving[node.name]
            continue
        prediction = node.transfer(sum(e.gain * e.module(value[e.source_name]) for e in node.incoming))
        own = prediction if node.deterministic or node.name not in moving else prediction + moving[node.name]
        if node.name in given:
            own = torch.where(given[node.name][1], given[node.name][0], own)
        value[node.name] = own.expand(batch, *node.shape)
        if not node.deterministic:
            unit = node.energy_function.unit_energy(value[node.name], prediction)
            total = total + node.energy_weight * (node.own_precision * unit).sum()
    return total


def net_input(clamps: Clamps) -> Tensor:
    """What is given of the input."""
    found = clamps["input" if "input" in clamps else "x"]
    assert isinstance(found, Tensor)
    return found


def free(net: pcsim.Network, clamps: Clamps) -> list[str]:
    """Names of the nodes that move."""
    return [n.name for n in net.nodes.values() if not n.deterministic and not isinstance(clamps.get(n.name), Tensor)]


@pytest.mark.parametrize("build", [chain, branched])
def test_errors_descend_autograd_s_gradient_of_the_energy(engine: str, build) -> None:  # type: ignore[no-untyped-def]
    """ε ← ε − rate · ∂F/∂ε, by autograd on F as a function of the errors, for every free node at every step."""
    net, clamps = build()
    rate, batch = 0.2, len(net_input(clamps))
    moving = {name: torch.zeros(batch, *net[name].shape, dtype=torch.float64) for name in free(net, clamps)}
    for steps in range(5):
        sim = pcsim.Simulator(net, pcsim.ErrorRelaxation(steps, rate), engine=engine)
        sim.infer(clamps)
        for name, expected in moving.items():
            found = net[name].error if net[name].incoming else net[name].value
            units = ~clamps[name][1] if name in clamps else slice(None)
            torch.testing.assert_close(found[:, units], expected[:, units], rtol=1e-11, atol=1e-12)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in moving.items()}
        slopes = torch.autograd.grad(energy_of_errors(net, clamps, leaves), list(leaves.values()))
        moving = {name: moving[name] - rate * slope for name, slope in zip(leaves, slopes, strict=True)}


def backprop_and_one_step(
    net: pcsim.Network, clamps: Clamps, rate: float, engine: str
) -> list[Mapping[nn.Parameter, Tensor]]:
    """Gradients of backprop, and of one step of errors."""
    found = []
    for relaxation, rule in ((None, pcsim.Backprop()), (pcsim.ErrorRelaxation(1, rate), None)):
        sim = pcsim.Simulator(net, relaxation, rule, engine=engine)
        sim.infer(clamps)
        found.append(sim.gradients())
    return found


@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh, nn.GELU])
def test_the_first_step_is_rate_times_backprop(engine: str, activation: type[nn.Module]) -> None:
    """From ε = 0: rate · backprop's gradient for hidden edges, and backprop's own for the edge into the target."""
    net, clamps = chain(activation)
    exact, found = backprop_and_one_step(net, clamps, 1e-7, engine)
    for edge in net.edges.values():
        factor = 1.0 if edge.target_name == "output" else 1e-7
        for parameter in edge.parameters():
            scale = factor * float(exact[parameter].abs().max())
            assert float((found[parameter] - factor * exact[parameter]).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("build", [chain, branched])
def test_it_rests_where_the_values_rest(engine: str, build) -> None:  # type: ignore[no-untyped-def]
    """Relaxed to the end, latents are those of the state form (SPEC §10), to 1e-8."""
    net, clamps = build()
    if "z" in net.nodes:  # a free root may go on for ever towards where its tanh saturates
        clamps["z"] = draw(6, 2)
    sim = pcsim.Simulator(net, pcsim.ErrorRelaxation(3000, 0.1), engine="batched")
    sim.infer(clamps)
    settled = {name: node.value for name, node in net.nodes.items()}
    there = {name: settled[name] for name in free(net, clamps)}
    pcsim.Simulator(net, pcsim.Relaxation(1), engine=engine).equilibrium(clamps, init=there)
    for name, node in net.nodes.items():
        torch.testing.assert_close(node.value, settled[name], rtol=0, atol=1e-8)


def test_small_errors_are_kept_as_such(engine: str) -> None:
    """In float32, far below the rounding of the values, errors still are rate · backprop's adjoint."""
    net = pcsim.topologies.mlp([8, *[16] * 6, 4])
    x, y = torch.randn(5, 8), torch.randn(5, 4)
    exact, found = backprop_and_one_step(net, {"input": x, "output": y}, 1e-12, engine)
    for edge in list(net.edges.values())[:-1]:
        for parameter in edge.parameters():
            one, other = found[parameter].double().flatten(), exact[parameter].double().flatten()
            assert float(one @ other / (one.norm() * other.norm())) > 0.999999


def test_previous_start_goes_on_from_the_same_errors(engine: str) -> None:
    """Twice five steps from where the first five ended are ten."""
    net, clamps = branched()
    whole = pcsim.Simulator(net, pcsim.ErrorRelaxation(10, 0.1), engine=engine)
    whole.infer(clamps)
    expected = {name: node.value for name, node in net.nodes.items()}
    parts = pcsim.Simulator(net, pcsim.ErrorRelaxation(5, 0.1, start="previous"), engine=engine)
    parts.infer(clamps)
    parts.infer(clamps)
    for name, node in net.nodes.items():
        torch.testing.assert_close(node.value, expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold_predictions": True}, "hold_predictions"),
        ({"multipliers": 0.1}, "multipliers"),
        ({"precision": pcsim.Spiking()}, "no arrival to wait for"),
    ],
)
def test_what_does_not_go_with_errors_is_refused(options: dict[str, object], message: str) -> None:
    """By name, when the object is made."""
    with pytest.raises(SettingError, match=message):
        pcsim.ErrorRelaxation(3, **options)  # type: ignore[arg-type]


def test_a_cycle_is_refused_by_name(engine: str) -> None:
    """No order gives the values there."""
    net = pcsim.Network()
    for name in ("x", "a", "b", "y"):
        net.add_node(name, (2,))
    for source, target in (("x", "a"), ("a", "b"), ("b", "a"), ("b", "y")):
        net.add_edge(source, target, nn.Linear(2, 2))
    sim = pcsim.Simulator(net, pcsim.ErrorRelaxation(3), engine=engine)
    with pytest.raises(SettingError, match="'a', 'b' lie on a cycle"):
        sim.infer({"x": torch.randn(3, 2), "y": torch.randn(3, 2)})
    sim.infer({"x": torch.randn(3, 2), "b": torch.randn(3, 2), "y": torch.randn(3, 2)})


@pytest.mark.parametrize("rule", [pcsim.ForwardUpdate(), pcsim.IncrementalUpdate(), pcsim.ArrivalUpdate()])
def test_rules_that_learn_from_errors_on_their_way_are_refused(rule: pcsim.LearningRule) -> None:
    """All errors move at once."""
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.ErrorRelaxation(3), rule)
    with pytest.raises(SettingError, match="all of them at once"):
        sim.update(clamps, torch.optim.SGD(net.parameters(), 0.1))


SETTLED = (pcsim.SettledUpdate(),)
ACYCLIC = strategies.networks(cycles=False)
SMALL = strategies.networks(nodes=(2, 5), cycles=False)
thorough = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@settings(thorough, max_examples=30)
@given(case=strategies.cases(ACYCLIC, rules=SETTLED, by_errors=True, judged=True, sampled=True))
def test_engines_agree_on_random_graphs(case: Case) -> None:
    """Values, energies, messages and gradients, None or not, with every energy, prior, mask and combination."""
    pcsim.verify.check_engines_agree(case)


def by_errors(case: Case) -> pcsim.ErrorRelaxation:
    """Plain steps of errors, as many as the case has."""
    return pcsim.ErrorRelaxation(case.relaxation.steps, case.relaxation.rate)


@thorough
@given(case=strategies.cases(SMALL, rules=SETTLED, momentum=False, most_steps=2, most_samples=2))
def test_random_graphs_descend_in_their_errors(case: Case) -> None:
    """By autograd on F with values that follow, and gradients of the weights at the state that is reached."""
    for engine in ("reference", "batched"):
        pcsim.verify.check_gradients(case.network, case.clamps, by_errors(case), engine=engine)


@thorough
@given(case=strategies.cases(SMALL, rules=SETTLED, momentum=False, most_steps=2, most_samples=1))
def test_a_small_step_of_errors_does_not_raise_the_energy(case: Case) -> None:
    """With a rate below 2/L, L the largest eigenvalue of the Hessian in the errors."""
    pcsim.verify.check_descent(case.network, case.clamps, by_errors(case))


def test_it_is_found_not_to_be_local() -> None:
    """Within a step an error crosses the whole network."""
    net, clamps = chain()
    pcsim.verify.check_locality(net, clamps, pcsim.Relaxation(2, 0.1))
    with pytest.raises(AssertionError, match="node 'hidden1': its value after one step"):
        pcsim.verify.check_locality(net, clamps, pcsim.ErrorRelaxation(2, 0.1))


def test_a_failing_check_prints_code_with_it() -> None:
    """So that it fails again."""
    net, clamps = chain()
    case = Case(net, dict(clamps), pcsim.ErrorRelaxation(3, 0.2), pcsim.SettledUpdate())  # type: ignore[arg-type]
    assert "relaxation = pcsim.ErrorRelaxation(steps=3, rate=0.2" in repr(case)
    judged = attrs.evolve(case, relaxation=pcsim.Relaxation(3, 0.2, least_rate=0.1))
    assert "least_rate=0.1" in repr(judged)


# Rates by sample


def energies(trace: pcsim.Trace, net: pcsim.Network) -> Tensor:
    """F of each sample at constant precision, (steps + 1, batch)."""
    assert trace.energies is not None
    weights = [net[name].energy_weight * float(net[name].own_precision) for name in trace.nodes]
    return torch.einsum("tnb,n->tb", trace.energies, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("relaxation", [pcsim.Relaxation, pcsim.ErrorRelaxation])
def test_no_sample_s_energy_ever_rises(engine: str, relaxation: type[pcsim.Relaxation]) -> None:
    """At a rate that is far too large for some samples, where without it the energy explodes."""
    net, clamps = branched()
    sim = pcsim.Simulator(net, relaxation(60, 2.5, least_rate=1e-4), engine=engine)
    course = energies(sim.infer(clamps, record=True), net)
    assert all(bool((after <= before).all()) for before, after in pairwise(course))
    assert bool((course[-1] < 0.9 * course[0]).all())


@pytest.mark.parametrize("relaxation", [pcsim.Relaxation, pcsim.ErrorRelaxation])
def test_a_sample_s_path_does_not_depend_on_the_others(engine: str, relaxation: type[pcsim.Relaxation]) -> None:
    """Each sample alone ends where it ends beside the others."""
    net, clamps = chain()
    assert isinstance(clamps["output"], Tensor)
    assert isinstance(clamps["input"], Tensor)
    clamps["output"] = clamps["output"] * torch.tensor([0.1, 30, 1, 0.5, 10, 3, 0.01]).double().unsqueeze(1)
    sim = pcsim.Simulator(net, relaxation(25, 1.2, least_rate=0.01), engine=engine)
    sim.infer(clamps)
    together = {name: node.value for name, node in net.nodes.items()}
    for sample in range(7):
        sim.infer({name: tensor[sample : sample + 1] for name, tensor in clamps.items()})
        for name, node in net.nodes.items():
            torch.testing.assert_close(node.value[0], together[name][sample], rtol=1e-9, atol=1e-9)


def test_rates_are_halved_by_hand(engine: str) -> None:
    """One free unit between two given ones: F = ½(v − a)² + ½(v − b)², whose steps multiply the distance by 1 − 2r.

    At r = 1.5 a step doubles the distance to the rest, and is taken back, at .75 it halves it.
    """
    net = pcsim.Network()
    for name in ("a", "v", "b"):
        net.add_node(name, (1,))
    net.add_edge("a", "v")
    net.add_edge("v", "b")
    given = {"a": torch.zeros(1, 1).double(), "b": torch.full((1, 1), 2.0).double()}
    net.double()
    places = []
    for steps in range(5):
        sim = pcsim.Simulator(net, pcsim.Relaxation(steps, 1.5, least_rate=0.5), engine=engine)
        sim.infer(given)
        places.append(float(net["v"].value))
    # The rest is at 1, the start at 0.
    assert places == [0.0, 0.0, 1.5, 0.75, 1.125]


def test_the_least_rate_is_the_floor(engine: str) -> None:
    """Below it no rate falls: the step that still raises the energy is taken back again and again."""
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(8, 50.0, least_rate=40.0), engine=engine)
    course = energies(sim.infer(clamps, record=True), net)
    assert bool((course == course[0]).all())


def test_a_step_at_a_rate_that_is_small_enough_is_plain(engine: str) -> None:
    """Where the energy always falls, nothing differs from one rate for all."""
    net, clamps = branched()
    plain = pcsim.Relaxation(10, 0.05)
    pcsim.Simulator(net, plain, engine=engine).infer(clamps)
    expected = {name: node.value for name, node in net.nodes.items()}
    pcsim.Simulator(net, attrs.evolve(plain, least_rate=0.01), engine=engine).infer(clamps)
    for name, node in net.nodes.items():
        torch.testing.assert_close(node.value, expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least_rate": 0.0}, "0 < least_rate"),
        ({"least_rate": 0.9}, "0 < least_rate"),
        ({"least_rate": True}, "expected a finite number or None"),
        ({"least_rate": 0.1, "momentum": 0.5}, "momentum"),
        ({"least_rate": 0.1, "precision": pcsim.Spiking()}, "changes from step to step"),
        ({"least_rate": 0.1, "temperature": 1.0}, "temperature"),
        ({"least_rate": 0.1, "hold_predictions": True}, "hold_predictions"),
    ],
)
def test_a_least_rate_says_what_it_takes(options: dict[str, object], message: str) -> None:
    """By name, when the object is made."""
    with pytest.raises(SettingError, match=message):
        pcsim.Relaxation(3, 0.5, **options)  # type: ignore[arg-type]


def test_incremental_learning_is_refused_beside_it() -> None:
    """It changes the energy at every step."""
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.5, least_rate=0.1), pcsim.IncrementalUpdate())
    with pytest.raises(SettingError, match="judges steps"):
        sim.update(clamps, torch.optim.SGD(net.parameters(), 0.1))


@thorough
@given(case=strategies.cases(rules=(pcsim.SettledUpdate(), pcsim.ForwardUpdate()), judged=True))
def test_engines_agree_on_rates_by_sample(case: Case) -> None:
    """On random graphs, cycles among them."""
    pcsim.verify.check_engines_agree(case)


def test_a_sample_s_rate_by_hand() -> None:
    """Fallen, unchanged, risen and NaN, and down to the least."""
    batch = Batch({}, 4, torch.float64, torch.device("cpu"))
    rates, nan = Rates(pcsim.Relaxation(1, 0.8, least_rate=0.3), batch), math.nan
    assert rates.judge(torch.tensor([1.0, 1.0, 1.0, 1.0]).double()) is None
    rose = rates.judge(torch.tensor([0.5, 1.0, 2.0, nan]).double())
    assert rose is not None
    assert rose.tolist() == [False, False, True, True]
    assert rates.factor.tolist() == pytest.approx([1.0, 0.5, 0.5, 0.5])
    assert rates.judge(torch.tensor([0.5, 0.9, 0.9, 0.9]).double()) is None  # compared with what was before the rise
    assert rates.factor.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])
    rates.judge(torch.tensor([0.5, 0.9, 0.9, 0.9]).double())
    assert rates.factor.tolist() == pytest.approx([0.375] * 4)
    assert rates.scale(torch.ones(4, 2).double(), 1)[:, 1].tolist() == pytest.approx([0.375] * 4)

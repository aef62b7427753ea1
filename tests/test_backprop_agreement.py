"""Local rules that are backprop's, to the last digit: by autograd on the whole network, float64 and float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import pcsim
from pcsim import topologies, verify

exact = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
RATE = 0.8
RATES = st.sampled_from((0.25, 0.5, 0.8))
Problem = tuple[pcsim.Network, dict[str, Tensor]]
"""A network, and what is given of it."""


@st.composite
def problems(draw: st.DrawFn, *, partial: bool = True) -> Problem:
    """Random acyclic networks with deterministic nodes, gains, parallel edges, cross-entropy, BatchNorm and masks."""

    def options(shape: tuple[int, ...]) -> dict[str, object]:
        normalises = len(shape) == 1 and draw(st.booleans())
        transfer = nn.BatchNorm1d(shape[0]) if normalises else draw(st.sampled_from((nn.Tanh, nn.Identity)))()
        return {"transfer": transfer, "energy_weight": 1.0, "precision": 1.0}

    net = draw(verify.networks(cycles=False, priors=False, node_factory=options))
    given = draw(verify.clamps(net, batch=3, targets=True, every_root=True, partial=partial))
    whole = {n: g[0] if isinstance(g, tuple) and net[n].outgoing else g for n, g in given.items()}
    if not any(net[name].incoming for name in whole):
        sink = next((node for node in net.nodes.values() if node.incoming), None)
        if sink is None:
            sink = net.add_node("sink", net["n0"].shape)
            net.add_edge("n0", sink, nn.Identity())
        whole[sink.name] = torch.randn(3, *sink.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return net, whole


def targets(problem: Problem) -> list[str]:
    """Names of what is given of the nodes with incoming edges."""
    net, given = problem
    return [name for name in given if net[name].incoming]


def arriving(problem: Problem, rate: float, **options: bool) -> pcsim.Relaxation:
    """A relaxation that nothing attenuates, for as long as errors are on their way."""
    net, _ = problem
    steps = max(net.levels(targets(problem)).values()) + 1
    return pcsim.Relaxation(steps, rate, precision=pcsim.Spiking.for_rate(rate), **options)


def arrival_with_held_predictions(problem: Problem, rate: float, engine: str) -> None:
    relaxation = arriving(problem, rate, hold_predictions=True)
    verify.check_backprop_agreement(*problem, relaxation, engine=engine, tolerance=1e-12)


def arrival_on_balanced_paths(problem: Problem, rate: float, engine: str) -> None:
    net, clamps = problem
    balanced = pcsim.balance_paths(net, rate, peak=1 / rate, targets=targets(problem)), clamps
    verify.check_backprop_agreement(*balanced, arriving(balanced, rate), engine=engine, tolerance=1e-12)


@pytest.mark.parametrize("check", [arrival_with_held_predictions, arrival_on_balanced_paths], ids=lambda f: f.__name__)
@pytest.mark.parametrize("graphs", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_arrival_is_backprop(check: Callable[[Problem, float, str], None], graphs: int) -> None:
    drawn = given(problems(), RATES, st.sampled_from(("batched", "reference")))
    settings(exact, max_examples=graphs)(drawn(check))()


@settings(exact, max_examples=25)
@given(problems(partial=False))
def test_held_predictions_relaxed_to_the_end_are_backprop(problem: Problem) -> None:
    relaxation = pcsim.Relaxation(120, 0.5, hold_predictions=True)
    for rule in (pcsim.SettledUpdate(), pcsim.ForwardUpdate()):
        verify.check_backprop_agreement(*problem, relaxation, rule, tolerance=1e-8)


@settings(exact, max_examples=40)
@given(verify.cases(rules=[pcsim.ArrivalUpdate()], momentum=False, most_steps=3))
def test_the_arrival_rule_descends_each_energy_as_its_error_arrives(case: verify.Case) -> None:
    verify.check_gradients(case.network, case.clamps, case.relaxation, case.rule)


def test_attenuated_arrival_is_backprop_times_the_attenuation() -> None:
    torch.manual_seed(0)
    net, rate = topologies.mlp([6, 5, 5, 5, 3]).double(), 0.7
    clamps = {"input": torch.randn(4, 6, dtype=torch.float64), "output": torch.randn(4, 3, dtype=torch.float64)}
    local = gradients(net, clamps, pcsim.Relaxation(5, rate, precision=pcsim.Spiking(alpha=0.0)), pcsim.ArrivalUpdate())
    whole = gradients(net, clamps, pcsim.Relaxation(0), pcsim.Backprop())
    for name, node in zip(net.edges, list(net.nodes)[1:], strict=True):
        level = net.levels()[node]
        for part in ("weight", "bias"):
            key = f"edges.{name}.module.{part}"
            torch.testing.assert_close(local[key], rate**level * whole[key], rtol=1e-12, atol=0)


def test_a_step_of_the_wrong_size_is_found() -> None:
    torch.manual_seed(0)
    net = topologies.residual_mlp(4, 3, 2, blocks=2)
    clamps = {"input": torch.randn(2, 4), "output": torch.randn(2, 2)}
    relaxation = pcsim.Relaxation(6, 0.5, precision=pcsim.Spiking.for_rate(0.5))
    with pytest.raises(AssertionError, match="gradient of 'edges"):  # the skips are short, and predictions move
        verify.check_backprop_agreement(net, clamps, relaxation)
    verify.check_backprop_agreement(net, clamps)


def test_the_check_says_what_it_needs() -> None:
    net = topologies.mlp([2, 3, 2])
    half = torch.tensor([True, False, False])
    with pytest.raises(pcsim.errors.GraphError, match="no node with incoming edges is clamped"):
        verify.check_backprop_agreement(net, {"input": torch.randn(2, 2)})
    given = {"input": torch.randn(2, 2), "hidden1": (torch.randn(2, 3), half), "output": torch.randn(2, 2)}
    with pytest.raises(pcsim.errors.GraphError, match="'hidden1' is clamped in part and predicts other nodes"):
        verify.check_backprop_agreement(net, given)


def gradients(
    net: pcsim.Network, clamps: dict[str, Tensor], relaxation: pcsim.Relaxation, rule: pcsim.LearningRule
) -> dict[str, Tensor]:
    """What a rule leaves, by parameter name."""
    sim = pcsim.Simulator(net, relaxation, rule)
    sim.infer(clamps)
    found = sim.gradients()
    return {name: found[parameter] for name, parameter in net.named_parameters()}


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two tensors, whatever their sizes."""
    scaled = [tensor.double() / tensor.double().abs().max() for tensor in (one, other)]
    return float(functional.cosine_similarity(scaled[0].flatten(), scaled[1].flatten(), dim=0))


def residual(blocks: int) -> pcsim.Network:
    return topologies.residual_mlp(64, 32, 10, blocks=blocks, gain=1 / math.sqrt(blocks))


NETWORKS: dict[str, tuple[Callable[[], pcsim.Network], tuple[int, ...]]] = {
    "mlp of 20": (lambda: topologies.mlp([64] * 20 + [10]), (64,)),
    "mlp of 80": (lambda: topologies.mlp([64] * 80 + [10]), (64,)),
    "mlp of 1,000": (lambda: topologies.mlp([64] * 1000 + [10]), (64,)),
    "residual of 130": (lambda: residual(64), (64,)),
    "residual of 1,002": (lambda: residual(500), (64,)),
    "VGG10": (lambda: topologies.vgg("VGG10", width=0.25), (3, 32, 32)),
    "VGG15": (lambda: topologies.vgg("VGG15", width=0.25), (3, 32, 32)),
    "VGG19": (lambda: topologies.vgg("VGG19", width=0.25), (3, 32, 32)),
    "ResNet18": (lambda: topologies.resnet("ResNet18", width=0.25, batch_norm=True), (3, 32, 32)),
}


DEEPEST = ("1,000", "1,002")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.endswith(DEEPEST) else ()) for n in NETWORKS]
)
def test_float32_loses_nothing_at_any_depth(name: str) -> None:
    net, clamps, steps = network_of(name)
    arrival = pcsim.Relaxation(steps, RATE, precision=pcsim.Spiking.for_rate(RATE))
    held = attrs.evolve(arrival, hold_predictions=True)
    whole = gradients(net, clamps, pcsim.Relaxation(0), pcsim.Backprop())
    balanced = pcsim.balance_paths(net, RATE, peak=1 / RATE)
    runs = [(balanced, arrival), (net, held)]
    if name == "residual of 1,002":  # without auxiliary nodes each error passes through all blocks below, in its step
        del runs[1]
    for network, relaxation in runs:
        found = gradients(network, clamps, relaxation, pcsim.ArrivalUpdate())
        for key, gradient in whole.items():
            assert cosine(found[key], gradient) > 0.9999, key


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.endswith(DEEPEST) else ()) for n in NETWORKS]
)
def test_float32_loses_only_what_the_rates_attenuate_below_its_numbers(name: str) -> None:
    net, clamps, steps = network_of(name)
    balanced = pcsim.balance_paths(net, RATE)
    relaxation = pcsim.Relaxation(steps, RATE, precision=pcsim.Spiking(alpha=0.0))
    single = gradients(balanced, clamps, relaxation, pcsim.ForwardUpdate())
    twice = {node: value.double() for node, value in clamps.items()}
    double = gradients(copy.deepcopy(balanced).double(), twice, relaxation, pcsim.ForwardUpdate())
    for key, gradient in double.items():
        if float(gradient.abs().max()) > 1e-36:  # what is smaller is no normal number in float32
            assert cosine(single[key], gradient) > 0.9999, key


def network_of(name: str) -> tuple[pcsim.Network, dict[str, Tensor], int]:
    """A network with fresh weights, what is given of it, and the steps until every error has arrived."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net = make()
    labels = functional.one_hot(torch.randint(10, (8,)), 10).float()
    return net, {"input": torch.randn(8, *shape), "output": labels}, max(net.levels().values()) + 1


@pytest.mark.parametrize(
    "relaxation", [pcsim.Relaxation(4, 0.5), pcsim.Relaxation(1, 0.5, precision=pcsim.Spiking.for_rate(0.5))], ids=str
)
def test_what_speaks_too_early_or_ends_too_soon_is_refused_on_the_shortest_network(
    relaxation: pcsim.Relaxation,
) -> None:
    net = pcsim.topologies.mlp([2, 3, 2])
    sim = pcsim.Simulator(net, relaxation, pcsim.ArrivalUpdate())
    with pytest.raises(pcsim.errors.SettingError, match=r"before they have all arrived|within 1 steps"):
        sim.infer({"input": torch.ones(2, 2), "output": torch.ones(2, 2)})

"""The batched engine against its oracle, the reference engine, on random graphs and on what has to survive."""

from __future__ import annotations

import copy
import math
import pickle
import random
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

import pcsim
from pcsim import verify
from pcsim.engine.batched.engine import BatchedEngine
from pcsim.engine.planning.plan import Plan

LOOSE = {"held": True, "sampled": True, "multiplied": True, "stops": True}
RULES = (*verify.RULES, pcsim.ArrivalUpdate())
CASES = verify.cases(rules=RULES, **LOOSE)
everything = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
ENGINES = ("reference", "batched")
WITHOUT = ("leave_out", "stacking", "lasting_errors", "direct_moves")


@pytest.mark.parametrize("graphs", [35, pytest.param(200, marks=pytest.mark.slow)])
def test_batched_equals_reference(graphs: int) -> None:
    def check(case: verify.Case) -> None:
        verify.check_engines_agree(case)

    settings(everything, max_examples=graphs)(given(CASES)(check))()


@pytest.mark.parametrize("graphs", [25, pytest.param(120, marks=pytest.mark.slow)])
def test_every_shortcut_changes_nothing(graphs: int) -> None:
    def check(case: verify.Case, switch: str) -> None:
        verify.check_engines_agree(case, ("reference", partial(BatchedEngine, **{switch: False})))

    settings(everything, max_examples=graphs)(given(CASES, st.sampled_from(WITHOUT))(check))()


@attrs.frozen
class Drawn(pcsim.PrecisionSchedule):
    """A precision drawn for every step and level, often zero: errors are sent when no schedule of ours would."""

    seed: int
    quiet: bool
    """Whether it is zero until the error has arrived, as the arrival rule asks for."""

    def at(self, step: int, level: int | None, steps: int) -> float:
        if self.quiet and step < (level or 0):
            return 0.0
        return random.Random(f"{self.seed} {step} {level}").choice((0.0, 0.0, 0.0, 1.0, 0.5))


@pytest.mark.parametrize("graphs", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_engines_agree_whenever_errors_are_sent(graphs: int) -> None:
    def check(case: verify.Case, seed: int) -> None:
        schedule = Drawn(seed, quiet=case.rule.at_arrival)
        verify.check_engines_agree(attrs.evolve(case, relaxation=attrs.evolve(case.relaxation, precision=schedule)))

    settings(everything, max_examples=graphs)(given(CASES, st.integers(0, 2**16))(check))()


RECURRING = {(0, 0), (1, 1), (2, 2), (3, 3), (4, 0), (5, 1)}


class Recurring(pcsim.PrecisionSchedule):
    """Spikes at the arrival, and once more at the targets and before them."""

    def at(self, step: int, level: int | None, steps: int) -> float:
        return float((step, level) in RECURRING)


@pytest.mark.parametrize("steps", [4, 5, 6])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_an_error_does_not_last_where_another_comes_later(rule: pcsim.LearningRule, steps: int) -> None:
    net, clamps = chain()
    doubles = {name: tensor.double() for name, tensor in clamps.items()}
    verify.check_engines_agree(
        verify.Case(net.double(), doubles, pcsim.Relaxation(steps, 0.3, precision=Recurring()), rule)
    )


@pytest.mark.parametrize("precision", [pcsim.Spiking(alpha=0.0), pcsim.Constant()], ids=["silent", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_multipliers_count_whatever_the_precision(precision: pcsim.PrecisionSchedule, steps: int) -> None:
    net, clamps = chain()
    net["hidden2"].own_precision = 0.0
    doubles = {name: tensor.double() for name, tensor in clamps.items()}
    relaxation = pcsim.Relaxation(steps, 0.2, precision=precision, multipliers=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pcsim.PrecisionWarning)  # of what the error does not reach in few steps
        verify.check_engines_agree(verify.Case(net.double(), doubles, relaxation, pcsim.SettledUpdate()))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_multipliers_do_not_grow_before_a_step(steps: int) -> None:
    net = pcsim.Network()
    for name in ("x", "a", "b"):
        net.add_node(name, (3,), transfer=nn.Tanh())
    for source, target in (("x", "a"), ("a", "b"), ("b", "a")):  # values of a cycle start away from predictions
        net.add_edge(source, target, nn.Linear(3, 3))
    relaxation = pcsim.Relaxation(steps, 0.2, multipliers=0.5)
    verify.check_engines_agree(verify.Case(net.double(), {"x": torch.randn(2, 3).double()}, relaxation))


def test_a_transfer_that_learns_is_evaluated_again_where_nothing_before_it_does() -> None:
    net = pcsim.Network()
    net.add_node("x", (4,))
    net.add_node("h", (4,), transfer=nn.PReLU(4))
    net.add_node("y", (2,))
    net.add_edge("x", "h", nn.Linear(4, 4)).requires_grad_(False)
    net.add_edge("h", "y", nn.Linear(4, 2))
    clamps = {"x": torch.randn(3, 4).double(), "y": torch.randn(3, 2).double()}
    for record in (False, True):
        case = verify.Case(net.double(), clamps, pcsim.Relaxation(5, 0.3), pcsim.IncrementalUpdate(), record=record)
        verify.check_engines_agree(case)


def joined(ends: list[tuple[str, str, int]]) -> tuple[pcsim.Network, dict[str, Tensor]]:
    """A root x, nodes a and b in two stacks, a target; edges of as many kinds as there are numbers in ``ends``."""
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("x", (3,))
    a, b = (sorted({end[place] for end in ends}) for place in (0, 1))
    for name in a:
        net.add_node(name, (3,), transfer=nn.Tanh())
    for name in b:
        net.add_node(name, (4,), transfer=nn.Tanh())
    net.add_node("y", (2,))
    for name in a:
        net.add_edge("x", name, nn.Linear(3, 3))
    for source, target, kind in ends:
        net.add_edge(source, target, nn.Linear(3, 4, bias=bool(kind)))
    for name in b:
        net.add_edge(name, "y", nn.Linear(4, 2))
    return net.double(), {"x": torch.randn(3, 3).double(), "y": torch.randn(3, 2).double()}


@pytest.mark.parametrize(
    "ends",
    [
        [("a0", "b0", 0), ("a2", "b1", 0), ("a1", "b2", 0), ("a3", "b3", 0)],
        [("a0", "b0", 0), ("a1", "b0", 0), ("a0", "b1", 1), ("a1", "b1", 1)],
        [("a0", "b0", 0), ("a1", "b1", 0), ("a2", "b1", 0), ("a0", "b0", 1), ("a1", "b0", 1), ("a2", "b1", 1)],
    ],
    ids=["crossed", "two of a kind into one", "unevenly"],
)
def test_rows_that_do_not_follow_each_other(ends: list[tuple[str, str, int]]) -> None:
    net, clamps = joined(ends)
    for rule in (pcsim.SettledUpdate(), pcsim.IncrementalUpdate()):
        verify.check_engines_agree(verify.Case(net, clamps, pcsim.Relaxation(5, 0.2), rule))


def test_stacked_nodes_that_share_an_energy_weigh_it_each_by_their_own_precision() -> None:
    net, clamps = joined([(f"a{number}", f"b{number}", 0) for number in range(3)])
    energy = Leaning()
    for number in range(3):
        net[f"b{number}"].energy_function, net[f"b{number}"].own_precision = energy, 0.5 + number
    for rule in RULES[:3]:
        verify.check_engines_agree(verify.Case(net, clamps, pcsim.Relaxation(5, 0.1), rule))


def test_stacks_that_share_their_modules_learn_from_both() -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("x", (3,))
    for number in range(2):
        for name, transfer in (("a", nn.Tanh()), ("b", nn.Sigmoid()), ("c", nn.ReLU())):
            net.add_node(f"{name}{number}", (3,), transfer=transfer)
        shared = nn.Linear(3, 3)
        net.add_edge("x", f"a{number}", nn.Linear(3, 3))
        net.add_edge(f"a{number}", f"b{number}", shared)
        net.add_edge(f"b{number}", f"c{number}", shared)
    clamps = {name: torch.randn(2, 3).double() for name in ("x", "c0", "c1")}
    for rule in RULES[:3]:
        verify.check_engines_agree(verify.Case(net.double(), clamps, pcsim.Relaxation(5, 0.1), rule))


@pytest.mark.parametrize("rule", RULES[:3], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("sooner", ["a0", "a2"])
def test_of_one_stack_some_have_moved_when_all_are_heard(sooner: str, rule: pcsim.LearningRule) -> None:
    net, clamps = joined([(f"a{number}", f"b{number}", 0) for number in range(3)])
    for number in range(3):  # an activation before the weights, so that messages read the values of sources
        edge = net.edges[f"a{number}->b{number}"]
        edge.module = nn.Sequential(nn.GELU(), edge.module)
    net.add_edge(sooner, "y", nn.Linear(3, 2).double())
    for precision in (pcsim.Constant(), pcsim.Spiking(0.1)):
        relaxation = pcsim.Relaxation(5, 0.3, precision=precision)
        verify.check_engines_agree(verify.Case(net, clamps, relaxation, rule))


@pytest.mark.parametrize("into", [nn.Tanh(), nn.Softshrink()], ids=["kernel", "autograd"])
def test_edges_without_a_kernel_are_each_computed_by_themselves(into: nn.Module) -> None:
    net, clamps = joined([(f"a{number}", f"b{number}", 0) for number in range(3)])
    for number in range(3):
        net.edges[f"a{number}->b{number}"].module = nn.Sequential(nn.Linear(3, 4), nn.Softshrink(0.1 * number)).double()
        net[f"b{number}"].transfer = copy.deepcopy(into)
    for rule in RULES[:3]:
        verify.check_engines_agree(verify.Case(net, clamps, pcsim.Relaxation(5, 0.1), rule))


@pytest.mark.parametrize("rule", RULES[:3], ids=lambda rule: type(rule).__name__)
def test_images_that_an_identity_hands_on_are_those_of_the_prediction(rule: pcsim.LearningRule) -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("x", (1, 4, 4))
    net.add_node("first", (1, 4, 4), transfer=nn.Tanh())
    net.add_node("a", (2, 4, 4))
    net.add_node("b", (2, 4, 4), transfer=nn.GELU())
    net.add_node("y", (3,))
    net.add_edge("x", "first", nn.Conv2d(1, 1, 3, padding=1))
    net.add_edge("first", "a", nn.Conv2d(1, 2, 3, padding=1))
    net.add_edge("a", "b")
    net.add_edge("b", "y", nn.Sequential(nn.Flatten(), nn.Linear(32, 3)))
    clamps = {"x": torch.randn(2, 1, 4, 4).double(), "y": torch.randn(2, 3).double()}
    verify.check_engines_agree(verify.Case(net.double(), clamps, pcsim.Relaxation(6, 0.3), rule))


@pytest.mark.parametrize("before", [nn.Tanh(), nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())], ids=type)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_an_error_is_not_pulled_back_over_one_that_it_is_a_view_of(before: nn.Module, rule: pcsim.LearningRule) -> None:
    """A flattening hands on a view of the target's error, which another edge reads later."""
    net = pcsim.Network()
    for name, shape in {"x": (4,), "image": (2, 3, 3), "h": (5,), "y": (18,)}.items():
        net.add_node(name, shape)
    net.add_edge("x", "image", nn.Sequential(nn.Linear(4, 18), nn.Unflatten(1, (2, 3, 3))))
    net.add_edge("x", "h", nn.Linear(4, 5))
    net.add_edge("image", "y", nn.Sequential(copy.deepcopy(before), nn.Flatten()))
    net.add_edge("h", "y", nn.Linear(5, 18))
    clamps = {"x": torch.randn(3, 4).double(), "y": torch.randn(3, 18).double()}
    precision = pcsim.Spiking(alpha=0.0) if rule.at_arrival else pcsim.Constant()
    verify.check_engines_agree(verify.Case(net.double(), clamps, pcsim.Relaxation(6, 0.2, precision=precision), rule))


def test_stacks_as_high_and_of_other_widths_send_messages_of_their_own() -> None:
    net = pcsim.Network()
    net.add_node("x", (2,))
    widths = {"a": 3, "b": 5, "c": 4}
    for name, width in widths.items():
        for row in range(2):
            net.add_node(f"{name}{row}", (width,))
    for row in range(2):
        net.add_edge("x", f"a{row}", nn.Linear(2, 3))
        for source, target in ("ab", "bc"):
            linear = nn.Linear(widths[source], widths[target])
            net.add_edge(f"{source}{row}", f"{target}{row}", nn.Sequential(nn.Tanh(), linear))
    clamps = {name: torch.randn(2, *net[name].shape).double() for name in ("x", "c0", "c1")}
    verify.check_engines_agree(verify.Case(net.double(), clamps, pcsim.Relaxation(5, 0.2)))


def test_edges_are_stacked_in_the_order_of_their_ends() -> None:
    """Whatever the order in which they were added, so that what equal chains read need not be gathered."""
    ends = [(f"a{number}", f"b{number}", 0) for number in (3, 0, 2, 1)]
    net, clamps = joined(ends)
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.2))
    sim.infer(clamps)
    assert "gather a" not in str(sim.program)
    assert "stack weights a0->b0, a1->b1, a2->b2" in str(sim.program)


class Leaning(pcsim.Energy):
    """An energy that pulls where value and prediction are the same."""

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return 0.5 * (value - prediction).square() + 0.1 * value - 0.2 * torch.cos(prediction)


class Widening(nn.Module, pcsim.Energy):
    """An energy with a parameter of its own."""

    rests_at_prediction = True

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.zeros(()))

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return torch.exp(self.spread) * torch.log(torch.cosh(value - prediction))


SHARED = Leaning()
"""One object, whatever the node's weight."""


def odd_nodes(shape: tuple[int, ...]) -> st.SearchStrategy[Mapping[str, Any]]:
    """Nodes whose energies are not at rest, are shared, or have parameters; transfers unit by unit and others."""
    energies = st.sampled_from((pcsim.Gaussian, Leaning, lambda: SHARED, pcsim.StudentT, Widening))
    transfers = st.sampled_from((lambda: None, nn.Tanh, nn.ReLU, lambda: nn.Sequential(nn.Tanh(), nn.GELU())))
    drawn = st.tuples(energies, transfers, st.sampled_from((1.0, 0.5, 2.0)), st.sampled_from((1.0, 0.5, 0.0)))
    return drawn.map(
        lambda options: {
            "energy": options[0](),
            "transfer": options[1](),
            "energy_weight": options[2],
            "precision": options[3],
        }
    )


def odd_edges(source: tuple[int, ...], contribution: tuple[int, ...]) -> st.SearchStrategy[nn.Module]:
    """Edges that end in an activation, or begin with a normalisation, whose running statistics move."""

    def made(affine: nn.Module, kind: str) -> nn.Module:
        if kind == "activation last":
            return nn.Sequential(affine, nn.Tanh())
        if kind == "normalised" and len(source) == 1:
            return nn.Sequential(nn.BatchNorm1d(source[0], eps=0.1), nn.ReLU(), affine)
        return affine

    kinds = st.sampled_from(("plain", "activation last", "normalised"))
    return st.builds(made, verify.linear_edge_modules(source, contribution), kinds)


@settings(everything, max_examples=20)
@given(
    verify.cases(verify.networks(nodes=(2, 6), node_factory=odd_nodes, edge_factory=odd_edges), rules=RULES, stops=True)
)
def test_odd_parts(case: verify.Case) -> None:
    verify.check_engines_agree(case)


@st.composite
def layers(draw: st.DrawFn) -> pcsim.verify.SeededNetwork:
    """Layers of equal nodes, joined by equal edges in any order, some of them twice, with a deterministic layer."""
    width, net = draw(st.integers(2, 4)), verify.SeededNetwork()
    kinds = st.sampled_from(("latent", "latent", "deterministic"))
    before = [net.add_node(f"x{k}", (2,)).name for k in range(width)]
    for depth in range(draw(st.integers(1, 3))):
        kind, transfer = draw(kinds), draw(st.sampled_from((nn.Tanh, nn.Identity)))
        layer = [f"{'abc'[depth]}{k}" for k in range(width)]
        weights = draw(st.sampled_from((1.0, 0.5))), draw(st.sampled_from((1.0, 2.0)))
        for k, name in enumerate(layer):
            inner = kind == "deterministic"
            weight = 1.0 if inner else weights[k % 2]
            net.add_node(name, (2,), transfer=transfer(), deterministic=inner, energy_weight=weight)
        for sources in (draw(st.permutations(before)), *draw(st.lists(st.permutations(before), max_size=1))):
            ends = draw(st.sampled_from(("linear", "identity", "activated")))
            for source, target in zip(sources, layer, strict=True):
                module = nn.Identity() if ends == "identity" else nn.Linear(2, 2)
                net.add_edge(source, target, nn.Sequential(nn.Tanh(), module) if ends == "activated" else module)
        before = layer
    net.add_node("y", (2,))
    for name in before:
        net.add_edge(name, "y", nn.Linear(2, 2))
    net.double().seed_weights(draw(st.integers(0, 1000)))
    return net


@settings(everything, max_examples=25)
@given(verify.cases(layers(), rules=RULES, targets=True, partial=False, stops=True))
def test_equal_nodes_joined_in_any_order(case: verify.Case) -> None:
    verify.check_engines_agree(case)


def images(generator: int = 0) -> tuple[pcsim.Network, dict[str, Tensor]]:
    """A small convolutional network with every kernel that is written by hand."""
    torch.manual_seed(generator)
    net = pcsim.Network()
    first = net.add_node("image", (2, 8, 8))
    pooled = net.add_node("pooled", (4, 4, 4), transfer=nn.Sequential(nn.GELU(approximate="tanh"), nn.MaxPool2d(2)))
    second = net.add_node("second", (4, 4, 4), transfer=nn.GELU())
    third = net.add_node("third", (4, 2, 2))
    hidden = [net.add_node(f"hidden{k}", (6,), transfer=nn.ReLU()) for k in range(3)]
    output = net.add_node("output", (3,))
    net.add_edge(first, pooled, nn.Conv2d(2, 4, 3, padding=1))
    net.add_edge(pooled, second, nn.Conv2d(4, 4, 3, padding=1, bias=False))
    net.add_edge(second, third, nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1)))
    net.add_edge(third, hidden[0], nn.Sequential(nn.Flatten(), nn.Linear(16, 6)))
    for before, after in ((0, 1), (1, 2)):
        net.add_edge(hidden[before], hidden[after], nn.Sequential(nn.Tanh(), nn.Linear(6, 6, bias=False)), gain=0.5)
    net.add_edge(hidden[2], output, nn.Linear(6, 3))
    return net.double(), {"image": torch.randn(3, 2, 8, 8).double(), "output": torch.randn(3, 3).double()}


@pytest.mark.parametrize("rule", verify.RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    "precision", [pcsim.Constant(), pcsim.Spiking(0.0), pcsim.Spiking(0.01), pcsim.Decaying()], ids=str
)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_kernels_by_hand(rule: pcsim.LearningRule, precision: pcsim.PrecisionSchedule, momentum: float) -> None:
    net, clamps = images()
    relaxation = pcsim.Relaxation(9, 0.1, precision=precision, momentum=momentum)
    verify.check_engines_agree(verify.Case(net, clamps, relaxation, rule))


def chain(depth: int = 4, width: int = 5) -> tuple[pcsim.Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, *[width] * (depth - 1), 2])
    return net, {"input": torch.randn(4, 3), "output": torch.randn(4, 2)}


def trained(net: pcsim.Network, clamps: dict[str, Tensor], engine: str) -> list[Tensor]:
    """Weights after two updates."""
    sim = pcsim.Simulator(net, pcsim.Relaxation(6, 0.2), engine=engine)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        sim.update(clamps, optimizer)
    return [parameter.detach().clone() for parameter in net.parameters()]


class TestWeightsStayWhereTheyAre:
    """Edges of one kind are computed together, and nobody outside the engine notices."""

    def test_weights_keep_their_storage(self) -> None:
        net, clamps = chain()
        before = [parameter.untyped_storage().data_ptr() for parameter in net.parameters()]
        trained(net, clamps, "batched")
        assert [parameter.untyped_storage().data_ptr() for parameter in net.parameters()] == before
        assert len(set(before)) == len(before)

    def test_parameters_keep_their_identity(self) -> None:
        net, clamps = chain()
        before = list(net.parameters())
        pcsim.Simulator(net).infer(clamps)
        assert all(a is b for a, b in zip(before, net.parameters(), strict=True))

    def test_an_edit_in_place_is_seen(self) -> None:
        net, clamps = chain()
        sim, oracle = pcsim.Simulator(net), pcsim.Simulator(copy.deepcopy(net), engine="reference")
        sim.infer(clamps)
        for simulator in (sim, oracle):
            with torch.no_grad():
                simulator.network.edges["hidden1->hidden2"].module.weight.mul_(2.0)
            simulator.infer(clamps)
        torch.testing.assert_close(net["hidden1"].value, oracle.network["hidden1"].value)

    @pytest.mark.parametrize("change", ["state_dict", "parameter", "module", "data", "double"])
    def test_weights_that_change_between_runs_are_noticed(self, change: str) -> None:
        net, clamps = chain()
        twin = copy.deepcopy(net)
        pcsim.Simulator(net).infer(clamps)
        results = []
        for network, engine in ((net, "batched"), (twin, "reference")):
            torch.manual_seed(1)
            linear = network.edges["hidden2->hidden3"].module
            given = clamps
            if change == "state_dict":
                network.load_state_dict({name: tensor + 0.1 for name, tensor in network.state_dict().items()})
            elif change == "parameter":
                linear.weight = nn.Parameter(torch.randn(5, 5))
            elif change == "module":
                network.edges["hidden2->hidden3"].module = nn.Linear(5, 5)
            elif change == "data":
                linear.weight.data = torch.randn(5, 5)
            else:
                network.double()
                given = {name: tensor.double() for name, tensor in clamps.items()}
            results.append(trained(network, given, engine))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("change", ["data", "there and back"])
    def test_what_moves_a_parameter_of_an_edge_on_its_own_is_noticed(self, change: str) -> None:
        net, clamps = chain()
        sim, edge = pcsim.Simulator(net), net.edges["input->hidden1"]
        for _ in range(4):  # the programs that take turns are both made, and made stale
            sim.infer(clamps)
            if change == "data":
                edge.module.weight.data = torch.randn(5, 3)
            else:
                net.double().float()
                edge.module.weight.data.mul_(2.0)
        sim.infer(clamps)
        torch.testing.assert_close(net["hidden1"].forward_value, torch.tanh(edge.module(clamps["input"])))

    def test_two_simulators_on_one_network(self) -> None:
        net, clamps = chain()
        first, second = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1)), pcsim.Simulator(net, pcsim.Relaxation(5, 0.3))
        first.infer(clamps)
        slow = net["hidden1"].value.clone()
        second.infer(clamps)
        first.infer(clamps)
        torch.testing.assert_close(net["hidden1"].value, slow, rtol=0, atol=0)

    def test_state_dict_round_trip(self, tmp_path) -> None:
        net, clamps = chain()
        pcsim.Simulator(net).infer(clamps)
        torch.save(net.state_dict(), tmp_path / "weights")
        other, _ = chain()
        other.load_state_dict(torch.load(tmp_path / "weights"))
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


class TestGradients:
    def test_accumulated_over_batches(self) -> None:
        net, clamps = chain()
        sim = pcsim.Simulator(net, pcsim.Relaxation(6, 0.2))
        single = []
        for factor in (1.0, -0.5):
            sim.infer({"input": clamps["input"] * factor, "output": clamps["output"]})
            sim.compute_gradients()
            single.append([p.grad.clone() for p in net.parameters()])
        for factor in (1.0, -0.5):
            sim.infer({"input": clamps["input"] * factor, "output": clamps["output"]})
            sim.compute_gradients(accumulate=factor < 0)
        for parameter, first, second in zip(net.parameters(), *single, strict=True):
            torch.testing.assert_close(parameter.grad, first + second)

    def test_of_the_state_before_a_run_that_failed(self) -> None:
        net, clamps = chain()
        sim = pcsim.Simulator(net, pcsim.Relaxation(6, 0.2))
        sim.infer(clamps)
        sim.compute_gradients()
        expected = [p.grad.clone() for p in net.parameters()]
        value = net["hidden1"].value.clone()
        with pytest.raises(pcsim.errors.DivergenceError):
            sim.infer({"input": clamps["input"], "output": torch.full((4, 2), 3e38)})
        torch.testing.assert_close(net["hidden1"].value, value, rtol=0, atol=0)
        sim.compute_gradients()
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    def test_batches_of_two_sizes(self) -> None:
        net, clamps = chain()
        twin = copy.deepcopy(net)
        for network, engine in ((net, "batched"), (twin, "reference")):
            sim, optimizer = pcsim.Simulator(network, engine=engine), optim.SGD(network.parameters(), lr=0.1)
            for size in (4, 3, 4, 3):
                sim.update({name: tensor[:size] for name, tensor in clamps.items()}, optimizer)
        for got, expected in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, expected)


class TestPlan:
    """What is left out on a chain is as SPEC §7 says."""

    def test_spiking_with_the_forward_rule_is_the_work_of_backprop(self) -> None:
        depth = 6
        net, clamps = chain(depth)
        relaxation = pcsim.Relaxation(depth, 0.5, precision=pcsim.Spiking(alpha=0.0))
        sim = pcsim.Simulator(net, relaxation, pcsim.ForwardUpdate())
        sim.infer(clamps)
        phases = [sim.plan.phases[position] for position in sim.plan.sequence]
        assert sum(phase.refresh.sum() for phase in phases) == 0
        assert sum(phase.message.sum() for phase in phases) == depth - 1
        assert sim.plan.learning().refresh.sum() == 0
        assert sim.plan.learning().learn.sum() == depth

    def test_constant_precision_halves_the_work_at_the_depth(self) -> None:
        depth = 40
        net, clamps = chain(depth)
        sim = pcsim.Simulator(net, pcsim.Relaxation(depth, 0.1))
        sim.infer(clamps)
        assert sim.plan.left_out() == pytest.approx(0.5, abs=2 / depth)

    def test_repeated_steps_are_stored_once(self) -> None:
        net, clamps = chain(4)
        sim = pcsim.Simulator(net, pcsim.Relaxation(50, 0.1))
        sim.infer(clamps)
        assert len(sim.plan.sequence) == 50
        assert len(sim.plan.phases) <= 5

    def test_is_a_function_of_graph_and_rules_alone(self) -> None:
        net, clamps = chain()
        sim = pcsim.Simulator(net)
        sim.infer(clamps)
        first = str(sim.plan)
        sim.infer({name: tensor * 2 for name, tensor in clamps.items()})
        assert str(sim.plan) == first

    def test_prints_who_moves_and_what_is_left_out(self) -> None:
        net, clamps = chain(3)
        sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.5, precision=pcsim.Spiking(0.0)), pcsim.ForwardUpdate())
        sim.infer(clamps)
        text = str(sim.plan)
        assert "group of 2 latent 5, 2 edges into it: hidden1, hidden2" in str(sim.program)
        assert "step 1:" in text
        assert "move     hidden1, hidden2" in text
        assert "left out: " in text

    def test_a_node_that_is_active_once_learns_from_the_error_that_it_sent(self) -> None:
        depth, rate = 5, 0.3
        net, clamps = chain(depth)
        relaxation = pcsim.Relaxation(depth, rate, precision=pcsim.Spiking(alpha=0.0))
        sim = pcsim.Simulator(net, relaxation, pcsim.ForwardUpdate())
        sim.infer(clamps)
        hidden = [f"hidden{k}" for k in range(1, depth)]
        names = [node.name for node in sim.plan.wiring.nodes]
        factors = dict(zip(names, sim.plan.lasting_errors.tolist(), strict=True))
        assert [factors[name] for name in hidden] == pytest.approx([1 - rate] * (depth - 1))
        assert factors["output"] == 1.0
        assert math.isnan(factors["input"])

    @pytest.mark.parametrize("rule", [pcsim.ForwardUpdate(), pcsim.ArrivalUpdate()], ids=str)
    def test_what_it_moves_by_that_error_may_wait_for_the_end(self, rule: pcsim.LearningRule) -> None:
        depth, rate = 5, 0.3
        net, clamps = chain(depth)
        sim = pcsim.Simulator(net, pcsim.Relaxation(depth, rate, precision=pcsim.Spiking(alpha=0.0)), rule)
        sim.infer(clamps)
        waiting = [sim.plan.wiring.nodes[place].name for place in np.flatnonzero(sim.plan.finished)]
        assert waiting == [f"hidden{k}" for k in range(1, depth)]
        assert [operation.name for operation in sim.program.end] == ["own error"]
        sim.infer(clamps, record=True)
        assert not sim.program.end

    def test_a_node_whose_prediction_changes_does_not_wait(self) -> None:
        net = pcsim.Network()
        x, low, high, near, far = (net.add_node(name, (2,)) for name in ("x", "low", "high", "near", "far"))
        for source, target in ((x, low), (low, high), (high, near), (low, far)):
            net.add_edge(source, target, nn.Linear(2, 2))
        clamps = {"x": torch.randn(3, 2), "near": torch.randn(3, 2), "far": torch.randn(3, 2)}
        relaxation = pcsim.Relaxation(3, 0.3, precision=pcsim.Spiking(alpha=0.0))
        sim = pcsim.Simulator(net, relaxation, pcsim.ForwardUpdate())
        sim.infer(clamps)
        places = dict(zip(net.nodes, sim.plan.finished.tolist(), strict=True))
        assert [name for name, waits in places.items() if waits] == ["low"]

    @pytest.mark.parametrize(
        "relaxation",
        [
            pcsim.Relaxation(9, 0.3),
            pcsim.Relaxation(9, 0.3, precision=pcsim.Spiking(alpha=0.01)),
            pcsim.Relaxation(9, 0.3, precision=pcsim.Spiking(alpha=0.0), momentum=0.5),
            pcsim.Relaxation(9, 0.3, precision=pcsim.Spiking(alpha=0.0), tolerance=1e-6),
        ],
        ids=str,
    )
    def test_what_is_active_again_or_moves_on_does_not(self, relaxation: pcsim.Relaxation) -> None:
        net, clamps = chain(5)
        sim = pcsim.Simulator(net, relaxation, pcsim.ForwardUpdate())
        sim.infer(clamps)
        assert all(map(math.isnan, sim.plan.lasting_errors[:-1]))

    def test_two_targets_make_a_node_active_twice(self) -> None:
        net = pcsim.Network()
        x, h, near, far = (net.add_node(name, (2,)) for name in ("x", "h", "near", "far"))
        middle = net.add_node("middle", (2,))
        for source, target in ((x, h), (h, near), (h, middle), (middle, far)):
            net.add_edge(source, target, nn.Linear(2, 2))
        relaxation = pcsim.Relaxation(6, 0.3, precision=pcsim.Spiking(alpha=0.0))
        clamps = {name: torch.randn(3, 2).double() for name in ("x", "near", "far")}
        verify.check_engines_agree(verify.Case(net.double(), clamps, relaxation, pcsim.ForwardUpdate()))

    def test_early_stop_learns_from_the_step_it_reached(self) -> None:
        net, clamps = chain()
        twin = copy.deepcopy(net)
        steps = []
        for network, engine in ((net, "batched"), (twin, "reference")):
            sim = pcsim.Simulator(network, pcsim.Relaxation(500, 0.2, tolerance=1e-3), engine=engine)
            steps.append(sim.infer(clamps).steps)
            sim.compute_gradients()
        assert steps[0] == steps[1] < 500
        for got, expected in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad)


class Moody(nn.Linear):
    """A user's own module, which does something else in evaluation mode."""

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) * (2 if self.training else 1)


class TestFrozenStatistics:
    """SPEC §6: the running statistics move once per batch, whatever the number of inference steps."""

    @staticmethod
    def network(place: str) -> tuple[pcsim.Network, nn.BatchNorm1d]:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4)
        net = pcsim.Network()
        image, hidden, output = net.add_node("image", (3,)), None, None
        transfer = nn.Sequential(norm, nn.Tanh()) if place == "node" else nn.Tanh()
        hidden = net.add_node("hidden", (4,), transfer=transfer)
        output = net.add_node("output", (2,))
        linear = nn.Linear(3, 4)
        net.add_edge(image, hidden, nn.Sequential(linear, norm) if place == "edge" else linear)
        net.add_edge(hidden, output, nn.Linear(4, 2))
        return net, norm

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("place", ["edge", "node"])
    @pytest.mark.parametrize("rule", verify.RULES, ids=lambda rule: type(rule).__name__)
    def test_one_update_per_batch_with_its_own_statistics(
        self, engine: str, place: str, rule: pcsim.LearningRule
    ) -> None:
        net, norm = self.network(place)
        linear = net.edges["image->hidden"].module
        linear = linear[0] if place == "edge" else linear
        x, y = torch.randn(8, 3), torch.randn(8, 2)
        sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), rule, engine=engine)
        optimizer = optim.SGD(net.parameters(), lr=0.0)
        sim.infer({"image": x, "output": y})
        assert int(norm.num_batches_tracked) == 0
        sim.update({"image": x, "output": y}, optimizer)
        assert int(norm.num_batches_tracked) == 1
        with torch.no_grad():
            seen = linear(x)
        torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean(0))
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen.var(0))

    def test_prediction_uses_the_running_statistics_and_leaves_them(self) -> None:
        net, norm = self.network("node")
        with torch.no_grad():
            norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            norm.running_var.fill_(4.0)
        x = torch.randn(8, 3)
        before = norm.running_mean.clone()
        hidden = pcsim.Simulator(net).predict({"image": x})["hidden"]
        with torch.no_grad():
            expected = torch.tanh((net.edges["image->hidden"].module(x) - before) / (4.0 + norm.eps) ** 0.5)
        torch.testing.assert_close(hidden, expected)
        assert torch.equal(norm.running_mean, before)
        assert norm.training

    @pytest.mark.parametrize("rule", verify.RULES, ids=lambda rule: type(rule).__name__)
    @pytest.mark.parametrize("design", ["VGG5", "ResNet10"])
    def test_the_papers_networks_train_alike_in_both_engines(self, design: str, rule: pcsim.LearningRule) -> None:
        torch.manual_seed(0)
        if design == "VGG5":
            net = pcsim.topologies.vgg(design, image=(3, 16, 16), width=0.03, batch_norm=True)
        else:
            net = pcsim.topologies.resnet(design, image=(3, 8, 8), width=0.05, batch_norm=True)
            net = pcsim.balance_paths(net, 0.3)
        results = []
        for engine in ENGINES:
            twin = copy.deepcopy(net).double()
            sim = pcsim.Simulator(
                twin, pcsim.Relaxation(12, 0.3, precision=pcsim.Spiking(alpha=0.01)), rule, engine=engine
            )
            optimizer = optim.SGD(twin.parameters(), lr=0.05)
            draw = torch.Generator().manual_seed(1)
            for _ in range(2):
                image = torch.randn(4, *twin["input"].shape, generator=draw, dtype=torch.float64)
                sim.update({"input": image, "output": torch.randn(4, 10, generator=draw).double()}, optimizer)
            results.append(twin.state_dict())
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected, msg=lambda text, name=name: f"{name}: {text}")

    @pytest.mark.parametrize("disturbance", ["none", "centred", "relaxing predict", "weights"])
    @pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.ForwardUpdate()], ids=str)
    def test_statistics_are_those_of_the_state_that_is_learned_from(
        self, disturbance: str, rule: pcsim.LearningRule
    ) -> None:
        """Normalised deterministic nodes: their values are in tensors that runs share."""
        nudging = pcsim.Nudging(0.3, centred=True) if disturbance == "centred" else None
        results = []
        for engine in ENGINES:
            torch.manual_seed(0)
            net = pcsim.topologies.resnet((2,), image=(2, 4, 4), classes=3, width=0.05, batch_norm=True).double()
            sim = pcsim.Simulator(net, pcsim.Relaxation(6, 0.3), rule, nudging=nudging, engine=engine)
            clamps = {"input": torch.randn(4, 2, 4, 4).double(), "output": torch.randn(4, 3).double()}
            sim.infer(clamps)
            if disturbance == "relaxing predict":
                sim.predict({"output": clamps["output"]})
            if disturbance == "weights":
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.mul_(1.5)
            sim.learn(optim.SGD(net.parameters(), lr=0.1))
            results.append({name: buffer for name, buffer in net.named_buffers() if "running" in name})
        assert results[0]
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected, msg=lambda text, name=name: f"{name}: {text}")

    @pytest.mark.parametrize("place", ["edge", "node", "own"])
    def test_a_mode_that_is_changed_after_the_relaxation_counts_in_learning(self, place: str) -> None:
        results = []
        for engine in ENGINES:
            net, norm = self.network(place)
            norm.running_mean.fill_(0.5)
            if place == "own":
                torch.manual_seed(2)
                net.edges["image->hidden"].module = Moody(3, 4)
            torch.manual_seed(3)
            clamps = {"image": torch.randn(8, 3), "output": torch.randn(8, 2)}
            sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1), engine=engine)
            sim.infer(clamps)
            training = sim.gradients()
            net.eval()
            results.append([sim.gradients()[parameter] for parameter in net.parameters()])
            edge = next(net.edges["image->hidden"].module.parameters())
            assert not torch.equal(training[edge], sim.gradients()[edge])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)

    def test_both_engines_train_alike(self) -> None:
        results = []
        for engine in ENGINES:
            net, norm = self.network("edge")
            torch.manual_seed(3)
            sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine)
            optimizer = optim.SGD(net.parameters(), lr=0.1)
            for _ in range(3):
                sim.update({"image": torch.randn(8, 3), "output": torch.randn(8, 2)}, optimizer)
            results.append([*net.parameters(), norm.running_mean, norm.running_var])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_random_draws_are_held_through_a_batch(engine: str) -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([6, 8, 8, 3])
    net.edges["hidden1->hidden2"].module = nn.Sequential(nn.Dropout(0.5), net.edges["hidden1->hidden2"].module)
    sim = pcsim.Simulator(net, pcsim.Relaxation(30, 0.1), engine=engine)
    clamps = {"input": torch.randn(4, 6), "output": torch.randn(4, 3)}
    trace = sim.infer(clamps, record=True)
    totals = trace.free_energies
    assert bool((totals[1:] <= totals[:-1] * (1 + 1e-5)).all()), "the energy of one fixed draw descends"
    first = net["hidden1"].value.clone()
    sim.infer(clamps)
    assert not torch.equal(net["hidden1"].value, first), "another batch, another draw"


class Shaken(nn.Linear):
    """A user's own map that draws, in either mode."""

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) * (1 + torch.rand(self.out_features, dtype=value.dtype))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", ["sum", "product", "concatenation", "transfer", "behind a deterministic node"])
def test_random_parts_anywhere_draw_once_a_batch(engine: str, place: str) -> None:
    """Without a step, what is predicted anew is the forward prediction; with steps, the draws are the same ones."""
    torch.manual_seed(0)
    combine = {"product": pcsim.Product(), "concatenation": pcsim.Concatenate()}.get(place)
    net, half = pcsim.Network(), 2 if place == "concatenation" else 4
    net.add_node("x", (4,))
    net.add_node("h", (4,), combine=combine, transfer=nn.Dropout(0.5) if place == "transfer" else nn.Tanh())
    net.add_node("inner", (4,), deterministic=place.startswith("behind"))
    net.add_node("y", (4,))
    net.add_edge("x", "h", nn.Sequential(nn.Dropout(0.5), Shaken(4, half)), name="one")
    net.add_edge("x", "h", Shaken(4, half), name="other")
    net.add_edge("h", "inner", Shaken(4, 4))
    net.add_edge("inner", "y", nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    clamps = {"x": torch.randn(3, 4).double(), "y": torch.randn(3, 4).double()}
    sim = pcsim.Simulator(net.double(), pcsim.Relaxation(0, 0.1), engine=engine)
    for steps in (0, 3):
        sim.relaxation = pcsim.Relaxation(steps, 0.1)
        for _ in range(2):
            sim.infer(clamps, record=bool(steps))
            for name in ("h", "inner", "y")[: 1 if steps else 3]:
                torch.testing.assert_close(net[name].prediction, net[name].forward_prediction, rtol=0, atol=1e-12)
        total = sum(node.energy.sum() for node in net.nodes.values())
        again = sim.infer(clamps, record=True)
        torch.testing.assert_close(again.free_energies[-1], sum(node.energy.sum() for node in net.nodes.values()))
        assert total != again.free_energies[-1], "another batch, another draw"


@attrs.frozen
class Damped(pcsim.Relaxation):
    """A way of relaxing of a user's own: half of each move is put off to the next step."""

    def displacement(self, descent: Tensor, velocity: Tensor | None) -> tuple[Tensor, Tensor | None]:
        waiting = torch.zeros_like(descent) if velocity is None else velocity
        return self.rate * (0.5 * descent + waiting), 0.5 * descent


@pytest.mark.parametrize("precision", [pcsim.Constant(), pcsim.Spiking(0.0)], ids=str)
@pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.ForwardUpdate()], ids=str)
def test_a_displacement_of_one_s_own(rule: pcsim.LearningRule, precision: pcsim.PrecisionSchedule) -> None:
    net, clamps = chain(5)
    case = verify.Case(
        net.double(),
        {name: tensor.double() for name, tensor in clamps.items()},
        Damped(7, 0.2, precision=precision),
        rule,
    )
    verify.check_engines_agree(case)


@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_each_edge_draws_for_itself(engine: str) -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    for name in ("input", "left", "right"):
        net.add_node(name, (50,))
    for side in ("left", "right"):
        net.add_edge("input", side, nn.Dropout(0.5))
    clamps = {"input": torch.ones(4, 50), "left": torch.ones(4, 50), "right": torch.ones(4, 50)}
    pcsim.Simulator(net, engine=engine).infer(clamps)
    kept = [net[side].forward_prediction > 0 for side in ("left", "right")]
    assert 0.3 < (kept[0] == kept[1]).float().mean() < 0.7, "as two independent masks"


def test_a_user_s_kernel_is_used_and_right() -> None:
    class Doubling(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    class DoublingKernel(pcsim.Kernel[Doubling]):
        stacks, reads = True, "nothing"
        calls = 0

        def forward(self, call, value, out=None):
            type(self).calls += 1
            return torch.mul(value, 2, out=out)

        def message(self, call, delta, value, output, out=None):
            return torch.mul(delta, 2, out=out)

    pcsim.register_kernel(Doubling, DoublingKernel())
    verify.check_kernel(Doubling(), (3,))
    net = pcsim.Network()
    nodes = [net.add_node(f"n{k}", (3,)) for k in range(4)]
    for before, after in pairwise(nodes):
        net.add_edge(before, after, nn.Sequential(Doubling(), nn.Linear(3, 3)))
    net.double()
    clamps = {"n0": torch.randn(2, 3).double(), "n3": torch.randn(2, 3).double()}
    DoublingKernel.calls = 0
    verify.check_engines_agree(verify.Case(net, clamps, pcsim.Relaxation(5, 0.05), pcsim.SettledUpdate()))
    assert DoublingKernel.calls > 0


def test_what_equal_edges_add_up_to_goes_through_several_modules() -> None:
    net = pcsim.Network()
    net.add_node("image", (3,))
    net.add_node("hidden", (4,), transfer=nn.Sequential(nn.Tanh(), nn.GELU()))
    net.add_node("output", (2,))
    for name in ("first", "second"):
        net.add_edge("image", "hidden", nn.Linear(3, 4), name=name)
    net.add_edge("hidden", "output", nn.Linear(4, 2))
    net.double()
    clamps = {"image": torch.randn(5, 3).double(), "output": torch.randn(5, 2).double()}
    verify.check_engines_agree(verify.Case(net, clamps, pcsim.Relaxation(5, 0.1), pcsim.SettledUpdate()))


class Gains(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.linspace(0.5, 2.0, units))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.gains


class GainsKernel(pcsim.Kernel[Gains]):
    stacks, reads, fills_out, elementwise = True, "nothing", True, True

    def forward(self, call, value, out=None):
        return torch.mul(value, call.weights["gains"], out=out)

    def message(self, call, delta, value, output, out=None):
        return torch.mul(delta, call.weights["gains"], out=out)

    def gradients(self, call, delta, value, factor, out):
        torch.sum(factor * delta * value, 0, out=out["gains"])


@pytest.mark.parametrize("rule", verify.RULES, ids=lambda rule: type(rule).__name__)
def test_weights_of_a_transfer_learn_from_its_error_and_not_from_what_it_passes_on(rule: pcsim.LearningRule) -> None:
    pcsim.register_kernel(Gains, GainsKernel())
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 4, 4, 2])
    for name in ("hidden1", "hidden2"):
        net[name].transfer = nn.Sequential(Gains(4), nn.Tanh(), Gains(4))
    net.double()
    clamps = {"input": torch.randn(5, 3).double(), "output": torch.randn(5, 2).double()}
    verify.check_engines_agree(verify.Case(net, clamps, pcsim.Relaxation(5, 0.1), rule))


def test_a_wrong_kernel_is_caught() -> None:
    class Halving(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value / 2

    class WrongKernel(pcsim.Kernel[Halving]):
        def forward(self, call, value, out=None):
            return value / 2

        def message(self, call, delta, value, output, out=None):
            return delta

    pcsim.register_kernel(Halving, WrongKernel())
    with pytest.raises(AssertionError, match="message"):
        verify.check_kernel(Halving(), (3,))


def test_a_module_with_hooks_goes_through_autograd() -> None:
    net, clamps = chain()
    net.edges["hidden1->hidden2"].module.register_forward_hook(lambda module, given, output: 2 * output)
    twin = copy.deepcopy(net)
    with warnings.catch_warnings():
        got, expected = trained(net, clamps, "batched"), trained(twin, clamps, "reference")
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_plan_without_leaving_out_computes_everything() -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.5, precision=pcsim.Spiking(0.0)), pcsim.ForwardUpdate())
    sim.infer(clamps)
    assert Plan(sim._state.task, leave_out=False).left_out() == 0.0


def test_identities_of_one_stack_that_meet_in_it() -> None:
    """What an identity contributes are rows of the stack that its target stands in."""
    torch.manual_seed(0)
    net = pcsim.Network()
    for name in ("input", "h1", "h2", "h3", "mix"):
        net.add_node(name, (4,))
    net.add_node("output", (3,))
    net.add_edge("input", "h1", nn.Linear(4, 4))
    for source, target in (("h1", "h2"), ("h2", "h3")):
        net.add_edge(source, target, nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
    net.add_edge("h1", "mix")
    net.add_edge("h3", "mix")
    net.add_edge("mix", "output", nn.Linear(4, 3))
    balanced = pcsim.balance_paths(net, 0.3).double()
    clamps = {"input": torch.randn(2, 4).double(), "output": torch.randn(2, 3).double()}
    relaxation = pcsim.Relaxation(6, 0.3, precision=pcsim.Spiking(0.01))
    verify.check_engines_agree(verify.Case(balanced, clamps, relaxation, pcsim.SettledUpdate()))


@pytest.mark.parametrize("place", ["edge", "node", "tied"])
@pytest.mark.parametrize("rule", verify.RULES, ids=lambda rule: type(rule).__name__)
def test_a_parameter_that_is_used_twice_in_one_place(place: str, rule: pcsim.LearningRule) -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    twice = nn.Sequential(one, nn.Tanh(), other if place == "tied" else one)
    net = pcsim.Network()
    net.add_node("a", (4,))
    net.add_node("b", (4,), transfer=twice if place == "node" else None)
    net.add_node("c", (4,))
    net.add_edge("a", "b", nn.Linear(4, 4) if place == "node" else twice)
    net.add_edge("b", "c", nn.Linear(4, 4))
    clamps = {"a": torch.randn(5, 4).double(), "c": torch.randn(5, 4).double()}
    verify.check_engines_agree(verify.Case(net.double(), clamps, pcsim.Relaxation(4, 0.3), rule))


def test_normalisation_without_parameters_heads_a_chain() -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 4, 2])
    net.add_node("side", (4,))
    net.add_edge("hidden1", "side", nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 4)))
    clamps = {name: torch.randn(5, size).double() for name, size in (("input", 3), ("output", 2), ("side", 4))}
    verify.check_engines_agree(verify.Case(net.double(), clamps, pcsim.Relaxation(4, 0.3), pcsim.SettledUpdate()))


@pytest.mark.parametrize("engine", ENGINES)
def test_freezing_between_runs_is_noticed(engine: str) -> None:
    net, clamps = chain()
    sim, optimizer = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine), optim.SGD(net.parameters(), lr=0.1)
    weights = [net.edges[name].module.weight for name in ("hidden1->hidden2", "hidden2->hidden3")]
    weights[0].requires_grad_(False)
    for frozen, learning in (weights, weights[::-1]):
        before = frozen.clone(), learning.clone()
        frozen.requires_grad_(False)
        learning.requires_grad_(True)
        sim.update(clamps, optimizer)
        assert frozen.grad is None
        assert torch.equal(frozen, before[0])
        assert not torch.equal(learning, before[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_gains_and_weights_that_are_set_anew_hold_from_the_next_run_on(engine: str) -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine)
    sim.infer(clamps)
    net.edges["hidden1->hidden2"].gain = 0.5
    net["hidden2"].energy_weight = 3.0
    with pytest.raises(pcsim.errors.StateError, match="changed after it was relaxed"):
        sim.gradients()
    sim.infer(clamps)
    found = {name: node.value.clone() for name, node in net.nodes.items()}
    twin, _ = chain()
    twin.edges["hidden1->hidden2"].gain, twin["hidden2"].energy_weight = 0.5, 3.0
    pcsim.Simulator(twin, sim.relaxation, engine="reference").infer(clamps)
    for name, node in twin.nodes.items():
        torch.testing.assert_close(found[name], node.value)
    for part, setting in ((net["hidden2"], "energy_weight"), (net.edges["hidden1->hidden2"], "gain")):
        with pytest.raises(pcsim.errors.GraphError, match=f"{setting} nan given"):
            setattr(part, setting, math.nan)


@pytest.mark.parametrize("engine", ENGINES)
def test_looking_at_gradients_leaves_those_that_wait_for_a_step(engine: str) -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine)
    sim.infer(clamps)
    sim.compute_gradients()
    waiting = [parameter.grad.clone() for parameter in net.parameters()]
    sim.infer({name: 2 * clamp for name, clamp in clamps.items()})
    found = sim.gradients()
    for parameter, grad in zip(net.parameters(), waiting, strict=True):
        assert torch.equal(parameter.grad, grad)
        assert not torch.equal(found[parameter], grad)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_runs_in_inference_mode_learns_afterwards(engine: str) -> None:
    net, clamps = chain()
    sim, optimizer = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine), optim.SGD(net.parameters(), lr=0.1)
    with torch.inference_mode():
        sim.infer({name: clamp.clone() for name, clamp in clamps.items()})
        predicted = sim.predict({"input": clamps["input"]})["output"]
    assert not any(tensor.is_inference() for tensor in (predicted, *net.parameters()))
    before = [parameter.clone() for parameter in net.parameters()]
    sim.update(clamps, optimizer)
    assert not all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


def test_a_trace_tells_of_its_own_run_alone() -> None:
    """Two programs take turns in the same tensors, so that what a run leaves would be seen in the third."""
    net = pcsim.topologies.mlp([4, 5, 5, 5, 3])
    relaxation = pcsim.Relaxation(5, 0.3, precision=pcsim.Spiking(alpha=0.0))
    sims = {engine: pcsim.Simulator(net, relaxation, pcsim.ForwardUpdate(), engine=engine) for engine in ENGINES}
    for _ in range(4):
        clamps = {"input": torch.randn(2, 4), "output": torch.randn(2, 3)}
        traces = {engine: sim.infer(clamps, record=True) for engine, sim in sims.items()}
        for kept in ("energies", "error_norms", "free_energies"):
            batched, reference = (getattr(traces[engine], kept) for engine in ("batched", "reference"))
            torch.testing.assert_close(batched, reference)


class Viewing(nn.Module):
    """What many a user's own module does."""

    def forward(self, value: Tensor) -> Tensor:
        return value.view(value.size(0), -1)


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_of_the_users_own_see_contiguous_images(engine: str) -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("image", (2, 6, 6))
    net.add_node("conv", (3, 6, 6))
    net.add_node("output", (4,))
    net.add_edge("image", "conv", nn.Conv2d(2, 3, 3, padding=1))
    net.add_edge("conv", "output", nn.Sequential(Viewing(), nn.Linear(108, 4)))
    sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), engine=engine)
    image = torch.randn(5, 2, 6, 6)
    sim.update({"image": image, "output": torch.randn(5, 4)}, optim.SGD(net.parameters(), lr=0.1))
    predicted = sim.predict({"image": image})
    torch.testing.assert_close(predicted["output"], net.edges["conv->output"].module(predicted["conv"]).detach())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda sim: pickle.loads(pickle.dumps(sim))], ids=["copy", "pickle"])
def test_a_simulator_that_has_run_can_be_copied(engine: str, how: Callable[[object], pcsim.Simulator]) -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine)
    sim.update(clamps, optim.SGD(net.parameters(), lr=0.1))
    twin = how(sim)
    for each in (sim, twin):
        each.update(clamps, optim.SGD(each.network.parameters(), lr=0.1))
    for one, other in zip(net.parameters(), twin.network.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert one is not other


class TestRoundedMessages:
    def test_only_messages_are_rounded(self) -> None:
        """A float64 network with float32 messages: the forward pass is exact, the latents are close."""
        net, clamps = images()
        twin = copy.deepcopy(net)
        rounding = partial(BatchedEngine, message_dtype=torch.float32)
        for network, engine in ((net, rounding), (twin, "reference")):
            pcsim.Simulator(network, pcsim.Relaxation(9, 0.1), engine=engine).infer(clamps)
        for name in ("pooled", "third", "hidden1"):
            torch.testing.assert_close(net[name].forward_value, twin[name].forward_value, rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(net[name].value, twin[name].value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(net["hidden1"].value, twin["hidden1"].value)

    def test_half_precision_is_refused_on_a_cpu(self) -> None:
        net, clamps = chain()
        sim = pcsim.Simulator(net, engine=partial(BatchedEngine, message_dtype=torch.bfloat16))
        with pytest.raises(pcsim.errors.SettingError, match="bfloat16 on a CPU"):
            sim.infer(clamps)


def test_an_error_does_not_last_where_it_passes_through_a_sum_that_learns() -> None:
    """Two targets above one deterministic node, with different weights, so that no one factor makes up for both."""
    net = pcsim.Network()
    x, inner = net.add_node("x", (3,)), net.add_node("inner", (3,), transfer=nn.Tanh(), deterministic=True)
    h = net.add_node("h", (3,), transfer=nn.Tanh())
    for name, weight in (("near", 1.0), ("far", 3.0)):
        net.add_node(name, (2,), energy_weight=weight)
        net.add_edge(inner, name, nn.Linear(3, 2))
    net.add_edge(x, h, nn.Linear(3, 3))
    net.add_edge(h, inner, nn.Linear(3, 3))
    clamps = {name: torch.randn(4, *net[name].shape).double() for name in ("x", "near", "far")}
    for rule in (pcsim.ForwardUpdate(), pcsim.ArrivalUpdate()):
        relaxation = pcsim.Relaxation(3, 0.3, precision=pcsim.Spiking(alpha=0.0))
        verify.check_engines_agree(verify.Case(net.double(), clamps, relaxation, rule))


@pytest.mark.parametrize("rule", [pcsim.ForwardUpdate(), pcsim.ArrivalUpdate()], ids=str)
def test_an_error_of_another_energy_than_the_gaussian_does_not_last(rule: pcsim.LearningRule) -> None:
    """What is left of it is no multiple of what was sent."""
    net = pcsim.topologies.mlp([3, 4, 4, 4, 2])
    for name, energy in (("hidden2", pcsim.Huber(0.01)), ("output", pcsim.Huber(0.1))):
        net[name].energy_function = energy
    clamps = {"input": torch.randn(5, 3).double(), "output": torch.randn(5, 2).double()}
    relaxation = pcsim.Relaxation(4, 0.3, precision=pcsim.Spiking(alpha=0.0, peak=2.0))
    verify.check_engines_agree(verify.Case(net.double(), clamps, relaxation, rule))


def test_what_a_shared_weight_learns_on_the_way_and_afterwards_adds_up() -> None:
    """One edge into a node whose precision differs by unit, which learns as its error arrives, and one into another."""
    net, shared = pcsim.Network(), nn.Linear(4, 4)
    nodes = [net.add_node(name, (4,), transfer=nn.Tanh()) for name in ("x", "plain", "weighed", "y")]
    nodes[2].own_precision = torch.tensor([0.5, 1.0, 2.0, 4.0])
    for source, target in pairwise(nodes):
        net.add_edge(source, target, nn.Linear(4, 4) if target.name == "y" else shared)
    clamps = {name: torch.randn(5, 4).double() for name in ("x", "y")}
    relaxation = pcsim.Relaxation(3, 0.3, precision=pcsim.Spiking(alpha=0.0))
    case = verify.Case(net.double(), clamps, relaxation, pcsim.ArrivalUpdate())
    verify.check_engines_agree(case)
    sim = pcsim.Simulator(net, relaxation, pcsim.ArrivalUpdate())
    sim.infer(clamps)
    lasting = dict(zip(net.nodes, np.isnan(sim.plan.lasting_errors).tolist(), strict=True))
    assert (lasting["plain"], lasting["weighed"]) == (False, True)


class Interrupting(torch.autograd.Function):
    """The identity, which is interrupted on its way back as often as is asked for."""

    times = 0

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Interrupting.times -= 1
        if Interrupting.times == 0:
            raise KeyboardInterrupt
        return gradient


class Interrupted(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return Interrupting.apply(value)  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_were_interrupted_leave_nothing(engine: str) -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([4, 3, 3, 3, 2]).double()
    net.edges["hidden1->hidden2"].module = nn.Sequential(nn.Linear(3, 3), Interrupted()).double()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine)
    sim.infer({"input": torch.ones(2, 4).double(), "output": torch.ones(2, 2).double()})
    right = sim.gradients()
    Interrupting.times = 1
    with pytest.raises(KeyboardInterrupt):
        sim.gradients()
    for parameter, gradient in sim.gradients().items():
        torch.testing.assert_close(gradient, right[parameter])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_relaxation_that_was_interrupted_leaves_nothing(engine: str) -> None:
    left = [0]

    @attrs.frozen
    class Stopping(pcsim.Relaxation):
        def displacement(self, descent: Tensor, velocity: Tensor | None) -> tuple[Tensor, Tensor | None]:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return self.rate * descent, None

    net = pcsim.Network()
    for name, size in (("a", 3), ("b", 2), ("output", 2)):
        net.add_node(name, (size,))
    for name, size in (("a", 3), ("b", 2)):
        net.add_edge(name, "output", nn.Linear(size, 2))
    sim = pcsim.Simulator(net, Stopping(50, 0.2, tolerance=0.5), engine=engine)
    near, far = torch.zeros(2, 2), torch.full((2, 2), 100.0)
    steps = sim.infer({"output": near}).steps
    left[0] = 2  # once the first node has moved, by much
    with pytest.raises(KeyboardInterrupt):
        sim.infer({"output": far})
    assert sim.infer({"output": near}).steps == steps


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_weight_that_a_module_reads_of_another_moves_its_prediction(deterministic: bool) -> None:
    """Tied by a reference that is not registered, on an edge whose source is clamped and in a transfer."""

    class Tied(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.reads = [linear]

        def forward(self, value: Tensor) -> Tensor:
            return value @ self.reads[0].weight

    weights = []
    for engine in ENGINES:
        torch.manual_seed(0)
        net, linear = pcsim.Network(), nn.Linear(4, 3)
        for name, size in (("a", 4), ("b", 3), ("c", 4), ("d", 3), ("e", 3)):
            net.add_node(name, (size,), deterministic=deterministic and name == "e")
        net.add_edge("a", "b", linear)
        net.add_edge("d", "e", nn.Linear(3, 3) if deterministic else None)
        net.add_edge("e" if deterministic else "d", "c", Tied(linear))
        net.add_edge("b", "c", nn.Linear(3, 4))
        net.double()
        sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), pcsim.IncrementalUpdate(), engine=engine)
        clamps = {name: torch.randn(2, *net[name].shape).double() for name in "adc"}
        sim.update(clamps, optim.SGD(net.parameters(), lr=0.3))
        weights.append([parameter.detach() for parameter in net.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("precision", [pcsim.Spiking(alpha=0.0), pcsim.Decaying()], ids=["spiking", "decaying"])
def test_statistics_are_those_of_the_forward_pass(precision: pcsim.PrecisionSchedule, record: bool) -> None:
    """Where the rule learns from it, whatever has been evaluated since."""
    seen = []
    for engine in ENGINES:
        torch.manual_seed(0)
        net = pcsim.Network()
        for name, size in (("input", 4), ("h1", 4), ("h2", 4), ("output", 2)):
            net.add_node(name, (size,), transfer=nn.BatchNorm1d(size) if name[0] == "h" else None)
        for source, target, size in (("input", "h1", 4), ("h1", "h2", 4), ("h2", "output", 2)):
            net.add_edge(source, target, nn.Linear(4, size))
        net.double()
        sim = pcsim.Simulator(net, pcsim.Relaxation(8, 0.5, precision=precision), pcsim.ArrivalUpdate(), engine=engine)
        clamps = {"input": torch.randn(4, 4).double(), "output": torch.randn(4, 2).double()}
        forward = net.edges["h1->h2"].module(net["h1"].transfer(net.edges["input->h1"].module(clamps["input"])))
        net["h1"].transfer.reset_running_stats()
        sim.update(clamps, optim.SGD(net.parameters(), lr=0.1), record=record)
        expected = 0.9 + 0.1 * forward.detach().var(0)
        torch.testing.assert_close(net["h2"].transfer.running_var, expected)
        seen.append(net["h1"].transfer.running_var)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.IncrementalUpdate()], ids=str)
def test_running_statistics_leave_what_nodes_show(rule: pcsim.LearningRule) -> None:
    """A node that nothing weighs is evaluated again for them alone."""
    shown = []
    for engine in ENGINES:
        torch.manual_seed(0)
        net = pcsim.Network()
        for name, size in (("input", 4), ("hidden", 4), ("output", 2), ("readout", 3)):
            transfer = nn.BatchNorm1d(4) if name == "hidden" else None
            net.add_node(name, (size,), transfer=transfer, energy_weight=float(name != "readout"))
        for source, target, size in (("input", "hidden", 4), ("hidden", "output", 2), ("hidden", "readout", 3)):
            net.add_edge(source, target, nn.Linear(4, size))
        net.double()
        sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.3), rule, engine=engine)
        clamps = {"input": torch.randn(4, 4).double(), "output": torch.randn(4, 2).double()}
        sim.update(clamps, optim.SGD(net.parameters(), lr=0.1))
        shown.append((net["readout"].value, net["readout"].forward_prediction))
    for one, other in zip(*shown, strict=True):
        torch.testing.assert_close(one, other)


class Counting(nn.Module):
    """Counts its evaluations in a buffer, and in ``calls``, the last of which it may be interrupted in."""

    calls, interrupted_at = 0, 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        Counting.calls += 1
        if Counting.calls == Counting.interrupted_at:
            raise KeyboardInterrupt
        self.seen.add_(1)
        return torch.sin(value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.IncrementalUpdate()], ids=str)
def test_statistics_that_were_interrupted_count_nothing(rule: pcsim.LearningRule, engine: str) -> None:
    """They are the last that an update evaluates before the weights of a relaxed state learn."""

    def updated(interrupted_at: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        net = pcsim.topologies.mlp([4, 4, 4, 2])
        net["hidden1"].transfer = nn.BatchNorm1d(4)
        net.edges["hidden1->hidden2"].module = nn.Sequential(nn.Linear(4, 4), Counting())
        sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), rule, engine=engine)
        before = copy.deepcopy(net.state_dict())
        Counting.calls, Counting.interrupted_at = 0, interrupted_at
        clamps = {"input": torch.randn(3, 4), "output": torch.randn(3, 2)}
        optimizer = optim.SGD(net.parameters(), lr=0.1)
        if interrupted_at:
            with pytest.raises(KeyboardInterrupt):
                sim.update(clamps, optimizer)
        else:
            sim.update(clamps, optimizer)
        return before, net.state_dict()

    before, after = updated(0)
    assert int(after["nodes.hidden1.transfer.num_batches_tracked"]) == 1
    before, after = updated(Counting.calls)
    assert all(torch.equal(before[name], after[name]) for name in before)

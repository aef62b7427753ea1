"""Each wrong input is refused by its own message, and a refusal changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import pcsim
from pcsim.errors import (
    ClampError,
    DivergenceError,
    GraphError,
    PCError,
    PrecisionWarning,
    SettingError,
    StateError,
)

ENGINES = pytest.mark.parametrize("engine", ["reference", "batched"])


def chain(depth: int = 3, **options: Any) -> pcsim.Network:
    """Nodes "n0" ... of two units joined by linear maps, always with the same weights."""
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("n0", (2,))
    for index in range(1, depth + 1):
        net.add_node(f"n{index}", (2,), **options)
        net.add_edge(f"n{index - 1}", f"n{index}", nn.Linear(2, 2))
    return net


def batch(depth: int = 3) -> dict[str, Tensor]:
    """Input and target of a chain."""
    torch.manual_seed(1)
    return {"n0": torch.randn(4, 2), f"n{depth}": torch.randn(4, 2)}


def test_every_error_is_a_pc_error() -> None:
    for error in (ClampError, DivergenceError, GraphError, SettingError, StateError):
        assert issubclass(error, PCError)
    assert issubclass(PrecisionWarning, pcsim.PCWarning)


# Building


def build(net: pcsim.Network, **options: Any) -> None:
    net.add_node("new", (2,), **options)


class OwnEnergy(pcsim.Energy):
    """One that says nothing of a likelihood."""

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return (value - prediction).square()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy_weight": -1.0}, r"'new': energy_weight -1\.0 given, expected a finite number of at least 0"),
        ({"energy_weight": float("nan")}, r"'new': energy_weight nan"),
        ({"precision": -0.5}, r"'new': precision -0\.5 given"),
        ({"precision": float("inf")}, r"'new': precision inf given"),
        ({"precision": torch.tensor([1.0, -1.0])}, r"'new': a precision is negative or not finite"),
        ({"precision": torch.ones(3)}, r"'new': precision of shape \(3,\) given, expected .* \(2,\)"),
        ({"prior": torch.zeros(3)}, r"'new': prior of shape \(3,\) given, expected .* \(2,\)"),
        ({"prior": 0.0, "deterministic": True}, r"'new': a deterministic node has no energy for a prior"),
        (
            {"precision": pcsim.LearnedPrecision(), "energy": pcsim.CrossEntropy()},
            r"'new': a learned precision .* CrossEntropy",
        ),
        ({"precision": pcsim.LearnedPrecision(), "energy": OwnEnergy()}, r"'new': a learned precision .* OwnEnergy"),
        ({"energy": "gaussian"}, r"'new': energy 'gaussian' given, expected an instance of Energy; write Gaussian\(\)"),
        ({"energy": pcsim.CrossEntropy}, r"'new': energy .*CrossEntropy'> given, .*; write CrossEntropy\(\)"),
        ({"energy_weight": "1"}, r"'new': energy_weight '1' given"),
        ({"precision": nn.Parameter(torch.ones(2))}, "precision given as a parameter, which would not learn"),
    ],
)
def test_bad_nodes(options: dict[str, Any], words: str) -> None:
    net = chain()
    with pytest.raises(GraphError, match=words):
        build(net, **options)
    assert "new" not in net


@pytest.mark.parametrize("shape", [(0,), (2, -1), (1.5,), ("2",)])
def test_bad_shapes(shape: Any) -> None:
    with pytest.raises(GraphError, match=r"'new': shape .* positive"):
        chain().add_node("new", shape)


@pytest.mark.parametrize("name", ["", "a.b", 3, "keys"])
def test_bad_names(name: Any) -> None:
    with pytest.raises(GraphError, match=f"node name {name!r}"):
        chain().add_node(name, (2,))


def test_a_second_node_of_the_same_name() -> None:
    with pytest.raises(GraphError, match=r"node 'n1' exists already, with shape \(2,\)"):
        chain().add_node("n1", (5,))


def test_a_precision_to_learn_is_positive() -> None:
    with pytest.raises(GraphError, match=r"LearnedPrecision\.initial: given 0\.0"):
        pcsim.LearnedPrecision(initial=0.0)


class TestEdges:
    def refused(self, words: str, source: Any, target: Any, module: nn.Module | None = None, **options: Any) -> None:
        net = chain()
        edges, nodes = list(net.edges), list(net.nodes)
        with pytest.raises(GraphError, match=words):
            net.add_edge(source, target, module, **options)
        assert (list(net.edges), list(net.nodes)) == (edges, nodes)

    def test_unknown_ends(self) -> None:
        self.refused("node 'nobody' is not in the network; its nodes are 'n0', 'n1'", "nobody", "n1")
        self.refused("node 'nobody' is not in the network", "n1", "nobody")

    def test_a_node_of_another_network(self) -> None:
        self.refused("node 'n1' belongs to another network", chain()["n1"], "n2")
        self.refused("node 'n1' belongs to another network", "n0", chain()["n1"])

    def test_a_module_that_does_not_take_the_source(self) -> None:
        self.refused(
            r"edge 'n0->n2': its module, Linear\(.*\), does not accept a value of node 'n0', shape \(batch, 2\)",
            "n0",
            "n2",
            nn.Linear(3, 2),
        )

    def test_a_module_that_does_not_give_the_target(self) -> None:
        net = pcsim.Network()
        net.add_node("a", (3,))
        net.add_node("b", (4,))
        with pytest.raises(GraphError, match=r"edge 'a->b' predicts \(batch, 5\) for node 'b', .*\(batch, 4\)"):
            net.add_edge("a", "b", nn.Linear(3, 5))

    def test_contributions_to_a_sum_that_differ(self) -> None:
        self.refused(
            r"edge 'n0->n1#2' contributes \(batch, 3\), but edge 'n0->n1'\s+contributes \(batch, 2\)",
            "n0",
            "n1",
            nn.Linear(2, 3),
        )

    def test_a_module_that_loses_the_batch(self) -> None:
        class Total(nn.Module):
            def forward(self, value: Tensor) -> Tensor:
                return value.sum()

        self.refused(r"edge 'n0->n2': its module turned \(batch, 2\) into \(\)", "n0", "n2", Total())

    def test_a_transfer_that_does_not_fit(self) -> None:
        net = pcsim.Network()
        net.add_node("a", (3,))
        net.add_node("b", (3,), transfer=nn.Linear(7, 3))
        with pytest.raises(GraphError, match=r"edge 'a->b': node 'b' cannot turn \(batch, 3\)"):
            net.add_edge("a", "b")

    def test_names_and_gains(self) -> None:
        self.refused("edge name 'n0->n1' is taken", "n1", "n2", name="n0->n1")
        self.refused("edge name 'a.b'", "n1", "n2", name="a.b")
        self.refused("edge 'n1->n2#2': gain nan given, expected a finite number", "n1", "n2", gain=float("nan"))

    def test_an_edge_into_a_node_with_a_prior(self) -> None:
        net = chain()
        net.add_node("root", (2,), prior=0.0)
        with pytest.raises(GraphError, match="edge 'n0->root': node 'root' has a prior"):
            net.add_edge("n0", "root")

    def test_a_cycle_of_deterministic_nodes_only(self) -> None:
        net = chain(3, deterministic=True)
        with pytest.raises(GraphError, match="edge 'n3->n1' would close a cycle of deterministic nodes only"):
            net.add_edge("n3", "n1")
        with pytest.raises(GraphError, match="edge 'n2->n2' would close a cycle"):
            net.add_edge("n2", "n2")
        net.add_node("latent", (2,))
        net.add_edge("n3", "latent")
        net.add_edge("latent", "n1")

    def test_a_combination_that_does_not_fit_is_named_when_it_runs(self) -> None:
        net = pcsim.Network()
        net.add_node("a", (2,))
        net.add_node("b", (5,), combine=pcsim.Concatenate())
        net.add_edge("a", "b")
        net.add_edge("a", "b")
        with pytest.raises(GraphError, match=r"edge 'a->b#2' predicts \(batch, 4\) for node 'b'"):
            pcsim.Simulator(net).infer({"a": torch.zeros(1, 2)})


def test_removing_what_is_not_there() -> None:
    net = chain()
    with pytest.raises(GraphError, match="edge 'n0->n2' is not in the network; its edges are 'n0->n1'"):
        net.remove_edge("n0->n2")
    with pytest.raises(GraphError, match="node 'nobody' is not in the network"):
        net.remove_node("nobody")
    with pytest.raises(GraphError, match="node 'nobody' is not in the network"):
        _ = net["nobody"]


def test_questions_that_a_cycle_leaves_without_an_answer() -> None:
    net = chain()
    net.add_edge("n3", "n1")
    with pytest.raises(GraphError, match=r"no topological order: .*n1.* is a cycle; ask for components"):
        net.topological_order()
    with pytest.raises(GraphError, match="no topological order"):
        net.unequal_paths()


# Settings


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pcsim.Relaxation(-1), r"Relaxation\.steps: given -1"),
        (lambda: pcsim.Relaxation(2.5), r"Relaxation\.steps: given 2\.5"),
        (lambda: pcsim.Relaxation(True), r"Relaxation\.steps: given True"),
        (lambda: pcsim.Relaxation(5, -0.1), r"Relaxation\.rate: given -0\.1, .* would climb"),
        (lambda: pcsim.Relaxation(5, 0.0), r"Relaxation\.rate: given 0\.0"),
        (lambda: pcsim.Relaxation(5, float("nan")), r"Relaxation\.rate: given nan"),
        (lambda: pcsim.Relaxation(5, momentum=1.0), r"Relaxation\.momentum: given 1\.0, expected 0 <= momentum < 1"),
        (lambda: pcsim.Relaxation(5, nesterov=True), r"Relaxation\.nesterov: needs a momentum"),
        (lambda: pcsim.Relaxation(5, tolerance=0.0), r"Relaxation\.tolerance: given 0\.0"),
        (lambda: pcsim.Relaxation(5, tolerance="x"), r"Relaxation\.tolerance: given 'x', expected a finite number or"),
        (lambda: pcsim.Relaxation(5, True), r"Relaxation\.rate: given True, expected a finite number"),
        (lambda: pcsim.Spiking(alpha="x"), r"Spiking\.alpha: given 'x', expected a finite number of at least 0"),
        (lambda: pcsim.balance_paths(chain(), "a"), r"balance_paths: rate 'a' given"),
        (lambda: pcsim.balance_paths(chain(), 0.5, peak=True), r"balance_paths: peak True given"),
        (lambda: pcsim.Simulator(chain(), engine=lambda net: 3), r"engine: int given, expected an instance of Engine"),
        (lambda: pcsim.Simulator(chain()).equilibrium({}, tolerance="a"), r"equilibrium: tolerance 'a' given"),
        (lambda: pcsim.Relaxation(5, start="random"), r"Relaxation\.start: given 'random'"),
        (lambda: pcsim.Relaxation(5, precision=1.0), r"Relaxation\.precision: given 1\.0, expected a schedule"),
        (lambda: pcsim.Constant(-1.0), r"Constant\.value: given -1\.0"),
        (lambda: pcsim.Spiking(alpha=-1e-3), r"Spiking\.alpha: given -0\.001"),
        (lambda: pcsim.Spiking(peak=float("inf")), r"Spiking\.peak: given inf"),
        (lambda: pcsim.Spiking.as_covariance(0.0), r"Spiking\.as_covariance: rate 0\.0"),
        (lambda: pcsim.Decaying(k=-1.0), r"Decaying\.k: given -1\.0"),
        (lambda: pcsim.Decaying(tail="added"), r"Decaying\.tail: given 'added'"),
        (
            lambda: pcsim.Simulator(chain(), engine="quantum"),
            "engine 'quantum' is unknown; choose one of 'batched', 'reference'",
        ),
    ],
)
def test_bad_settings(make: Callable[[], object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make()


@ENGINES
def test_a_relaxation_too_short_for_its_schedule(engine: str) -> None:
    short = pcsim.Relaxation(2, 0.1, precision=pcsim.Decaying())
    with pytest.raises(SettingError, match=r"'n1' \(level 2\).*Relax for at least 3 steps"):
        pcsim.Simulator(chain(), short, engine=engine).infer(batch())
    spiking = pcsim.Relaxation(2, 0.1, precision=pcsim.Spiking())
    with pytest.warns(PrecisionWarning, match=r"never spikes at 'n1' \(level 2\) within 2 steps.*at least 3 steps"):
        pcsim.Simulator(chain(), spiking, engine=engine).infer(batch())
    for schedule in (pcsim.Decaying(), pcsim.Spiking()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pcsim.Simulator(chain(), pcsim.Relaxation(3, 0.1, precision=schedule), engine=engine).infer(batch())


def test_a_new_relaxation_is_checked_like_the_first() -> None:
    simulator = pcsim.Simulator(chain(), pcsim.Relaxation(3, 0.1, precision=pcsim.Decaying()))
    simulator.infer(batch())
    simulator.relaxation = pcsim.Relaxation(2, 0.1, precision=pcsim.Decaying())
    with pytest.raises(SettingError, match=r"'n1' \(level 2\)"):
        simulator.infer(batch())


# Clamps


BAD_CLAMPS: dict[str, tuple[Callable[[], dict[Any, Any]], str]] = {
    "unknown": (lambda: {"nobody": torch.zeros(4, 2)}, "clamp 'nobody': no such node; the network has 'n0', 'n1'"),
    "nothing": (dict, "nothing is clamped, so the batch size is unknown"),
    "shape": (lambda: {"n0": torch.zeros(4, 3)}, r"clamp 'n0': shape \(4, 3\) given, expected \(batch, 2\)"),
    "no batch axis": (lambda: {"n0": torch.zeros(2)}, r"clamp 'n0': shape \(2,\) given"),
    "a number": (lambda: {"n0": torch.tensor(1.0)}, r"clamp 'n0': shape \(\) given"),
    "empty": (lambda: {"n0": torch.zeros(0, 2)}, r"clamp 'n0': shape \(0, 2\) given, .* at least one sample"),
    "not a tensor": (lambda: {"n0": [[1.0, 2.0]]}, "clamp 'n0': list given, expected a tensor"),
    "dtype": (
        lambda: {"n0": torch.zeros(4, 2).double()},
        r"clamp 'n0': dtype torch\.float64 given, expected torch\.float32",
    ),
    "whole numbers": (lambda: {"n0": torch.zeros(4, 2).long()}, r"clamp 'n0': dtype torch\.int64 given"),
    "batch": (
        lambda: {"n0": torch.zeros(4, 2), "n3": torch.zeros(5, 2)},
        "clamp 'n3': batch of 5 given, but 'n0' has 4",
    ),
    "nan": (lambda: {"n0": torch.full((4, 2), float("nan"))}, "clamp 'n0': holds NaN or infinity"),
    "infinity": (
        lambda: {"n0": torch.zeros(4, 2), "n3": torch.full((4, 2), -float("inf"))},
        "clamp 'n3': holds NaN or infinity",
    ),
    "mask shape": (
        lambda: {"n0": (torch.zeros(4, 2), torch.ones(3, dtype=torch.bool))},
        r"clamp 'n0': mask of torch\.bool and shape \(3,\) given, expected torch\.bool of shape \(2,\) or \(4, 2\)",
    ),
    "mask dtype": (lambda: {"n0": (torch.zeros(4, 2), torch.ones(2))}, r"clamp 'n0': mask of torch\.float32"),
}


@ENGINES
@pytest.mark.parametrize("which", BAD_CLAMPS)
def test_bad_clamps(which: str, engine: str) -> None:
    make, words = BAD_CLAMPS[which]
    simulator = pcsim.Simulator(chain(), pcsim.Relaxation(3, 0.1), engine=engine)
    for call in (simulator.infer, simulator.predict, lambda clamps: simulator.update(clamps, None)):
        with pytest.raises(ClampError, match=words):
            call(make())


def test_clamps_of_deterministic_nodes() -> None:
    net = chain(3)
    net.add_node("sum", (2,), deterministic=True)
    net.add_edge("n3", "sum")
    given = (torch.zeros(4, 2), torch.tensor([True, False]))
    with pytest.raises(ClampError, match="clamp 'sum': a deterministic node has no latent to infer the rest of"):
        pcsim.Simulator(net).infer({"n0": torch.zeros(4, 2), "sum": given})
    with pytest.raises(ClampError, match="clamp 'n3': backprop infers nothing"):
        pcsim.Simulator(net, rule=pcsim.Backprop()).infer({"n0": torch.zeros(4, 2), "n3": given})


@ENGINES
@pytest.mark.parametrize("node", ["n0", "n3"])
def test_what_a_mask_leaves_out_may_be_missing(engine: str, node: str) -> None:
    clamps, found = batch(), []
    given = torch.tensor([True, False])
    for unknown in (0.0, torch.nan, torch.inf):
        sim = pcsim.Simulator(chain(), pcsim.Relaxation(5, 0.1), engine=engine)
        sim.infer({**clamps, node: (torch.where(given, clamps[node], unknown), given)})
        found.append([each.value.clone() for each in sim.network.nodes.values()])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
    with pytest.raises(ClampError, match=f"clamp '{node}': a given unit is NaN or infinite"):
        sim.infer({**clamps, node: (torch.where(given, torch.nan, clamps[node]), given)})


@ENGINES
def test_a_single_sample_has_no_spread(engine: str) -> None:
    net = chain(2)
    net.add_node("out", (2,), transfer=nn.BatchNorm1d(2))
    net.add_edge("n2", "out", nn.Linear(2, 2))
    sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), engine=engine)
    one = {"n0": torch.ones(1, 2), "out": torch.ones(1, 2)}
    with pytest.raises(ClampError, match="one sample given, but node 'out' normalises over the batch"):
        sim.infer(one)
    net.eval()
    sim.infer(one)
    sim.predict({"n0": torch.ones(1, 2)})


@ENGINES
def test_backprop_that_diverges_says_so(engine: str) -> None:
    net = chain()
    sim = pcsim.Simulator(net, rule=pcsim.Backprop(), engine=engine)
    with torch.no_grad():
        net.edges["n0->n1"].module.weight.fill_(torch.nan)
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(DivergenceError, match="node 'n3' is NaN or infinite after the forward pass"):
        sim.update(batch(), optim.SGD(net.parameters(), lr=0.1))
    for pair in zip(before, net.parameters(), strict=True):
        torch.testing.assert_close(*pair, equal_nan=True)


@ENGINES
def test_a_rule_that_changes_after_the_relaxation(engine: str) -> None:
    sim = pcsim.Simulator(chain(), engine=engine)
    sim.infer(batch())
    sim.rule = pcsim.ForwardUpdate()
    with pytest.raises(StateError, match="the rule is ForwardUpdate since the network was relaxed; infer again"):
        sim.compute_gradients()


def test_energies_of_one_simulator_of_two() -> None:
    net = chain()
    one, other = pcsim.Simulator(net), pcsim.Simulator(net)
    one.infer(batch())
    before = one.energy()
    other.infer({name: clamp[:2] * 3 for name, clamp in batch().items()})
    assert all(torch.equal(before[name], energy) for name, energy in one.energy().items())


@ENGINES
def test_modules_of_several_dtypes(engine: str) -> None:
    net = chain(2)
    net.add_node("out", (2,))
    net.add_edge("n2", "out", nn.Linear(2, 2).double())
    clamps = {"n0": torch.ones(4, 2), "out": torch.ones(4, 2)}
    sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), engine=engine)
    with pytest.raises(GraphError, match=r"edge 'n2->out' has parameters of torch.float64 .* edge 'n0->n1' has torch"):
        sim.infer(clamps)
    net.float()
    sim.infer(clamps)


@pytest.mark.parametrize("clamps", [[torch.zeros(1, 2)], None, torch.zeros(1, 2), {0: torch.zeros(1, 2)}])
def test_clamps_that_are_no_dictionary(clamps: Any) -> None:
    with pytest.raises(ClampError, match="expected a dictionary from nodes or their names to tensors"):
        pcsim.Simulator(chain()).infer(clamps)


def test_class_numbers_at_a_node() -> None:
    with pytest.raises(ClampError, match=r"clamp 'n3': shape \(4,\) given.*one_hot"):
        pcsim.Simulator(chain()).infer({**batch(), "n3": torch.tensor([0, 1, 1, 0])})


@pytest.mark.parametrize(
    ("shape", "given", "words"),
    [
        ((1,), torch.zeros(4), r"shape \(4,\) given, expected \(batch, 1\).*missing, the tensor.unsqueeze\(1\)$"),
        ((1,), torch.zeros(4).long(), r"missing, the tensor.unsqueeze\(1\)$"),
        ((2, 1), torch.zeros(4, 2), r"missing, the tensor.unsqueeze\(2\)$"),
        ((1, 2, 2), torch.zeros(4, 2, 2), r"missing, the tensor.unsqueeze\(1\)$"),
        ((2,), torch.zeros(4, 2, 1), r"too many, the tensor.squeeze\(2\)$"),
        ((2,), torch.zeros(4, 3), "the batch is the first axis$"),
        ((1,), torch.zeros(()), "the batch is the first axis$"),
    ],
)
def test_an_axis_that_is_missing_or_too_many(shape: tuple[int, ...], given: Tensor, words: str) -> None:
    net = pcsim.Network()
    net.add_node("in", shape)
    net.add_node("out", shape)
    net.add_edge("in", "out")
    for call in (pcsim.Simulator(net).infer, pcsim.Simulator(net).predict):
        with pytest.raises(ClampError, match=f"clamp 'in': .*{words}"):
            call({"in": given})


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((nn.Linear(2, 2),), {}, "network: Linear given, expected an instance of Network"),
        ((chain(), pcsim.ForwardUpdate()), {}, "relaxation: ForwardUpdate given, expected an instance of Relaxation"),
        ((chain(), pcsim.Relaxation), {}, r"relaxation: Relaxation given, .*; write Relaxation\(\) with"),
        ((chain(), None, pcsim.ForwardUpdate), {}, r"rule: ForwardUpdate given, .*; write ForwardUpdate\(\)"),
        ((chain(), None, "forward"), {}, "rule: str given, expected an instance of LearningRule"),
        ((chain(),), {"nudging": 0.1}, "nudging: float given, expected an instance of Nudge"),
        ((chain(),), {"engine": 42}, "engine 42 is unknown"),
    ],
)
def test_what_a_simulator_is_made_of(arguments: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        pcsim.Simulator(*arguments, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net: None, "optimizer: NoneType given"),
        (lambda net: optim.SGD, "optimizer: SGD given, expected an instance of Optimizer"),
        (lambda net: optim.LBFGS(net.parameters()), "optimizer: LBFGS given"),
        (lambda net: optim.SGD(chain().parameters(), lr=0.1), "SGD holds no parameter of this network"),
    ],
)
def test_an_optimizer_that_cannot_train_the_network(make: Callable[[pcsim.Network], Any], words: str) -> None:
    net = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1))
    sim.infer(batch())
    for call in (lambda: sim.learn(make(net)), lambda: sim.update(batch(), make(net))):
        with pytest.raises(SettingError, match=words):
            call()
    assert all(parameter.grad is None for parameter in net.parameters())
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    sim.update(batch(), optimizer)


def test_a_value_that_nothing_gives() -> None:
    net = pcsim.Network()
    net.add_node("floating", (2,), deterministic=True)
    net.add_node("target", (2,))
    net.add_edge("floating", "target")
    with pytest.raises(GraphError, match="node 'floating' has no incoming edge"):
        pcsim.Simulator(net).infer({"target": torch.zeros(4, 2)})
    with pytest.raises(GraphError, match="node 'n0' has no incoming edge"):
        pcsim.Simulator(chain(), rule=pcsim.Backprop()).infer({"n3": torch.zeros(4, 2)})


def test_backprop_through_a_cycle() -> None:
    net = chain()
    net.add_edge("n2", "n1")
    simulator = pcsim.Simulator(net, rule=pcsim.Backprop())
    with pytest.raises(GraphError, match=r"is a cycle of deterministic nodes only.*backprop"):
        simulator.infer(batch())


# States


def test_reading_before_a_run() -> None:
    net = chain()
    for quantity in ("value", "prediction", "error", "precision", "energy", "forward_value", "forward_prediction"):
        with pytest.raises(StateError, match=r"node 'n1' has no state yet: run Simulator\.infer"):
            getattr(net["n1"], quantity)
    for quantity in ("prediction", "message"):
        with pytest.raises(StateError, match=r"edge 'n0->n1' has no state yet: run Simulator\.infer"):
            getattr(net.edges["n0->n1"], quantity)
    with pytest.raises(StateError, match="reading energies needs a relaxed state: call infer first"):
        pcsim.Simulator(net).energy()


@ENGINES
def test_reading_what_does_not_exist(engine: str) -> None:
    net = chain()
    trace = pcsim.Simulator(net, engine=engine).infer(batch())
    with pytest.raises(StateError, match="node 'n0' has no prediction: no edge leads into it"):
        _ = net["n0"].prediction
    net.add_node("late", (2,))
    with pytest.raises(StateError, match="node 'late' was added after the latest run"):
        _ = net["late"].value
    with pytest.raises(StateError, match="holds no energies: ask for them with infer"):
        trace.energy("n1")
    recorded = pcsim.Simulator(chain(), engine=engine).infer(batch(), record=True)
    with pytest.raises(StateError, match="node 'n0' has no energy in this run; those that have: n1, n2, n3"):
        recorded.energy("n0")


@ENGINES
def test_learning_that_has_nothing_to_learn_from(engine: str) -> None:
    net = chain()
    optimizer = optim.SGD(net.parameters(), 0.1)
    simulator = pcsim.Simulator(net, engine=engine)
    with pytest.raises(StateError, match="learning needs a relaxed state: call infer first"):
        simulator.learn(optimizer)
    simulator.infer({"n0": torch.zeros(4, 2)})
    with pytest.raises(StateError, match=r"no clamped node has an incoming edge or a prior \(clamped: n0\)"):
        simulator.learn(optimizer)
    with pytest.raises(StateError, match="no clamped node has an incoming edge"):
        simulator.update({"n0": torch.zeros(4, 2)}, optimizer)
    incremental = pcsim.Simulator(net, rule=pcsim.IncrementalUpdate(), engine=engine)
    incremental.infer(batch())
    with pytest.raises(StateError, match="IncrementalUpdate learns at every inference step"):
        incremental.learn(optimizer)


# Divergence


def explosive() -> pcsim.Network:
    """A chain whose weights make a relaxation of rate 1e15 overflow within a few steps."""
    net = chain()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    return net


@ENGINES
def test_divergence_names_the_node_the_step_and_a_smaller_rate(engine: str) -> None:
    simulator = pcsim.Simulator(explosive(), pcsim.Relaxation(10, 1e15), engine=engine)
    words = r"node 'n[12]' became NaN or infinite at inference step [123]; a smaller inference rate than 1e\+15"
    with pytest.raises(DivergenceError, match=words):
        simulator.infer(batch())


@ENGINES
def test_divergence_is_found_by_whichever_step_comes_last(engine: str) -> None:
    net = chain(2)
    last = {"n0": torch.ones(1, 2), "n2": torch.full((1, 2), 3e38)}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(2.0)
    with pytest.raises(DivergenceError, match="node 'n1' became NaN or infinite at inference step 0"):
        pcsim.Simulator(net, pcsim.Relaxation(1, 1.0), engine=engine).infer(last)


@ENGINES
def test_after_a_failure_everything_is_as_before(engine: str) -> None:
    net = explosive()
    simulator = pcsim.Simulator(net, pcsim.Relaxation(5, 0.01), engine=engine)
    optimizer = optim.AdamW(net.parameters(), 0.01)
    simulator.update(batch(), optimizer)
    state = {name: node.value.clone() for name, node in net.nodes.items()}
    errors = {name: net[name].error.clone() for name in ("n1", "n2", "n3")}
    weights = copy.deepcopy(net.state_dict())
    simulator.compute_gradients()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]

    def assert_unchanged() -> None:
        for name, value in state.items():
            assert torch.equal(net[name].value, value), name
        for name, error in errors.items():
            assert torch.equal(net[name].error, error), name
        for name, weight in net.state_dict().items():
            assert torch.equal(weight, weights[name]), name
        simulator.compute_gradients()
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    good = simulator.relaxation
    simulator.relaxation = pcsim.Relaxation(10, 1e15)
    with pytest.raises(DivergenceError):
        simulator.infer(batch())
    simulator.relaxation = good
    assert_unchanged()
    for make, _ in BAD_CLAMPS.values():
        with pytest.raises(ClampError):
            simulator.infer(make())
        assert_unchanged()


@ENGINES
@pytest.mark.parametrize("optimizer_type", [optim.AdamW, optim.SGD])
def test_an_incremental_update_that_diverges_halfway_is_undone(
    optimizer_type: type[optim.Optimizer], engine: str
) -> None:
    net = explosive()
    options = {"momentum": 0.9} if optimizer_type is optim.SGD else {}
    optimizer = optimizer_type(net.parameters(), lr=0.01, **options)
    simulator = pcsim.Simulator(net, pcsim.Relaxation(4, 0.01), pcsim.IncrementalUpdate(), engine=engine)
    simulator.update(batch(), optimizer)
    weights, moments = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    optimizer.register_step_post_hook(count)
    simulator.relaxation = pcsim.Relaxation(10, 1e15)
    with pytest.raises(DivergenceError):
        simulator.update(batch(), optimizer)
    assert steps > 0, "the update has to fail after some weights have changed"
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    restored = optimizer.state_dict()["state"]
    assert restored.keys() == moments["state"].keys()
    for index, kept in moments["state"].items():
        for name, moment in kept.items():
            assert torch.equal(restored[index][name], moment), name


def test_an_update_that_an_optimizer_fails_is_undone() -> None:
    class Broken(optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            raise ZeroDivisionError

    net = chain()
    weights = copy.deepcopy(net.state_dict())
    simulator = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1), pcsim.IncrementalUpdate())
    with pytest.raises(ZeroDivisionError):
        simulator.update(batch(), Broken(net.parameters(), 0.1))
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, weights[name]), name


# Side effects


def test_probing_shapes_leaves_statistics_and_the_random_state_alone() -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("image", (3, 4, 4))
    normalised = net.add_node("normalised", (3, 4, 4), transfer=nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)))
    random_state = torch.get_rng_state()
    edge = net.add_edge("image", normalised, nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)))
    assert torch.equal(torch.get_rng_state(), random_state)
    for norm in (edge.module[1], normalised.transfer[0]):
        assert norm.num_batches_tracked == 0
        assert not norm.running_mean.any()
        assert torch.equal(norm.running_var, torch.ones(3))
    assert edge.stochastic
    assert normalised.stochastic


@ENGINES
def test_predicting_keeps_modes_states_and_statistics(engine: str) -> None:
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("h", (3,), transfer=nn.BatchNorm1d(3))
    net.add_node("y", (2,))
    net.add_edge("x", "h", nn.Linear(3, 3))
    dropout = net.add_edge("h", "y", nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))).module[0]
    norm = net["h"].transfer
    dropout.eval()
    simulator = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1), engine=engine)
    simulator.infer({"x": torch.randn(4, 3), "y": torch.randn(4, 2)})
    value = net["h"].value.clone()
    before = (norm.running_mean.clone(), norm.running_var.clone())
    inputs = torch.randn(6, 3)
    predicted = simulator.predict({"x": inputs})
    assert (norm.training, dropout.training, net.training) == (True, False, True)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])
    assert torch.equal(net["h"].value, value)
    with torch.no_grad():
        expected = net.eval()["h"].transfer(net.edges["x->h"].module(inputs))
    torch.testing.assert_close(predicted["h"], expected)
    with pytest.raises(ClampError):
        simulator.predict({"nobody": inputs})


@pytest.mark.parametrize(
    "module", [nn.ReLU(inplace=True), nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(3, 3))]
)
def test_a_module_that_would_overwrite_a_value_is_refused(module: nn.Module) -> None:
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("y", (3,))
    with pytest.raises(GraphError, match=r"(?s)'x->y': its module, .* works in place.*inplace=False"):
        net.add_edge("x", "y", module)
    net.add_node("z", (3,), transfer=nn.ReLU(inplace=True))
    with pytest.raises(GraphError, match="node 'z' works in place"):
        net.add_edge("x", "z", nn.Linear(3, 3))
    assert not net.edges


def test_a_dropout_that_is_added_in_evaluation_mode_is_noticed() -> None:
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("y", (3,), transfer=nn.Dropout(0.5).eval())
    edge = net.add_edge("x", "y", nn.Dropout(0.5).eval())
    assert edge.stochastic
    assert net["y"].stochastic
    assert not edge.module.training


@pytest.mark.parametrize(("given", "mend"), [(nn.Tanh, r"write Tanh\(\)"), (torch.tanh, "wrap a function in a module")])
def test_what_is_no_module_is_refused_where_it_is_given(given: object, mend: str) -> None:
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("y", (3,))
    with pytest.raises(GraphError, match=rf"node 'z': transfer .* expected an instance of nn.Module; {mend}"):
        net.add_node("z", (3,), transfer=given)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=rf"edge 'x->y': module .* expected an instance of nn.Module; {mend}"):
        net.add_edge("x", "y", given)  # type: ignore[arg-type]
    assert list(net.nodes) == ["x", "y"]
    assert not net.edges


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"nobody": torch.zeros(2, 3)}, "init 'nobody': no such node; the network has"),
        ({"x": torch.zeros(2, 3)}, "init 'x': the node is clamped; leave it out"),
        ({"sum": torch.zeros(2, 3)}, "init 'sum': the node is deterministic, so that its value is its prediction"),
        ({"hidden": torch.zeros(2, 4)}, r"init 'hidden': shape \(2, 4\) given, expected \(batch, 3\)"),
        ({"hidden": torch.zeros(1, 3)}, "init 'hidden': batch of 1 given, but 'x' is clamped for 2"),
        ({"hidden": torch.full((2, 3), torch.nan)}, "init 'hidden': holds NaN or infinity"),
        ([torch.zeros(2, 3)], "init: list given, expected a dictionary from nodes or their names"),
    ],
)
def test_where_nodes_start_is_checked(init: Any, message: str) -> None:
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("sum", (3,), deterministic=True)
    net.add_node("hidden", (3,))
    net.add_edge("x", "sum")
    net.add_edge("sum", "hidden")
    with pytest.raises(pcsim.errors.ClampError, match=message):
        pcsim.Simulator(net).infer({"x": torch.zeros(2, 3)}, init=init)


@pytest.mark.parametrize("sizes", [(3, 2), (2, 3)])
def test_clamps_of_different_batches_are_refused_whichever_is_larger(sizes: tuple[int, int]) -> None:
    net = pcsim.topologies.mlp([2, 3, 2])
    clamps = {name: torch.zeros(size, 2) for name, size in zip(("input", "output"), sizes, strict=True)}
    with pytest.raises(ClampError, match=f"'output': batch of {sizes[1]} given, but 'input' has {sizes[0]}"):
        pcsim.Simulator(net).infer(clamps)


@pytest.mark.parametrize("initial", ["2", True, 0.0, -1.0, float("inf")])
def test_a_learned_precision_starts_at_a_positive_number(initial: Any) -> None:
    with pytest.raises(GraphError, match=r"LearnedPrecision\.initial: given .*expected a positive finite number"):
        pcsim.LearnedPrecision(initial)

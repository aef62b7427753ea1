"""Precision where neuroscience has it: by trial, by pathway, set between runs, learned; against closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

import pcsim
from pcsim import verify
from pcsim.errors import ClampError, GraphError

some = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
CASES = verify.cases(
    verify.networks(nodes=(2, 6)),
    rules=(*verify.RULES, pcsim.ArrivalUpdate()),
    multiplied=True,
    by_errors=True,
    most_steps=4,
)


def cues(*precisions: object) -> pcsim.Network:
    """A cause and two cues that it predicts as it is."""
    net = pcsim.Network()
    net.add_node("cause", (2,))
    for name, precision in zip(("sight", "touch"), precisions, strict=True):
        net.add_node(name, (2,), precision=precision)  # type: ignore[arg-type]
        net.add_edge("cause", name)
    return net.double()


def test_cues_are_weighed_by_the_precision_of_each_trial() -> None:
    net = cues(1.0, 1.0)
    sight, touch = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    one, two = torch.rand(5).double() + 0.1, torch.rand(5, 2).double() + 0.1
    for engine in ("batched", "reference"):
        sim = pcsim.Simulator(net, pcsim.Relaxation(400, 0.3), engine=engine)
        sim.infer({"sight": sight, "touch": touch}, precision={"sight": one, net["touch"]: two})
        expected = (one.unsqueeze(1) * sight + two * touch) / (one.unsqueeze(1) + two)
        torch.testing.assert_close(net["cause"].value, expected)
        assert net["sight"].precision.shape == (5, 1)
        assert torch.equal(net["touch"].precision, two)
        sim.equilibrium({"sight": sight, "touch": touch}, precision={"sight": one, "touch": two})
        torch.testing.assert_close(net["cause"].value, expected)
        sim.infer({"sight": sight, "touch": touch})  # in that run alone
        torch.testing.assert_close(net["cause"].value, (sight + touch) / 2)


@some
@given(CASES, st.integers(1, 31), st.integers(0, 2**16))
def test_trials_of_one_batch_are_runs_with_that_precision(case: verify.Case, chosen: int, seed: int) -> None:
    """By both engines: a batch with a precision per trial is one run per trial with that precision of the nodes."""
    full = verify.Case(case.network, case.clamps).free
    nodes = [node for node in case.network.nodes.values() if node.predicted and not node.deterministic]
    nodes = [node for place, node in enumerate(nodes) if chosen >> place & 1 and node.log_precision is None]
    nodes = [node for node in nodes if node.name in full or node.name in case.clamps]
    generator = torch.Generator().manual_seed(seed)
    given_ = {node.name: torch.rand(case.batch, generator=generator).double() * 2 for node in nodes}
    results = []
    for engine in ("reference", "batched"):
        own = case.copy()
        try:
            own.simulator(engine).infer(own.clamps, precision=given_)
        except pcsim.PCError:
            results.append(None)
            continue
        results.append({name: node.value for name, node in own.network.nodes.items()})
    together, batched = results
    assert (together is None) == (batched is None)
    if together is None or batched is None:
        return
    for name in together:
        torch.testing.assert_close(batched[name], together[name], rtol=1e-9, atol=1e-9)
    if any(own.network[name].stochastic for name in own.network.nodes) or _mixes(own.network):
        return
    for trial in range(case.batch):
        alone = case.copy()
        for name, numbers in given_.items():
            alone.network[name].precision = float(numbers[trial])
        # The trial twice, since what a node is in a batch of one is refused for normalisations.
        clamps = {name: _trial(clamp, trial) for name, clamp in case.clamps.items()}
        pcsim.Simulator(alone.network, case.relaxation, case.rule, engine="reference").infer(clamps)
        for name, node in alone.network.nodes.items():
            torch.testing.assert_close(node.value[0], together[name][trial], rtol=1e-8, atol=1e-8)


def _mixes(network: pcsim.Network) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())


def _trial(clamp: Tensor | tuple[Tensor, Tensor], trial: int) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(clamp, tuple):
        value, mask = clamp
        return value[[trial, trial]], mask[[trial, trial]] if mask.dim() == value.dim() else mask
    return clamp[[trial, trial]]


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"smell": torch.ones(3)}, "precision 'smell': no such node"),
        ({"cause": torch.ones(3)}, "precision 'cause': the node has no error of its own to weigh"),
        ({"sight": torch.ones(3, 2).double() * -1}, "precision 'sight': holds a negative number"),
        ({"sight": torch.ones(4).double()}, "precision 'sight': batch of 4 given, expected 3"),
        ({"sight": torch.ones(3, 4).double()}, r"precision 'sight': shape \(3, 4\) given"),
        ({"sight": torch.ones(3)}, "precision 'sight': dtype torch.float32 given"),
        ({"sight": 2.0}, "precision 'sight': float given"),
        ({"touch": torch.ones(3).double()}, "precision 'touch': the node learns its own"),
    ],
)
def test_a_precision_that_does_not_fit_is_refused_by_name(precision: dict[str, object], message: str) -> None:
    net = cues(1.0, pcsim.LearnedPrecision())
    sim = pcsim.Simulator(net, pcsim.Relaxation(5))
    clamps = {"sight": torch.randn(3, 2).double(), "touch": torch.randn(3, 2).double()}
    sim.infer(clamps)
    before = net["cause"].value
    with pytest.raises(ClampError, match=message):
        sim.infer(clamps, precision=precision)  # type: ignore[arg-type]
    assert torch.equal(net["cause"].value, before)


def test_weights_learn_with_precision_left_out_in_every_trial() -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 4, 2]).double()
    sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1))
    clamps = {"input": torch.randn(5, 3).double(), "output": torch.randn(5, 2).double()}
    sim.update(clamps, optim.SGD(net.parameters(), 0.0), precision={"output": torch.rand(5).double() * 3})
    last = net.edges["hidden1->output"].module
    expected = -torch.einsum("bo,bi->oi", net["output"].error, net["hidden1"].value) / 5
    torch.testing.assert_close(next(last.parameters()).grad, expected)


def test_precision_and_energy_are_set_by_the_names_under_which_they_are_given() -> None:
    net = cues(1.0, 1.0)
    sim = pcsim.Simulator(net, pcsim.Relaxation(200, 0.2))
    sight, touch = torch.zeros(3, 2).double(), torch.ones(3, 2).double()
    sim.infer({"sight": sight, "touch": touch})
    net["touch"].precision = 3.0
    sim.infer({"sight": sight, "touch": touch})
    torch.testing.assert_close(net["cause"].value, torch.full((3, 2), 0.75).double())
    assert net["touch"].own_precision == 3.0
    net["touch"].energy = pcsim.Huber(0.1)
    assert isinstance(net["touch"].energy_function, pcsim.Huber)
    assert "energy" not in dict(net["touch"].named_children())
    with pytest.raises(GraphError, match="node 'touch': precision -1 given"):
        net["touch"].precision = -1


class TestPathways:
    def test_a_pathway_is_a_second_prediction_weighed_by_its_precision(self) -> None:
        """F = ½ |x − A s|² + ½ π |x − B h|² + ½ |y − C x|² against its minimum by linear algebra."""
        torch.manual_seed(0)
        net = pcsim.Network()
        for name, size in (("seen", 3), ("heard", 2), ("state", 4), ("output", 3)):
            net.add_node(name, (size,))
        seen, heard, out = nn.Linear(3, 4, bias=False), nn.Linear(2, 4, bias=False), nn.Linear(4, 3, bias=False)
        net.add_edge("seen", "state", seen)
        net.add_edge("state", "output", out)
        node = net.add_pathway("heard", "state", heard, precision=2.5)
        net.double()
        assert node.name == "heard~state"
        values = {name: torch.randn(6, net[name].shape[0]).double() for name in ("seen", "heard", "output")}
        pcsim.Simulator(net, pcsim.Relaxation(2000, 0.1)).infer(values)
        matrix = (1 + 2.5) * torch.eye(4).double() + out.weight.T @ out.weight
        right = values["seen"] @ seen.weight.T + 2.5 * values["heard"] @ heard.weight.T + values["output"] @ out.weight
        expected = torch.linalg.solve(matrix, right.T).T
        torch.testing.assert_close(net["state"].value, expected)
        torch.testing.assert_close(node.error, expected - values["heard"] @ heard.weight.T)
        predicted = pcsim.Simulator(net, pcsim.Relaxation(2000, 0.1)).predict({k: values[k] for k in ("seen", "heard")})
        two = (values["seen"] @ seen.weight.T + 2.5 * values["heard"] @ heard.weight.T) / 3.5
        torch.testing.assert_close(predicted["state"], two.detach())

    def test_its_weights_learn_from_its_own_error(self) -> None:
        torch.manual_seed(0)
        net = pcsim.Network()
        for name in ("a", "b", "x", "y"):
            net.add_node(name, (3,))
        net.add_edge("a", "x", nn.Linear(3, 3))
        net.add_edge("x", "y", nn.Linear(3, 3))
        net.add_pathway("b", "x", nn.Sequential(nn.Linear(3, 3), nn.Tanh()), name="lateral")
        clamps = {name: torch.randn(4, 3) for name in ("a", "b", "y")}
        verify.check_gradients(net, clamps)
        verify.check_locality(net, clamps)
        verify.check_descent(net, clamps, pcsim.Relaxation(10, 0.05))
        case = verify.Case(
            copy.deepcopy(net).double(), {k: v.double() for k, v in clamps.items()}, pcsim.Relaxation(7, 0.1)
        )
        verify.check_engines_agree(case)

    def test_it_is_kept_in_files_copies_and_printed_cases(self, tmp_path: object) -> None:
        net = pcsim.Network()
        net.add_node("a", (2,))
        net.add_node("b", (2,))
        net.add_pathway("a", "b", nn.Linear(2, 2), precision=0.5)
        pcsim.save_network(net, f"{tmp_path}/net.pcsim")
        again = pcsim.load_network(f"{tmp_path}/net.pcsim")
        assert again["a~b"].constant == 0.0
        assert again["a~b"].own_precision == 0.5
        assert "constant=0.0" in verify.code_of(net)
        assert pcsim.balance_paths(net, rate=0.5)["a~b"].constant == 0.0

    def test_a_refused_pathway_leaves_the_network_as_it_was(self) -> None:
        net = pcsim.Network()
        net.add_node("a", (2,))
        net.add_node("b", (3,))
        with pytest.raises(GraphError, match="a->a~b"):
            net.add_pathway("a", "b", nn.Linear(2, 2))
        assert (list(net.nodes), list(net.edges)) == (["a", "b"], [])

    def test_a_constant_is_a_clamp_that_may_be_given_otherwise(self) -> None:
        net = pcsim.Network()
        net.add_node("x", (2,))
        net.add_node("y", (2,), constant=1.0)
        net.add_edge("x", "y")
        sim = pcsim.Simulator(net, pcsim.Relaxation(300, 0.2))
        sim.infer({"x": (torch.zeros(3, 2), torch.tensor([True, False]))})
        torch.testing.assert_close(net["x"].value[:, 1], torch.ones(3))
        sim.infer({"x": (torch.zeros(3, 2), torch.tensor([True, False])), "y": torch.full((3, 2), 2.0)})
        torch.testing.assert_close(net["x"].value[:, 1], torch.full((3,), 2.0))
        with pytest.raises(GraphError, match="node 'y': constant nan given"):
            net["y"].constant = float("nan")
        with pytest.raises(GraphError, match="deterministic node has no value of its own"):
            net["y"].deterministic = True


def test_a_learned_precision_with_a_free_cause_finds_the_noise_that_is_there() -> None:
    """At rest of F, π = 1 / mean ε² over units and trials of the cue's own error, the cause being inferred."""
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("cause", (1,))
    net.add_node("cues", (8,), precision=pcsim.LearnedPrecision())
    net.add_edge("cause", "cues", nn.Linear(1, 8, bias=False))
    net.double()
    with torch.no_grad():
        net.edges["cause->cues"].module.weight.fill_(1.0)
    net.edges["cause->cues"].requires_grad_(False)
    noisy = torch.randn(400, 1).double() + 0.5 * torch.randn(400, 8).double()
    sim = pcsim.Simulator(net, pcsim.Relaxation(40, 0.02))
    optimizer = optim.SGD(net.parameters(), 0.1)
    for _ in range(150):
        sim.update({"cues": noisy}, optimizer)
    residual = (noisy - noisy.mean(1, keepdim=True)).square().mean()
    torch.testing.assert_close(net["cues"].log_precision.exp().detach(), 1 / residual, rtol=1e-3, atol=0)

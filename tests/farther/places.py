"""Nodes on several devices: all as on one, and nothing but what crosses an edge goes from one to another."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import farther
import pytest
import torch
from farther import Crossing
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_devices import NETWORKS, RELAXATIONS, RULES, batch_of
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import pcsim
from pcsim import verify
from pcsim.errors import ClampError, GraphError

pytestmark = pytest.mark.filterwarnings("ignore::pcsim.PCWarning")
CASES_OF_ANY_KIND = verify.cases(verify.networks(nodes=(2, 6)), multiplied=True, by_errors=True, most_steps=4)
some = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


farther.device()


@pytest.fixture
def crossing() -> Iterator[Crossing]:
    with Crossing() as crossing:
        yield crossing


def place(net: pcsim.Network, devices: Mapping[str, str | torch.device]) -> pcsim.Network:
    with farther.swapping():
        return net.place(devices)


def placed(net: pcsim.Network, every: int = 2) -> pcsim.Network:
    """Every second node farther away."""
    names = list(net.nodes)
    return place(net, {name: farther.device() for name in names[1::every]})


def away(module: nn.Module) -> nn.Module:
    with farther.swapping():
        return module.to(farther.device())


def at(net: pcsim.Network, name: str, value: Tensor) -> Tensor:
    """What is given of a node, where it lies."""
    return value.to(net[name].device or "cpu")


def left(name: str, rule: str, engine: str, *, apart: bool) -> dict[str, Tensor]:
    """What two batches leave, on the CPU."""
    with Crossing() if apart else nullcontext():
        return _left(name, rule, engine, apart=apart)


def _left(name: str, rule: str, engine: str, *, apart: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net, (relaxation, learns) = NETWORKS[name]().double(), {**RULES, **RELAXATIONS}[rule]
    if apart:
        placed(net)
    clamps = {n: v.double() if v.is_floating_point() else v for n, v in batch_of(net, "cpu").items()}
    clamps = {n: at(net, n, value) for n, value in clamps.items()}
    sim = pcsim.Simulator(net, relaxation, learns, engine=engine)
    optimizer = SGD(net.parameters(), lr=0.01)
    for _ in range(2):
        trace = sim.update(clamps, optimizer, record=not learns.backprop)
    found = {f"value of {n}": node.value for n, node in net.nodes.items() if node.integers is None}
    found |= {f"error of {n}": node.error for n, node in net.nodes.items() if node.predicted}
    found |= {f"message of {n}": edge.message for n, edge in net.edges.items() if edge.source.integers is None}
    found |= dict(net.state_dict())
    if trace.energies is not None:
        found["energies"] = trace.energies
    predicted = sim.predict({"input": clamps["input"]})
    found |= {f"prediction of {n}": value for n, value in predicted.items()}
    return {what: value.detach().cpu() for what, value in found.items()}


UNSTABLE = [("balanced", "settled"), ("balanced", "incremental"), ("cyclic", "backprop")]
"""Balanced paths are for errors that travel once: at constant precision rounding grows without end. Cycles have no
backprop.
"""
CASES = [
    *(("batched", name, rule) for name in NETWORKS for rule in RULES if (name, rule) not in UNSTABLE),
    *(("batched", "residual", rule) for rule in RELAXATIONS if rule != "sampling"),
    *(("reference", name, "forward") for name in ("cyclic", "energies", "tokens", "bilinear, by autograd")),
    *(("reference", "residual", rule) for rule in ("incremental", "errors", "multipliers")),
]
QUICK = {
    *(("batched", "residual", rule) for rule in (*RULES, "arrival", "decaying", "multipliers")),
    *(("batched", name, "settled") for name in ("cyclic", "images, normalised", "energies", "tokens", "gelu")),
    *(("batched", name, "forward") for name in ("balanced", "layer norm", "dropout", "bilinear, by autograd")),
    *(("reference", name, "forward") for name in ("cyclic", "energies")),
}


@pytest.mark.parametrize(
    ("engine", "name", "rule"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_all_is_as_on_one_device(engine: str, name: str, rule: str) -> None:
    together, apart = (left(name, rule, engine, apart=apart) for apart in (False, True))
    assert together.keys() == apart.keys()
    for what, value in together.items():
        torch.testing.assert_close(apart[what], value, rtol=1e-9, atol=1e-11, msg=lambda text, w=what: f"{w}: {text}")


@given(CASES_OF_ANY_KIND, st.integers(0, 2**6 - 1))
@some
def test_random_graphs_are_as_on_one_device(case: verify.Case, chosen: int) -> None:
    """Wherever their nodes lie."""
    assume(any(True for _ in case.network.parameters()))
    together, apart = outcome(case, 0), outcome(case, chosen)
    if apart is None:
        return
    assert together is not None
    assert together.keys() == apart.keys()
    for what, value in together.items():
        torch.testing.assert_close(apart[what], value, rtol=1e-7, atol=1e-9)


def outcome(case: verify.Case, chosen: int) -> dict[str, Tensor] | None:
    """What a batch leaves, or its refusal, with the chosen nodes farther away; None where they share a module."""
    net = copy.deepcopy(case.network)
    with Crossing() if chosen else nullcontext():
        place(net, {name: farther.device() for number, name in enumerate(net.nodes) if chosen >> number & 1})
        clamps = {
            name: tuple(at(net, name, part) for part in given) if isinstance(given, tuple) else at(net, name, given)
            for name, given in case.clamps.items()
        }
        try:
            pcsim.Simulator(net, case.relaxation, case.rule).update(clamps, SGD(net.parameters(), lr=0.01))
        except pcsim.PCError as error:
            return None if "share a module" in str(error) else {type(error).__name__: torch.zeros(())}
        found = {**net.state_dict(), **{f"value of {name}": node.value for name, node in net.nodes.items()}}
        return {what: value.cpu() for what, value in found.items()}


def chain_of(*places: str, dtype: torch.dtype = torch.float64) -> tuple[pcsim.Network, dict[str, Tensor]]:
    """A chain of layers on the CPU ("here") and farther away ("there"), and its clamps."""
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([6, *range(8, 8 + len(places) - 2), 3]).to(dtype)
    named = zip(net.nodes, places, strict=True)
    place(net, {name: farther.device() if where == "there" else "cpu" for name, where in named})
    clamps = {"input": torch.randn(4, 6, dtype=dtype), "output": torch.randn(4, 3, dtype=dtype)}
    return net, {name: at(net, name, value) for name, value in clamps.items()}


def crossed(sim: pcsim.Simulator) -> list[int]:
    """Bytes of a sample that the plan says cross, at each step and for learning."""
    lines = [line.split() for line in str(sim.plan).splitlines()]
    return [int(words[1].replace(",", "")) for words in lines if words[0] == "cross"]


RELAXED = [
    (pcsim.Relaxation(5, 0.1), pcsim.SettledUpdate()),
    (pcsim.Relaxation(5, 0.5, precision=pcsim.Spiking(alpha=0.0)), pcsim.ForwardUpdate()),
    (pcsim.Relaxation(5, 0.5, precision=pcsim.Spiking.for_rate(0.5)), pcsim.ArrivalUpdate()),
]


SAID = [
    *(("layers", rule) for rule in ("settled", "forward", "arrival", "errors", "held")),
    *(("identity", rule) for rule in ("settled", "forward")),
    *(("residual", rule) for rule in ("settled", "arrival")),
    *((name, "settled") for name in ("energies", "tokens", "attention", "dropout", "images", "bilinear, by autograd")),
]


def around() -> pcsim.Network:
    """An identity beside another edge, whose target is predicted again though the identity's source stays."""
    net = pcsim.Network()
    for name in ("input", "b", "c"):
        net.add_node(name, (6,))
    net.add_node("output", (3,))
    for ends, module in ((("input", "b"), nn.Linear(6, 6)), (("input", "c"), None), (("b", "c"), nn.Linear(6, 6))):
        net.add_edge(*ends, module)
    net.add_edge("c", "output", nn.Linear(6, 3))
    return net


@pytest.mark.parametrize(("name", "rule"), SAID)
def test_only_what_the_plan_says_crosses(name: str, rule: str, crossing: Crossing) -> None:
    made = {"layers": lambda: pcsim.topologies.mlp([6, 8, 9, 3]), "identity": around}
    net = placed({**made, **NETWORKS}[name]())
    relaxation, learns = {**RULES, **RELAXATIONS}[rule]
    clamps = {n: at(net, n, value) for n, value in batch_of(net, "cpu").items()}
    sim = pcsim.Simulator(net, relaxation, learns)
    for _ in range(3):
        sim.infer(clamps)
        sim.compute_gradients()
    program, sequence, said, taken = sim.program, sim.plan.sequence, crossed(sim), []
    with torch.no_grad():
        for number, step in enumerate(sequence):
            program.at(number)
            before = crossing.bytes
            for call in (call for calls in program.calls[step] for call in calls):
                call()
            taken.append((crossing.bytes - before) // 4)
        before = crossing.bytes
        for operation in program.learning(len(sequence)):
            operation.call()
    assert taken == [said[row] for row in _rows_of(sim)]
    assert (crossing.bytes - before) // 4 == said[-1]
    assert sum(said)


def _rows_of(sim: pcsim.Simulator) -> list[int]:
    """Which printed row each step is in: equal ones that follow each other share one."""
    rows, sequence = [0], sim.plan.sequence
    for before, now in itertools.pairwise(sequence):
        rows.append(rows[-1] + (before != now))
    return rows


@pytest.mark.usefixtures("crossing")
def test_a_plan_on_one_device_says_nothing_of_crossing() -> None:
    net, clamps = chain_of("there", "there", "there")
    sim = pcsim.Simulator(net)
    sim.infer(clamps)
    assert net.places == {}
    assert net["hidden1"].value.device == farther.device()
    assert "cross" not in str(sim.plan)


@pytest.mark.usefixtures("crossing")
def test_to_brings_all_to_one_place_again() -> None:
    net, clamps = chain_of("here", "there", "here")
    sim = pcsim.Simulator(net)
    sim.infer(clamps)
    apart = net["hidden1"].value
    assert apart.device == farther.device()
    with farther.swapping():
        net.to("cpu")
    assert net.places == {}
    sim.infer(clamps)
    torch.testing.assert_close(net["hidden1"].value, apart.cpu())


@pytest.mark.usefixtures("crossing")
def test_a_copy_lies_where_the_network_does() -> None:
    net, clamps = chain_of("here", "there", "here")
    copied = copy.deepcopy(net)
    assert copied.places == net.places
    assert copied.state_dict().keys() == net.state_dict().keys() == pcsim.topologies.mlp([6, 8, 3]).state_dict().keys()
    pcsim.Simulator(copied).infer(clamps)


@pytest.mark.usefixtures("crossing")
def test_auxiliary_nodes_lie_where_their_edge_leads() -> None:
    net = placed(pcsim.topologies.residual_mlp(6, 8, 3, blocks=2))
    balanced = pcsim.balance_paths(net, 0.5)
    auxiliary = [node for node in balanced.nodes.values() if pcsim.is_auxiliary(node)]
    assert auxiliary
    for name, where in net.places.items():
        assert balanced[name].device == where
    for node in auxiliary:
        ends = [net.edges[node.name.partition("/")[0]].target.device]
        assert node.device in ends
    clamps = {name: at(balanced, name, value) for name, value in batch_of(net, "cpu").items()}
    relaxation = pcsim.Relaxation(9, 0.5, precision=pcsim.Spiking.for_rate(0.5))
    pcsim.Simulator(balanced, relaxation, pcsim.ArrivalUpdate()).infer(clamps)


@pytest.mark.usefixtures("crossing")
def test_what_else_a_run_takes_lies_where_its_node_does() -> None:
    """Precisions, starts, masks, streams, constants, tolerances, rates by sample, equilibria, the last run's values."""
    found = []
    for places in (["here", "here", "here", "here"], ["here", "there", "here", "there"]):
        net, clamps = chain_of(*places)
        net.add_node("zero", (8,), constant=0.0)
        net.add_edge("hidden1", "zero", gain=-0.5)
        place(net, {"zero": "cpu"})
        own = {"hidden1": at(net, "hidden1", torch.linspace(1, 2, 4).double())}
        start = {"hidden2": at(net, "hidden2", torch.ones(4, 9).double())}
        known = at(net, "output", torch.tensor([True, False, True]))
        stream = pcsim.Stream(torch.stack([clamps["input"], -clamps["input"]]), every=2)
        seen = [
            pcsim.Simulator(net, pcsim.Relaxation(4, 0.1)).infer(clamps, precision=own, init=start, record=True),
            pcsim.Simulator(net, pcsim.Relaxation(4, 0.1)).infer({**clamps, "input": stream}, record=True),
            pcsim.Simulator(net, pcsim.Relaxation(4, 0.9, least_rate=0.01)).infer(clamps, record=True),
            pcsim.Simulator(net, pcsim.Relaxation(9, 0.1, tolerance=1e-2)).infer(clamps, record=True),
        ]
        values = [trace.energies for trace in seen]
        sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1, start="previous"))
        for shown in ({**clamps, "output": (clamps["output"], known)}, clamps):
            sim.infer(shown)
            values += [node.value for node in net.nodes.values()]
            values += [node.precision for node in net.nodes.values() if node.predicted]
        sim.equilibrium(clamps)
        values += [net["hidden1"].value, net["hidden2"].energy]
        found.append([value.cpu() for value in values if value is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("crossing")
def test_a_trainer_takes_batches_where_their_nodes_lie() -> None:
    net, _ = chain_of("here", "there", "there", dtype=torch.float32)
    sim = pcsim.Simulator(net, *RELAXED[2])
    data = TensorDataset(torch.randn(12, 6), torch.arange(12) % 3)
    trainer = pcsim.Trainer(sim, SGD(net.parameters(), lr=0.1), clip=1.0)
    history = trainer.fit(DataLoader(data, 4), epochs=2, validation=DataLoader(data, 6))
    assert len(history.records) == 2
    assert net["output"].value.device == farther.device()


class Unmoved(nn.Module):
    """Answers the same whatever it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.zeros(3))

    def forward(self, value: Tensor) -> Tensor:
        return self.answer.expand(len(value), -1)


@pytest.mark.usefixtures("crossing")
@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_a_message_of_nothing_comes_back_as_well(engine: str) -> None:
    net = pcsim.Network()
    for name in "abc":
        net.add_node(name, (3,))
    net.add_edge("a", "b", nn.Linear(3, 3))
    net.add_edge("b", "c", Unmoved())
    place(net, {"c": farther.device()})
    sim = pcsim.Simulator(net, engine=engine)
    sim.infer({"a": torch.ones(2, 3), "c": at(net, "c", torch.ones(2, 3))})
    sim.compute_gradients()
    assert not net.edges["b->c"].message.any()
    assert net.edges["b->c"].message.device.type == "cpu"


@pytest.mark.usefixtures("crossing")
def test_a_placed_network_without_parameters_takes_any_dtype() -> None:
    net = pcsim.Network()
    for name in "abc":
        net.add_node(name, (3,))
    net.add_edge("a", "b")
    net.add_edge("b", "c")
    place(net, {"b": farther.device()})
    pcsim.Simulator(net).infer({name: torch.ones(2, 3).double() for name in "ac"})
    assert net["b"].value.dtype == torch.float64


@pytest.mark.usefixtures("crossing")
def test_what_is_set_of_a_placed_node_goes_there() -> None:
    net, clamps = chain_of("here", "there", "here", dtype=torch.float32)
    net["hidden1"].precision = torch.ones(8)
    pcsim.Simulator(net).infer(clamps)
    net["hidden1"].precision = pcsim.LearnedPrecision()
    pcsim.Simulator(net).infer(clamps)
    net.add_node("cause", (6,))
    place(net, {"cause": farther.device()})
    net["cause"].prior = 0.5
    net.add_edge("cause", "input")
    place(net, {})
    pcsim.Simulator(net).infer({"output": clamps["output"]})


@pytest.mark.usefixtures("crossing")
def test_checks_look_at_a_copy_on_the_cpu() -> None:
    net, clamps = chain_of("here", "there", "here")
    with farther.swapping():
        verify.check_gradients(net, clamps, pcsim.Relaxation(3, 0.1), pcsim.SettledUpdate())
        verify.check_locality(net, clamps, pcsim.Relaxation(3, 0.1))


@pytest.mark.usefixtures("crossing")
def test_what_is_summed_over_nodes_lies_where_the_weights_begin() -> None:
    net, clamps = chain_of("there", "here", "there")
    for order in (["input", "output"], ["output", "input"]):
        trace = pcsim.Simulator(net).infer({name: clamps[name] for name in order}, record=True)
        assert trace.energies is not None
        assert trace.energies.device.type == "cpu"


@pytest.mark.usefixtures("crossing")
def test_a_plan_tells_of_its_own_run() -> None:
    net, clamps = chain_of("here", "there", "here")
    sim = pcsim.Simulator(net)
    sim.infer(clamps)
    with farther.swapping():
        net.to("cpu")
    assert "cross" in str(sim.plan)


@pytest.mark.usefixtures("crossing")
def test_a_network_that_finds_no_room_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net, clamps = chain_of("here", "there", "here")
    net.add_node("late", (3,))
    before, moves = {name: node.device for name, node in net.nodes.items()}, []

    def full(self: nn.Module, *given: object) -> nn.Module:
        moves.append(self)
        if len(moves) == 5:
            raise RuntimeError("out of memory")
        return to(self, *given)

    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        place(net, {"hidden1": "cpu", "output": farther.device(), "late": farther.device()})
    monkeypatch.undo()
    assert {name: node.device for name, node in net.nodes.items()} == before
    net.remove_node("late")
    pcsim.Simulator(net).infer(clamps)


@pytest.mark.usefixtures("crossing")
def test_what_cannot_be_placed_is_refused_and_nothing_moves() -> None:
    net = pcsim.topologies.mlp([6, 8, 3])
    with pytest.raises(GraphError, match="node 'hidden' is not in the network"):
        net.place({"hidden1": farther.device(), "hidden": "cpu"})
    for wrong in ("nowhere", None, "cuda:7"):
        with pytest.raises(GraphError, match=f"place 'output': {wrong!r} given, expected a device"):
            net.place({"hidden1": farther.device(), "output": wrong})  # type: ignore[dict-item]
    for strange in (["hidden1"], {3: "cpu"}):
        with pytest.raises(GraphError, match="expected a dictionary from nodes or their names to devices"):
            net.place(strange)  # type: ignore[arg-type]
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}
    assert net["hidden1"].device is None


@pytest.mark.usefixtures("crossing")
def test_what_does_not_lie_where_it_should_is_refused() -> None:
    net, clamps = chain_of("here", "there", "here")
    with pytest.raises(ClampError, match="'output': on device farther:0, expected cpu, where the node lies"):
        pcsim.Simulator(net).infer({**clamps, "output": clamps["output"].to(farther.device())})
    net.edges["hidden1->output"].module = away(nn.Linear(8, 3).double())
    with pytest.raises(GraphError, match="of a module that was exchanged, call"):
        pcsim.Simulator(net).infer(clamps)


@pytest.mark.usefixtures("crossing")
def test_a_module_that_is_shared_lies_in_one_place() -> None:
    shared = nn.Linear(4, 4)
    net = pcsim.Network()
    for name in "abc":
        net.add_node(name, (4,))
    net.add_edge("a", "b", shared)
    net.add_edge("b", "c", shared)
    place(net, {"b": farther.device()})
    with pytest.raises(
        GraphError, match="'a->b' lies on farther:0, but something of it on cpu: put the nodes that share"
    ):
        pcsim.Simulator(net).infer({"a": torch.randn(2, 4)})
    place(net, {"c": farther.device()})
    pcsim.Simulator(net).infer({"a": torch.randn(2, 4), "c": torch.randn(2, 4, device=farther.device())})


@pytest.mark.usefixtures("crossing")
def test_a_node_that_came_later_has_to_be_placed() -> None:
    net, clamps = chain_of("here", "there", "here")
    net.add_node("late", (3,))
    net.add_edge("hidden1", "late", away(nn.Linear(8, 3).double()))
    with pytest.raises(GraphError, match="node 'late' was added after others were placed"):
        pcsim.Simulator(net).infer(clamps)
    place(net, {"late": farther.device()})
    pcsim.Simulator(net).infer(clamps)
    net.add_edge("input", "late", nn.Linear(6, 3).double())
    with pytest.raises(GraphError, match="edge 'input->late' was added after others were placed"):
        pcsim.Simulator(net).infer(clamps)
    place(net, {})
    pcsim.Simulator(net).infer(clamps)

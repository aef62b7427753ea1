"""Compiled steps: what is written down of a step, as a graph of values, leaves what its calls leave.

The graph is computed as it is, without a compiler; what is marked ``slow`` is compiled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_devices import CASES, NETWORKS, RELAXATIONS, RULES, batch_of
from torch import Tensor, fx, nn
from torch.optim import SGD

import pcsim
from pcsim import verify
from pcsim.engine.batched import compiled
from pcsim.engine.batched.places import Arena
from pcsim.errors import DivergenceError

aten = torch.ops.aten


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that would have been compiled; they are computed as they are, of runs of three steps and more."""
    found = list[fx.GraphModule]()

    def leave(graph: fx.GraphModule, given: Sequence[Tensor]) -> Callable[..., object]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "compile_graph", leave)
    monkeypatch.setattr(compiled, "FEWEST", 2)
    monkeypatch.setattr("pcsim.engine.batched.program.FEWEST", 2)
    return found


def simulator(net: pcsim.Network, *rules: Any, compiled: bool, **options: Any) -> pcsim.Simulator:
    return pcsim.Simulator(net, *rules, engine=partial(pcsim.BatchedEngine, compiled=compiled), **options)


def left_of(sim: pcsim.Simulator) -> list[Tensor]:
    """All that a run leaves to be read."""
    nodes = sim.network.nodes.values()
    values = [node.value.clone() for node in nodes]
    errors = [node.error.clone() for node in nodes if node.incoming]
    predictions = [node.prediction.clone() for node in nodes if node.incoming]
    return [*values, *errors, *predictions]


def alike(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


BETWEEN = {
    "incremental": "the weights learn",
    "sampling": "noise is drawn (temperature)",
    "multipliers": "multipliers grow",
}

ALIKE = [case for case in CASES if case[0] == "chain" or case[1] == "settled"]
"""Networks and rules whose steps are alike, or would be."""


@pytest.mark.filterwarnings("ignore::pcsim.PCWarning")
@pytest.mark.parametrize(
    ("network", "rule", "size"), [*((*case, 4) for case in ALIKE), *((*case, 1) for case in ALIKE[:5])]
)
def test_compiled_steps_leave_what_their_calls_leave(
    network: str, rule: str, size: int, graphs: list[fx.GraphModule]
) -> None:
    left = []
    for compiling in (False, True):
        torch.manual_seed(0)
        net, (relaxation, learns) = NETWORKS[network]().double(), {**RULES, **RELAXATIONS}[rule]
        sim, found = simulator(net, relaxation, learns, compiled=compiling), list[Tensor]()
        optimizer = SGD(net.parameters(), lr=1e-3)
        for number in range(4):
            batch = batch_of(net, "cpu", size)
            clamps = {name: v.double() + 0.1 * number if v.is_floating_point() else v for name, v in batch.items()}
            sim.update(clamps, optimizer)
            found += left_of(sim)
        left.append([*found, *net.state_dict().values()])
        assert compiling or not graphs
    alike(*left)
    told = str(sim.program)
    if rule in BETWEEN:
        assert f"compiled: no steps, since something happens between two steps: {BETWEEN[rule]}" in told
        assert not graphs
    if (network, rule) == ("chain", "settled"):
        assert "compiled: 10 steps at a time" in told
        assert len(graphs) == 1  # by both programs that take turns


Step = Callable[[dict[str, Tensor]], list[Callable[[], object]]]


def pieces(of: dict[str, Tensor]) -> list[Callable[[], object]]:
    """Parts of a storage that overlap, begin anywhere, and are read whole after they were written one by one."""
    a, b = of["a"], of["b"]
    return [
        partial(torch.mul, a[2:5], 0.5, out=b[1:4]),
        partial(b[3:7].add_, a[4:8], alpha=0.3),
        partial(torch.sin, b, out=a),
        partial(a[6:].mul_, of["weight"][0, 0]),
    ]


def turned(of: dict[str, Tensor]) -> list[Callable[[], object]]:
    """Axes in another order than memory's, read and written."""
    c = of["c"]
    return [
        partial(torch.tanh, of["d"].permute(2, 0, 1), out=c.permute(2, 0, 1)),
        partial(c.transpose(0, 2).add_, of["d"].transpose(0, 2), alpha=0.3),
        partial(torch.mul, c.transpose(0, 1), 0.5, out=of["d"].transpose(0, 1)),
    ]


def spread(of: dict[str, Tensor]) -> list[Callable[[], object]]:
    """What is read counts several times."""
    a, b = of["a"], of["b"]
    return [
        partial(b.view(2, 4).add_, a[4:].expand(2, 4)),
        partial(b.sub_, a[0].expand(8)),
        partial(torch.cos, b, out=a),
    ]


def made_on_the_way(of: dict[str, Tensor]) -> list[Callable[[], object]]:
    """Tensors that are new each time, and views of weights within an operation."""
    a, weight = of["a"], of["weight"]
    return [lambda: a[:4].copy_((a[:4].view(2, 2) @ weight.t()).view(4)), lambda: a[4:].add_(a[:4].abs().sum())]


@pytest.mark.parametrize(
    ("make", "read", "written"), [(pieces, 3, 2), (turned, 1, 1), (spread, 2, 2), (made_on_the_way, 2, 1)]
)
@pytest.mark.parametrize("counts", [(3, 3, 3), (9, 20, 1, 40), (33, 2, 33)])
def test_any_step(make: Step, read: int, written: int, counts: tuple[int, ...], graphs: list[fx.GraphModule]) -> None:
    """However often it is taken, it leaves in memory what its calls leave; so many storages are read and written."""
    left = []
    for compiling in (False, True):
        torch.manual_seed(0)
        shapes = {"a": (8,), "b": (8,), "c": (2, 3, 4), "d": (2, 3, 4)}
        of = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        of["weight"] = nn.Parameter(torch.randn(2, 2).double() / 2)
        step, found = make(of), list[Tensor]()
        taken = compiled.CompiledSteps(step, Arena(1, torch.float64, torch.device("cpu")))
        with torch.no_grad():
            for count in counts:
                if compiling:
                    taken.take(count)
                for call in () if compiling else count * step:
                    call()
                found += [tensor.clone() for tensor in of.values()]
        left.append(found)
    alike(*left)
    assert graphs
    for graph in graphs:
        nodes = list(graph.graph.nodes)
        assert sum(node.op == "placeholder" for node in nodes) == read
        assert sum(node.target is aten.copy_.default for node in nodes) == written


@pytest.mark.parametrize("how", ["reads", "writes"])
def test_a_tensor_with_gaps(how: str, graphs: list[fx.GraphModule]) -> None:
    a, b = torch.zeros(8), torch.zeros(4)
    call = partial(a[::2].add_, 1.0) if how == "writes" else partial(b.sub_, a[::2])
    steps = compiled.CompiledSteps([partial(a.add_, 1.0), call], Arena(1, torch.float32, torch.device("cpu")))
    with pytest.warns(pcsim.PCWarning, match="since an operation (reads|writes) a tensor with gaps"):
        steps.take(5)
    assert torch.equal(a, torch.tensor(4 * [10.0, 5.0])) if how == "writes" else torch.equal(b, torch.full((4,), -15.0))
    assert "no steps, since an operation" in str(steps)


def test_a_row_is_multiplied_with_matrices_as_sums(graphs: list[fx.GraphModule]) -> None:
    """The products of a batch of one, alone and stacked, with factors other than one."""
    net = pcsim.topologies.mlp([6, 8, 8, 8, 3])
    net["hidden2"].precision = 0.5
    for size in (1, 2):
        sim = simulator(net, pcsim.Relaxation(12, 0.1), compiled=True)
        sim.infer(batch_of(net, "cpu", size))
        made = {node.target for node in graphs.pop().graph.nodes}
        assert made.isdisjoint(compiled.PRODUCTS) is (size == 1)
        assert (aten.sum.dim_IntList in made) is (size == 1)


def test_only_what_the_next_step_reads_is_carried_on(graphs: list[fx.GraphModule]) -> None:
    """Of a chain that is what free nodes have received, or their values: two storages, and no prediction or error."""
    net = pcsim.topologies.mlp([6, 8, 7, 3])
    simulator(net, pcsim.Relaxation(12, 0.1), compiled=True).infer(batch_of(net, "cpu"))
    [graph] = graphs
    assert sum(node.target is aten.copy_.default for node in graph.graph.nodes) == 2


def test_nothing_is_compiled_where_no_steps_are_alike(graphs: list[fx.GraphModule]) -> None:
    net = pcsim.topologies.mlp([6, 8, 7, 3])
    spiking = pcsim.Relaxation(3, 0.5, precision=pcsim.Spiking())
    with pytest.warns(pcsim.PCWarning, match="one by one, since no 3 steps that are alike follow each other"):
        simulator(net, spiking, compiled=True).infer(batch_of(net, "cpu"))
    assert not graphs


def test_what_leaves_its_results_elsewhere_is_named(graphs: list[fx.GraphModule]) -> None:
    net = NETWORKS["images"]()
    with pytest.warns(pcsim.PCWarning, match=r"since what 'predict .*' makes is kept elsewhere each time"):
        simulator(net, pcsim.Relaxation(12, 0.1), compiled=True).infer(batch_of(net, "cpu"))
    assert not graphs


@pytest.mark.parametrize("how", ["data", "assign", "transposed"])
def test_weights_that_are_put_elsewhere(how: str, graphs: list[fx.GraphModule]) -> None:
    def run(compiling: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net, found = pcsim.topologies.mlp([6, 8, 7, 3]).double(), list[Tensor]()
        sim = simulator(net, pcsim.Relaxation(12, 0.1), compiled=compiling)
        for number in range(6):
            sim.infer({"input": torch.randn(4, 6).double(), "output": torch.randn(4, 3).double()})
            found += left_of(sim)
            if number == 2 and how == "assign":
                net.load_state_dict({name: 2 * tensor for name, tensor in net.state_dict().items()}, assign=True)
            elif number == 2:
                for parameter in net.parameters():
                    moved = 2 * parameter.data
                    parameter.data = moved.mT.contiguous().mT if how == "transposed" and moved.dim() == 2 else moved
        return found

    called = run(False)
    alike(called, run(True))


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_compiler_that_fails_leaves_all_as_it_is(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: fx.GraphModule, given: Sequence[Tensor]) -> Callable[..., object]:
        raise kind("no C++ compiler\nwas found\n\nSet this or that to see more")

    monkeypatch.setattr(compiled, "compile_graph", fail)
    left = []
    for compiling in (False, True):
        torch.manual_seed(0)
        net = pcsim.topologies.mlp([6, 8, 7, 3]).double()
        sim, clamps = simulator(net, pcsim.Relaxation(20, 0.1), compiled=compiling), batch_of(net, "cpu")
        clamps = {name: value.double() for name, value in clamps.items()}
        if compiling:
            with pytest.warns(pcsim.PCWarning, match="one by one, since no C[+]{2} compiler was found$"):
                sim.infer(clamps)
        else:
            sim.infer(clamps)
        left.append(left_of(sim))
    alike(*left, tolerance=0)
    assert "compiled: no steps, since no C++ compiler was found" in str(sim.program)


def test_a_compiler_that_fails_without_a_word_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(graph: fx.GraphModule, given: Sequence[Tensor]) -> Callable[..., object]:
        asked.append(graph)
        raise AssertionError

    monkeypatch.setattr(compiled, "compile_graph", fail)
    net = pcsim.topologies.mlp([6, 8, 7, 3])
    sim, clamps = simulator(net, pcsim.Relaxation(20, 0.1), compiled=True), batch_of(net, "cpu")
    for _ in range(2):
        with pytest.warns(pcsim.PCWarning, match="one by one, since AssertionError$"):
            sim.infer(clamps)
    for _ in range(4):
        sim.infer(clamps)
    assert len(asked) == len(sim.engine.programs(sim._state)) == 2


@pytest.mark.filterwarnings("ignore::pcsim.PCWarning")
def test_what_has_no_place_in_a_graph_is_called(graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as products by a library whose tensors have no strides."""
    monkeypatch.setattr(compiled, "_functional", lambda operation: refuse(operation))

    def refuse(operation: object) -> None:
        raise compiled.UncompilableError(f"{operation} is not known to make the same elsewhere")

    net = pcsim.topologies.mlp([6, 8, 7, 3])
    sim = simulator(net, pcsim.Relaxation(20, 0.1), compiled=True)
    with pytest.warns(pcsim.PCWarning, match="is not known to make the same elsewhere"):
        sim.infer(batch_of(net, "cpu"))
    before = net["hidden1"].value.clone()
    sim.infer(batch_of(net, "cpu"))
    assert torch.equal(net["hidden1"].value, before)


def test_a_failed_batch_leaves_what_the_last_one_left(graphs: list[fx.GraphModule]) -> None:
    net = pcsim.topologies.mlp([6, 8, 7, 3])
    sim, clamps = simulator(net, pcsim.Relaxation(20, 0.1), compiled=True), batch_of(net, "cpu")
    for _ in range(3):
        sim.infer(clamps)
    before = left_of(sim)
    with pytest.raises(DivergenceError):
        sim.infer({**clamps, "output": 1e30 * clamps["output"]})
    alike(left_of(sim), before, tolerance=0)
    assert graphs


@pytest.mark.filterwarnings("ignore::pcsim.PCWarning")
@pytest.mark.parametrize("count", [25, pytest.param(150, marks=pytest.mark.slow)])
def test_random_networks(count: int, graphs: list[fx.GraphModule]) -> None:
    def check(case: verify.Case) -> None:
        left = []
        for compiling in (False, True):
            own, longer = case.copy(), attrs.evolve(case.relaxation, steps=12)
            sim, found = simulator(own.network, longer, case.rule, compiled=compiling), list[Tensor]()
            for _ in range(3):
                torch.manual_seed(0)
                sim.infer(case.clamps)
                found += left_of(sim)
            left.append(found)
        alike(*left, tolerance=1e-9)

    drawn = given(
        verify.cases(
            verify.networks(
                combines=False,
                node_factory=lambda shape: {"transfer": nn.Tanh()},
                edge_factory=lambda source, contribution: nn.Linear(source[0], contribution[0]),
                node_shapes=st.tuples(st.integers(1, 4)),
            ),
            rules=(pcsim.SettledUpdate(),),
            partial=False,
            momentum=False,
        )
    )(check)
    settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )(drawn)()
    assert len(graphs) > count // 5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float32), (4, torch.float32), (1, torch.float64)])
def test_the_compiler_leaves_what_the_calls_leave(size: int, dtype: torch.dtype) -> None:
    left = []
    for compiling in (False, True):
        torch.manual_seed(0)
        net = pcsim.topologies.mlp([6, 32, 32, 3], activation=nn.Sigmoid).to(dtype)
        sim, found = simulator(net, pcsim.Relaxation(30, 0.1), compiled=compiling), list[Tensor]()
        optimizer = SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            sim.update({name: value.to(dtype) for name, value in batch_of(net, "cpu", size).items()}, optimizer)
            found += [*left_of(sim), *(parameter.detach().clone() for parameter in net.parameters())]
        left.append(found)
    assert "steps at a time, in" in str(sim.program)
    # Errors are differences of units of about 1, to whose rounding they are compared.
    alike(*left, tolerance=1e-6 if dtype == torch.float32 else 1e-14)

"""What probes record, against runs of 0, 1, ... steps; and that recording changes nothing else."""

from __future__ import annotations

import warnings
from functools import partial

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import pcsim
from pcsim import plots, verify
from pcsim.engine.batched.engine import BatchedEngine
from pcsim.verify.restart import Horizon

CASES = verify.cases(
    verify.networks(nodes=(2, 6)),
    rules=(*verify.RULES, pcsim.ArrivalUpdate()),
    held=True,
    sampled=True,
    multiplied=True,
    by_errors=True,
    judged=True,
    most_steps=4,
)
some = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def step_by_step(case: verify.Case) -> dict[str, dict[str, list[Tensor]]]:
    """Values, predictions and errors of all nodes after 0, 1, ... steps, each a run of its own, by the reference."""
    own, whole = case.copy(), case.relaxation
    seen: dict[str, dict[str, list[Tensor]]] = {name: {} for name in own.network.nodes}
    rule = case.rule if case.rule.backprop else pcsim.SettledUpdate()
    for steps in range(0 if rule.backprop else whole.steps, -1, -1):
        part = attrs.evolve(whole, steps=steps)
        if not whole.relaxes_errors:
            part = attrs.evolve(part, precision=Horizon(whole.precision, whole.steps))
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pcsim.PrecisionWarning)
            pcsim.Simulator(own.network, part, rule, engine="reference").infer(own.clamps)
        for name, node in own.network.nodes.items():
            for what in ("value", "prediction", "error") if node.predicted else ("value",):
                seen[name].setdefault(what, []).insert(0, getattr(node, what))
    return seen


@some
@given(CASES)
def test_a_recording_is_what_runs_of_fewer_steps_would_show(case: verify.Case) -> None:
    try:
        expected = step_by_step(case)
    except pcsim.PCError:
        return
    for engine in ("reference", "batched", partial(BatchedEngine, leave_out=False)):
        own = case.copy()
        torch.manual_seed(0)
        trace = own.simulator(engine).infer(own.clamps, record=own.network.nodes.values())
        for name, parts in expected.items():
            assert set(parts) == {part for part, kept in trace.recordings[name]._asdict().items() if kept is not None}
            for part, states in parts.items():
                whole = torch.stack(states)
                size = max(1.0, float(whole.abs().max()) if whole.numel() else 0.0)
                torch.testing.assert_close(
                    getattr(trace, part)(name), whole, rtol=0, atol=1e-9 * size, msg=f"{part} of {name}: {case!r}"
                )


@some
@given(CASES)
def test_recording_changes_neither_values_nor_gradients(case: verify.Case) -> None:
    probed = [name for place, name in enumerate(case.network.nodes) if place % 2]
    found = []
    for record in (False, probed):
        own = case.copy()
        optimizer = verify.RecordingOptimizer(own.network, 0.01)
        torch.manual_seed(0)
        try:
            sim = own.simulator()
            for _ in range(2):
                if any(own.network[name].predicted for name in own.clamps):
                    sim.update(own.clamps, optimizer, record=record)
                else:
                    sim.infer(own.clamps, record=record)
        except pcsim.PCError:
            return
        found.append(([node.value for node in own.network.nodes.values()], optimizer.gradients))
    (values, gradients), (others, found_beside) = found
    for one, other in zip(values, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    for before, after in zip(gradients, found_beside, strict=True):
        for name, gradient in before.items():
            assert (gradient is None) == (after[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, after[name], rtol=1e-8, atol=1e-9)


def chain() -> tuple[pcsim.Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 6, 6, 6, 2])
    return net, {"input": torch.randn(4, 3), "output": torch.randn(4, 2)}


def test_the_plan_keeps_alive_what_is_recorded_and_nothing_else() -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(8, 0.5, precision=pcsim.Spiking(0.0)), pcsim.ForwardUpdate())
    computed = {}
    for record in (None, "hidden1", pcsim.Probe("hidden2", of="value"), pcsim.Probe("hidden2", of="error"), True):
        sim.infer(clamps, record=False if record is None else record)
        plan = sim.plan
        refreshed = sum(plan.phases[place].refresh for place in plan.sequence)
        edges = [edge.name for edge in plan.wiring.edges]
        computed[str(record)] = {name for name, count in zip(edges, refreshed.tolist(), strict=True) if count}
    nothing, first, value, error, everything = computed.values()
    assert nothing == first == value == set()  # what is predicted from clamps alone never changes
    assert error == {"hidden1->hidden2"}
    assert len(everything) > 1


def test_units_are_chosen_by_number_by_place_or_by_a_mask() -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_edge(net.add_node("image", (2, 3, 3)), net.add_node("map", (2, 3, 3)), nn.Conv2d(2, 2, 3, padding=1))
    net.add_edge(net["map"], net.add_node("code", (4,)), nn.Sequential(nn.Flatten(), nn.Linear(18, 4)))
    sim, clamps = (
        pcsim.Simulator(net, pcsim.Relaxation(5)),
        {"image": torch.randn(2, 2, 3, 3), "code": torch.ones(2, 4)},
    )
    whole = sim.infer(clamps, record=["map", net["code"]])
    assert whole.value("map").shape == (6, 2, 2, 3, 3)
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[1, 2, 0] = mask[0, 1, 1] = True
    by_place = sim.infer(
        clamps, record=[pcsim.Probe("map", units=[(0, 1, 1), (1, 2, 0)]), pcsim.Probe("code", units=[3])]
    )
    by_mask = sim.infer(clamps, record=pcsim.Probe(net["map"], units=mask, of=["error", "value"]))
    assert torch.equal(
        by_place.value("map"), torch.stack([whole.value("map")[:, :, 0, 1, 1], whole.value("map")[:, :, 1, 2, 0]], 2)
    )
    assert torch.equal(by_place.error("code"), whole.error(net["code"])[:, :, 3:])
    assert torch.equal(by_mask.error("map"), by_place.error("map"))
    with pytest.raises(
        pcsim.errors.StateError, match=r"no prediction of node 'map', but value of 'map', error of 'map'"
    ):
        by_mask.prediction("map")


def test_energies_and_probes_may_be_recorded_together() -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1))
    both, alone = sim.infer(clamps, record=[True, "hidden2"]), sim.infer(clamps, record=True)
    assert torch.equal(both.energy("output"), alone.energy("output"))
    torch.testing.assert_close(0.5 * both.error("hidden2").square().sum(2), both.energy("hidden2"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("hiden1", "record: no node 'hiden1'; the network has"),
        (["hidden1", "hidden1"], "record: node 'hidden1' given twice"),
        ([None], "expected True"),
        (3, "expected True"),
        (pcsim.Probe("input", of="error"), "error of node 'input' asked for, but no edge leads into it"),
        (pcsim.Probe("hidden1", units=[6]), r"unit 6 of node 'hidden1' given, but its values have the shape \(6,\)"),
        (pcsim.Probe("hidden1", units=[(0, 1)]), r"unit \(0, 1\) of node 'hidden1'"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_any_work(record: object, message: str) -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net)
    sim.infer(clamps)
    before = net["hidden1"].value
    with pytest.raises(pcsim.errors.SettingError, match=message):
        sim.infer({name: 2 * value for name, value in clamps.items()}, record=record)  # type: ignore[arg-type]
    assert torch.equal(net["hidden1"].value, before)


@pytest.mark.parametrize("arguments", [{"of": "energy"}, {"of": []}, {"units": [0.5]}, {"units": []}, {"units": "all"}])
def test_a_probe_of_something_else_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(pcsim.errors.SettingError, match="Probe: "):
        pcsim.Probe("hidden1", **arguments)  # type: ignore[arg-type]


def test_units_are_drawn_against_steps() -> None:
    net, clamps = chain()
    trace = pcsim.Simulator(net, pcsim.Relaxation(7)).infer(clamps, record=["hidden2"])
    errors = trace.error("hidden2")[:, 1]
    (axes, _bar) = pcsim.plots.unit_map(trace, "hidden2", sample=1).axes
    drawn = axes.collections[0].get_array()
    assert torch.equal(torch.as_tensor(drawn), errors.T.double())
    assert axes.collections[0].norm(0.0) == 0.5  # white, whatever the largest
    (axes,) = pcsim.plots.unit_raster(trace, net["hidden2"], sample=1, above=0.01).axes
    marks = {(row, int(at)) for row, line in enumerate(axes.collections) for at in line.get_positions()}
    assert marks == {(unit, step) for step, unit in (errors.abs() > 0.01).nonzero().tolist()}
    assert marks


def test_units_that_are_not_there_are_not_drawn() -> None:
    net, clamps = chain()
    trace = pcsim.Simulator(net, pcsim.Relaxation(5)).infer(clamps, record=["hidden2"])
    for options, message in (
        ({"part": "energy"}, "part='energy'"),
        ({"sample": 4}, "sample=4 given"),
        ({"above": -1}, "above=-1"),
    ):
        with pytest.raises(pcsim.errors.SettingError, match=message):
            pcsim.plots.unit_raster(trace, "hidden2", **options)  # type: ignore[arg-type]


def test_chosen_units_keep_their_numbers() -> None:
    net = pcsim.topologies.mlp([4, 32, 3])
    clamps = {"input": torch.randn(2, 4), "output": torch.randn(2, 3)}
    probe = pcsim.Probe("hidden1", units=[7, 19, 30])
    trace = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1)).infer(clamps, record=[probe])
    assert trace.recordings["hidden1"].units == ((7,), (19,), (30,))
    assert repr(trace) == "Trace(5 steps, 2 nodes; recorded: value and prediction and error of 'hidden1')"
    for figure in (plots.unit_raster(trace, "hidden1"), plots.unit_map(trace, "hidden1")):
        figure.canvas.draw()
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["7", "19", "30"]


@pytest.mark.parametrize("steps", [3, 6])
def test_the_value_alone_of_a_node_that_follows_is_that_of_its_step(steps: int) -> None:
    """Where precision is silent nothing else asks for it."""
    torch.manual_seed(0)
    net = pcsim.topologies.residual_mlp(4, 5, 3, blocks=2).double()
    clamps = {"input": torch.randn(2, 4).double(), "output": torch.randn(2, 3).double()}
    found = []
    for record in ([pcsim.Probe("sum1", of="value")], ["sum1"]):
        sim = pcsim.Simulator(net, pcsim.Relaxation(steps, 0.5, precision=pcsim.Spiking(alpha=0.0)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pcsim.PrecisionWarning)
            found.append(sim.infer(clamps, record=record).value("sum1"))
    assert not torch.equal(found[0][0], found[0][-1])
    torch.testing.assert_close(*found)

"""Clamps that change with the step: against the steps taken one by one, in both engines."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

import pcsim
from pcsim import verify
from pcsim.engine.batched.engine import BatchedEngine
from pcsim.errors import ClampError, SettingError
from pcsim.verify.case import given_value

CASES = verify.cases(
    verify.networks(nodes=(2, 6)),
    rules=(
        pcsim.SettledUpdate(),
        pcsim.ForwardUpdate(),
        pcsim.IncrementalUpdate(),
        pcsim.ArrivalUpdate(),
    ),
    sampled=True,
    multiplied=True,
    by_errors=True,
    most_steps=4,
)
some = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def streamed(case: verify.Case, every: int, chosen: int, seed: int) -> dict[str, object]:
    """The case's clamps, some of them as streams of random frames, the first of which is what is given."""
    steps, generator = case.relaxation.steps, torch.Generator().manual_seed(seed)
    clamps: dict[str, object] = dict(case.clamps)
    if steps == 0:
        return clamps
    every = every if steps % every == 0 else 1
    for place, (name, clamp) in enumerate(case.clamps.items()):
        if not chosen >> place & 1:
            continue
        first = given_value(clamp)
        frames = torch.randn(steps // every, *first.shape, generator=generator, dtype=torch.float64)
        if isinstance(case.network[name].energy_function, pcsim.CrossEntropy):
            frames = torch.softmax(frames, 2)
        frames[0] = first
        stream = pcsim.Stream(frames, every=every)
        clamps[name] = (stream, clamp[1]) if isinstance(clamp, tuple) else stream
    return clamps


def left(
    case: verify.Case, clamps: dict[str, object], engine: str | Callable[[pcsim.Network], pcsim.Engine], record: object
) -> tuple[dict[str, Tensor | None], str]:
    """Values, recordings, messages and gradients of two updates, or what was refused."""
    own = case.copy()
    torch.manual_seed(0)
    optimizer, found = verify.RecordingOptimizer(own.network, 0.01), dict[str, Tensor | None]()
    try:
        sim = own.simulator(engine)
        for run in (1, 2):
            if any(own.network[name].predicted for name in clamps):
                trace = sim.update(clamps, optimizer, record=record)  # type: ignore[arg-type]
            else:
                trace = sim.infer(clamps, record=record)  # type: ignore[arg-type]
            for name, recording in trace.recordings.items():
                found |= {f"{run}: {part} of {name}": kept for part, kept in recording._asdict().items()}
            found |= {f"{run}: energies": trace.energies, f"{run}: F": trace.free_energies}
            found |= {f"{run}: value of {name}": node.value for name, node in own.network.nodes.items()}
            found |= {f"{run}: forward {name}": node.forward_value for name, node in own.network.nodes.items()}
            found |= {f"{run}: message {name}": edge.message for name, edge in own.network.edges.items()}
        for update, gradients in enumerate(optimizer.gradients):
            found |= {f"update {update}: {name}": gradient for name, gradient in gradients.items()}
    except pcsim.PCError as refused:
        return {}, type(refused).__name__
    return found, ""


@some
@given(CASES, st.integers(1, 3), st.integers(1, 7), st.integers(0, 2**16), st.booleans())
def test_engines_agree_on_streams(case: verify.Case, every: int, chosen: int, seed: int, recorded: bool) -> None:
    clamps = streamed(case, every, chosen, seed)
    record = [True, *case.network.nodes] if recorded else False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pcsim.PCWarning)
        expected, refusal = left(case, clamps, "reference", record)
        for engine in ("batched", partial(BatchedEngine, leave_out=False)):
            found, refused = left(case, clamps, engine, record)
            assert refused == refusal, case
            assert found.keys() == expected.keys()
            for what, one in expected.items():
                other = found[what]
                assert (one is None) == (other is None), f"{what}: {case!r} {clamps}"
                if one is not None and other is not None:
                    size = max(1.0, float(one.abs().max()) if one.numel() else 0.0)
                    assert float((other - one).abs().max()) <= 1e-9 * size, f"{what}: {case!r} {clamps}"


@some
@given(
    verify.cases(verify.networks(nodes=(2, 6)), rules=(pcsim.SettledUpdate(),), momentum=False, most_steps=4),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(0, 2**16),
)
def test_a_stream_is_its_frames_one_by_one(case: verify.Case, every: int, chosen: int, seed: int) -> None:
    case = attrs.evolve(case, relaxation=attrs.evolve(case.relaxation, precision=pcsim.Constant()))
    clamps, steps = streamed(case, every, chosen, seed), case.relaxation.steps
    if not steps or any(case.network[name].energy_function.has_minimum is False for name in case.free):
        return
    own, single = case.copy(), case.copy()
    sim = own.simulator()
    trace = sim.infer(clamps, record=list(own.network.nodes))  # type: ignore[arg-type]
    one = pcsim.Simulator(single.network, attrs.evolve(case.relaxation, steps=1), engine="reference")
    there: dict[str, Tensor] | None = None
    for step in range(steps):
        now = {}
        for name, clamp in clamps.items():
            stream, *mask = clamp if isinstance(clamp, tuple) else (clamp,)
            value = stream.frames[step // stream.every] if isinstance(stream, pcsim.Stream) else stream  # type: ignore[index]
            now[name] = (value, *mask) if mask else value
        before = one.infer(now, init=there, record=list(own.network.nodes))  # type: ignore[arg-type]
        there = {name: single.network[name].value for name in single.free}
        for name in own.network.nodes:
            torch.testing.assert_close(trace.value(name)[step], before.value(name)[0], rtol=1e-9, atol=1e-9)
    for name, node in own.network.nodes.items():
        torch.testing.assert_close(node.value, single.network[name].value, rtol=1e-9, atol=1e-9)
    if any(own.network[name].predicted for name in clamps):
        found, expected = sim.gradients(), one.gradients()
        unseen = {id(node.log_precision) for node in own.network.nodes.values()}
        for mine, other in zip(own.network.parameters(), single.network.parameters(), strict=True):
            # A run that starts anywhere takes every error to be live, and −½ log π with it.
            if other in expected and (mine in found or id(mine) not in unseen):
                gradient = found.get(mine, torch.zeros_like(mine))
                torch.testing.assert_close(gradient, expected[other], rtol=1e-8, atol=1e-9)


def chain() -> tuple[pcsim.Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 6, 6, 2]).double()
    return net, {"input": torch.randn(4, 3).double(), "output": torch.randn(4, 2).double()}


def test_a_function_of_the_step_is_a_stream() -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(6, 0.1))
    asked = []

    def turning(step: int) -> Tensor:
        asked.append(step)
        return clamps["input"] * torch.cos(torch.tensor(float(step)))

    by_function = sim.infer({**clamps, "input": pcsim.Stream(turning, every=2)}, record=["hidden1"])
    assert asked == [0, 2, 4]
    frames = torch.stack([clamps["input"] * torch.cos(torch.tensor(float(step))) for step in (0, 2, 4)])
    by_tensor = sim.infer({**clamps, "input": pcsim.Stream(frames, every=2)}, record=["hidden1"])
    assert torch.equal(by_function.value("hidden1"), by_tensor.value("hidden1"))
    assert torch.equal(net["input"].value, frames[-1])


def test_frames_that_stay_the_same_are_no_stream() -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(6, 0.1, momentum=0.5))
    plain = sim.infer(clamps, record=["hidden1", "hidden2"])
    same = {name: pcsim.Stream(value.expand(6, *value.shape)) for name, value in clamps.items()}
    streamed_ = sim.infer(same, record=["hidden1", "hidden2"])
    torch.testing.assert_close(streamed_.value("hidden1"), plain.value("hidden1"), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(streamed_.error("hidden2"), plain.error("hidden2"), rtol=1e-12, atol=1e-14)


def test_nudged_targets_follow_their_stream() -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), nudging=pcsim.Nudging(0.25))
    frames = torch.randn(4, 4, 2, dtype=torch.float64)
    for engine in ("batched", "reference"):
        sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), nudging=pcsim.Nudging(0.25), engine=engine)
        trace = sim.infer({**clamps, "output": pcsim.Stream(frames)}, record=[pcsim.Probe("output", of="value")])
        forward = net["output"].forward_prediction
        expected = torch.stack([torch.lerp(forward, frame, 0.25) for frame in (*frames, frames[-1])])
        torch.testing.assert_close(trace.value("output"), expected)


@pytest.mark.parametrize("rule", [pcsim.ForwardUpdate(), pcsim.ArrivalUpdate(), pcsim.SettledUpdate()])
def test_a_target_that_has_spoken_learns_from_what_it_is_given_since(rule: pcsim.LearningRule) -> None:
    net, clamps = chain()
    relaxation = pcsim.Relaxation(4, 0.2, precision=pcsim.Spiking(alpha=0.0))
    given, found = {**clamps, "output": pcsim.Stream(torch.randn(4, 4, 2, dtype=torch.float64))}, []
    for engine in ("batched", "reference"):
        sim = pcsim.Simulator(net, relaxation, rule, engine=engine)
        sim.infer(given)
        found.append(sim.gradients())
    assert found[0].keys() == found[1].keys()
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][parameter])


def test_a_relaxation_with_a_tolerance_waits_for_the_last_frame() -> None:
    net, clamps = chain()
    still = clamps["input"].expand(3, 4, 3).clone()
    still[2] += 1.0
    sim = pcsim.Simulator(net, pcsim.Relaxation(300, 0.3, tolerance=1e-3))
    trace = sim.infer({**clamps, "input": pcsim.Stream(still, every=100)}, record=["hidden1"])
    assert 200 < trace.steps < 300  # what had settled moves again
    assert float((trace.value("hidden1")[200] - trace.value("hidden1")[199]).abs().max()) < 1e-3
    torch.testing.assert_close(net["input"].value, still[2])


def test_only_what_depends_on_the_stream_is_computed_anew() -> None:
    net = pcsim.Network()
    for name in ("moving", "still", "a", "b", "y"):
        net.add_node(name, (3,))
    for source, target in (("moving", "a"), ("still", "b"), ("a", "y"), ("b", "y")):
        net.add_edge(source, target, nn.Linear(3, 3))
    sim = pcsim.Simulator(net, pcsim.Relaxation(6, 0.1))
    values = {name: torch.randn(2, 3) for name in ("moving", "still", "y")}
    sim.infer({**values, "moving": pcsim.Stream(torch.randn(2, 2, 3), every=3)})
    steps = [sim.plan.phases[place].refresh for place in sim.plan.sequence]
    edges = list(net.edges)
    assert [step for step, refresh in enumerate(steps) if refresh[edges.index("moving->a")]] == [3]
    assert not any(refresh[edges.index("still->b")] for refresh in steps)


@pytest.mark.parametrize(
    ("relaxation", "rule", "why"),
    [
        (pcsim.Relaxation(6, hold_predictions=True), None, "predictions are held"),
        (pcsim.Relaxation(6, least_rate=0.01), None, "with least_rate="),
        (pcsim.Relaxation(6), pcsim.Backprop(), "backprop takes no inference step"),
    ],
)
def test_where_nothing_can_change_a_stream_is_refused(
    relaxation: pcsim.Relaxation, rule: pcsim.LearningRule | None, why: str
) -> None:
    net, clamps = chain()
    stream = {**clamps, "input": pcsim.Stream(torch.randn(6, 4, 3).double())}
    with pytest.raises(ClampError, match=f"clamp 'input': a stream given, but {why}"):
        pcsim.Simulator(net, relaxation, rule).infer(stream)


def test_predictions_equilibria_and_checks_refuse_a_stream() -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(6))
    stream = {**clamps, "input": pcsim.Stream(torch.randn(6, 4, 3).double())}
    with pytest.raises(ClampError, match="predict takes no time"):
        sim.predict({"input": stream["input"]})
    with pytest.raises(ClampError, match="an equilibrium is that of one clamp"):
        sim.equilibrium(stream)
    with pytest.raises(SettingError, match="clamp 'input': a stream given, but checks look at one state"):
        verify.check_descent(net, stream)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (
            pcsim.Stream(torch.zeros(5, 4, 3).double()),
            "a stream of 5 frames, 1 steps each, given, but the relaxation takes 6",
        ),
        (pcsim.Stream(torch.zeros(6, 4, 3).double(), every=2), "6 frames, 2 steps each"),
        (pcsim.Stream(lambda step: torch.zeros(4, 3).double(), every=4), "no multiple"),
        (pcsim.Stream(torch.zeros(6, 4, 2).double()), r"shape \(4, 2\) given"),
        (pcsim.Stream(torch.zeros(6, 4, 3)), "dtype torch.float32 given"),
        (pcsim.Stream(lambda step: torch.zeros(4 + step, 3).double()), "samples given, expected the same number"),
        (pcsim.Stream(lambda step: torch.full((4, 3), 1.0 if step < 5 else float("nan")).double()), "holds NaN"),
        (pcsim.Stream(lambda step: None), "NoneType given, expected a tensor"),  # type: ignore[arg-type, return-value]
    ],
)
@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_a_stream_that_does_not_fit_is_refused_by_name(stream: pcsim.Stream, message: str, engine: str) -> None:
    net, clamps = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(6), engine=engine)
    sim.infer(clamps)
    before = net["hidden1"].value
    with pytest.raises(ClampError, match=f"clamp 'input': .*{message}"):
        sim.infer({**clamps, "input": stream})
    assert torch.equal(net["hidden1"].value, before)


@pytest.mark.parametrize(("frames", "every"), [([1.0], 1), (torch.zeros(1, 1), 0), (torch.zeros(1, 1), 1.5)])
def test_a_stream_of_something_else_is_refused(frames: object, every: object) -> None:
    with pytest.raises(SettingError, match="Stream: "):
        pcsim.Stream(frames, every=every)  # type: ignore[arg-type]


def test_learning_in_a_stream_is_that_of_its_last_state() -> None:
    net, clamps = chain()
    frames = torch.randn(5, 4, 3).double()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.2))
    sim.update({**clamps, "input": pcsim.Stream(frames)}, optim.SGD(net.parameters(), 0.0))
    edge = net.edges["input->hidden1"]
    expected = (
        -torch.einsum("bo,bi->oi", net["hidden1"].error * (1 - net["hidden1"].prediction.square()), frames[-1]) / 4
    )
    torch.testing.assert_close(next(edge.module.parameters()).grad, expected)

"""What a batch costs, by closed forms; nothing here depends on how long it takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import pcsim
from pcsim import diagnosis, profiling
from pcsim.engine.batched.measuring import Measurement
from pcsim.errors import SettingError

BATCH, STEPS = 4, 6


def chain(*modules: nn.Module) -> tuple[pcsim.Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = pcsim.Network()
    for name, size in (("a", 5), ("b", 7), ("c", 3)):
        net.add_node(name, (size,))
    for ends, module in zip((("a", "b"), ("b", "c")), modules or (nn.Linear(5, 7), nn.Linear(7, 3)), strict=True):
        net.add_edge(*ends, module)
    return net, {"a": torch.randn(BATCH, 5), "c": torch.randn(BATCH, 3)}


def test_products_are_those_of_the_method() -> None:
    net, clamps = chain()
    found = diagnosis.profile(pcsim.Simulator(net, pcsim.Relaxation(STEPS, 0.1)), clamps, runs=1)
    products = {row.what: row.products for row in found.by_stage()}
    first, second = BATCH * 5 * 7, BATCH * 7 * 3
    # b is predicted from a clamp, once; it moves from the first step on, so c's prediction is made anew after it.
    assert products["start"] == first + second
    assert products["predictions"] == (STEPS - 1) * second
    assert products["messages"] == STEPS * second
    assert products["learning"] == (second + first) + second  # c's prediction at the end, and both gradients
    parts = {row.what: row.products for row in found.by_part()}
    assert parts["a->b"] == 2 * first
    assert parts["b->c"] == sum(products.values()) - 2 * first
    assert sum(row.products for row in found.by_operation()) == sum(products.values())


def test_products_are_counted_by_whichever_library_they_are_made() -> None:
    counted = []
    for library in ("torch", "onednn"):
        net, clamps = chain()
        engine = partial(pcsim.BatchedEngine, products=library)
        found = diagnosis.profile(pcsim.Simulator(net, pcsim.Relaxation(STEPS, 0.1), engine=engine), clamps, runs=1)
        counted.append({row.what: row.products for row in found.by_stage()})
    assert counted[0] == counted[1]


def test_backprop_and_networks_without_a_target_are_measured_as_well() -> None:
    net, clamps = chain()
    backprop = diagnosis.profile(pcsim.Simulator(net, rule=pcsim.Backprop()), clamps, runs=1)
    assert {row.what for row in backprop.by_stage()} == {"start", "learning"}
    alone = diagnosis.profile(pcsim.Simulator(net), {"a": clamps["a"]}, runs=1)
    assert "learning" not in {row.what for row in alone.by_stage()}
    each = diagnosis.profile(pcsim.Simulator(net, rule=pcsim.IncrementalUpdate()), clamps, runs=1)
    assert "learning" not in {row.what for row in each.by_stage()}


def test_bytes_are_those_that_are_read_and_written() -> None:
    net, clamps = chain()
    found = diagnosis.profile(pcsim.Simulator(net, pcsim.Relaxation(1, 0.1)), clamps, runs=1)
    error = next(row for row in found.by_operation() if row.what == "error")
    assert error.bytes % (4 * 3 * BATCH) == 0  # of c alone: two tensors read, one written and returned, or one moved
    predict = next(row for row in found.by_operation() if row.what == "predict Linear")
    assert predict.bytes >= 4 * ((BATCH * 5 + 7 * 5 + 7 + BATCH * 7) + (BATCH * 7 + 3 * 7 + 3 + BATCH * 3))


def test_profiling_changes_nothing_else() -> None:
    net, clamps = chain()
    net["b"].transfer = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(7))
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(3)
    found = diagnosis.profile(sim, clamps, runs=2)
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert drawn == torch.rand(())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    fresh = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1), engine="reference")
    value = net["b"].value
    fresh.infer(clamps)
    torch.testing.assert_close(net["b"].value, value)
    for _ in range(3):  # programs are as they were
        sim.infer(clamps)
        torch.testing.assert_close(net["b"].value, value)
    assert found.by_stage()[0].calls > 0


def test_it_prints_tables_and_sentences() -> None:
    net, clamps = chain()
    found = diagnosis.profile(pcsim.Simulator(net), clamps, runs=1)
    text = str(found)
    assert text.startswith("one batch: ")
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("stage", "operation", "part"))] == [
        "stage",
        "operation",
        "part",
    ]
    assert text.splitlines()[-1] == found.advice[-1]
    assert "<caption>one batch: " in found._repr_html_()


def measured(operation: str, member: str, seconds: float, calls: int, stage: str = "messages") -> Measurement:
    return Measurement(stage, operation, (member,), calls, seconds)  # type: ignore[arg-type]


def test_what_would_help_is_said() -> None:
    """From measurements that are made up, so that no clock decides."""
    net, _ = chain(nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 3), nn.Softshrink()))
    sim = pcsim.Simulator(net, pcsim.Relaxation(9), pcsim.SettledUpdate())
    traced = profiling._advice(
        sim, [measured("predict", "b->c", 0.5, 9), measured("predict Linear", "a->b", 0.1, 1)], 0.61
    )
    assert "83% of the time goes through autograd, most of it 'b->c' (Sequential)" in traced[0]
    assert "9 steps at constant precision" in traced[-1]
    spiking = pcsim.Simulator(net, pcsim.Relaxation(9, precision=pcsim.Spiking(0.0)), pcsim.ForwardUpdate())
    short = profiling._advice(spiking, [measured("error", "c", 0.001, 1000)], 0.002)
    assert short[0].startswith("100% of the time is the making of calls (1,000 of them)")
    plain = profiling._advice(spiking, [measured("predict Linear", "a->b", 0.5, 10, "start")], 0.5)
    assert plain == ["Most of the time, 100%, goes into 'predict Linear'; nothing stands out."]


@pytest.mark.parametrize(
    ("size", "flushed", "said"), [(1e-20, False, True), (1e-20, True, False), (1e-4, False, False)]
)
def test_numbers_that_vanish_are_told_where_they_are_not_flushed(size: float, flushed: bool, said: bool) -> None:
    net, clamps = chain(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False))
    small = {name: size * value for name, value in clamps.items()}
    if not torch.set_flush_denormal(flushed) and flushed:
        pytest.skip("this processor does not flush")
    try:
        found = diagnosis.profile(pcsim.Simulator(net, pcsim.Relaxation(STEPS, 0.1)), small, runs=1)
    finally:
        torch.set_flush_denormal(False)
    assert any("subnormal" in sentence for sentence in found.advice) == said


def test_what_cannot_be_profiled_is_refused() -> None:
    net, clamps = chain()
    with pytest.raises(SettingError, match="the reference engine runs no operations"):
        diagnosis.profile(pcsim.Simulator(net, engine="reference"), clamps)
    with pytest.raises(SettingError, match="runs=0 given"):
        diagnosis.profile(pcsim.Simulator(net), clamps, runs=0)


def test_the_plan_marks_what_goes_through_autograd() -> None:
    net, clamps = chain(nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 3), nn.Softshrink()))
    net.add_node("d", (3,), combine=pcsim.Product())
    net.add_edge("c", "d")
    net.add_edge("c", "d")
    sim = pcsim.Simulator(net, pcsim.Relaxation(2))
    sim.infer(clamps)
    lines = str(sim.plan).splitlines()
    assert lines[-2:] == [
        "* through autograd, without a kernel: edges b->c (Sequential)",
        "* through autograd, without a kernel: nodes d (Product)",
    ]
    assert any(line.split() == ["predict", "b->c*"] for line in lines)
    other, clamps = chain()
    sim = pcsim.Simulator(other, pcsim.Relaxation(2))
    sim.infer(clamps)
    assert "autograd" not in str(sim.plan)

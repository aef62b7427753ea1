"""The benchmarks run, measure what they say, and compare equal computations. How fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import attrs
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def module(name: str) -> ModuleType:
    return import_module(f"benchmarks.{name}")


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_a_quick_run_fills_every_field_and_its_table(tmp_path: Path) -> None:
    rows_file, plot = tmp_path / "rows.json", tmp_path / "growth.png"
    implementations = ["pcsim-batched", "pcsim-reference", "torch-loop", "torch-backprop", "floor"]
    arguments = ["--workloads", "W1", "W3", "W4", "depth", "nodes", "--implementations", *implementations]
    arguments += ["--variants", "constant", "backprop", "--quick", "--no-memory", "--rounds", "2", "--threads", "1"]
    printed = run("benchmarks/run.py", *arguments, "--json", str(rows_file), "--plot", str(plot))
    rows = json.loads(rows_file.read_text())
    assert all(set(row) == {field.name for field in fields(module("rows").Row)} for row in rows)
    assert all(0 < row["min_ms"] <= row["median_ms"] and row["first_ms"] > 0 and row["rounds"] == 2 for row in rows)
    found = {(row["workload"], row["variant"], row["implementation"]) for row in rows}
    for name in ("W1", "W3"):
        assert {(name, "constant", each) for each in implementations if each != "torch-backprop"} <= found
        assert {(name, "backprop", each) for each in implementations if each != "torch-loop"} <= found
    assert ("W4", "constant", "pcsim-batched") in found
    assert len(found) < len(rows)  # growth has a row for each size
    compared = [row["agrees"] for row in rows if row["implementation"] in ("pcsim-reference", "torch-loop")]
    assert compared == [True] * len(compared)
    assert "constant / floor, W1" in printed
    assert "growth with nodes, constant" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| workload | variant | implementation |" in run("-m", "benchmarks.table", str(rows_file))


def test_implementations_agree_on_every_variant() -> None:
    workloads, plain, simulated = module("workloads"), module("plain"), module("simulated")
    for name in ("W1", "W1r", "W2", "W3", "W7"):
        chain = workloads.SMALL_WORKLOADS[name]
        for variant in module("variants").VARIANTS.values():
            if not variant.fits(chain):
                continue
            other = plain.backprop(chain, "") if variant.rule == "backprop" else plain.loop(chain, variant, "")
            contenders = [simulated.simulated(chain, variant), other]
            for contender in contenders:
                for _ in range(4):
                    contender.step()
            batched, by_hand = (contender.half_squared_error() for contender in contenders)
            assert batched == pytest.approx(by_hand, rel=1e-4), (name, variant.name)


@pytest.mark.parametrize("variant", ["constant", "spiking-0", "incremental", "errors", "multipliers"])
@pytest.mark.parametrize("steps", [2, 6, 9])
def test_the_floor_has_as_many_products_as_the_plan(variant: str, steps: int) -> None:
    workloads, variants, simulated = module("workloads"), module("variants"), module("simulated")
    how = variants.VARIANTS[variant]
    if how.alpha is not None and steps < 6:
        pytest.skip("the error would not arrive")
    import pcsim

    network, clamps = simulated.network_and_clamps(workloads.deep_chain(6, 3))
    precision = pcsim.Constant() if how.alpha is None else pcsim.Spiking(alpha=how.alpha)
    relaxation = pcsim.Relaxation(steps, 0.1, precision=precision)
    if how.relaxed == "multipliers":
        relaxation = attrs.evolve(relaxation, multipliers=0.1)
    elif how.relaxed == "errors":
        relaxation = pcsim.ErrorRelaxation(steps, 0.1)
    simulator = pcsim.Simulator(network, relaxation, simulated.RULES[how.rule]())
    simulator.infer(clamps)
    task = attrs.evolve(simulator._state.task, learns_each_step=how.rule == "incremental")
    plan = pcsim.engine.planning.plan.Plan(task)
    phases = [plan.phases[position] for position in plan.sequence]
    phases += [] if how.rule == "incremental" else [plan.learning()]
    planned = Counter(forward=len(network.edges) + (int(plan.closing()[0].sum()) if task.closes else 0))
    for phase in phases:
        planned.update(forward=int(phase.refresh.sum()), message=int(phase.message.sum()))
        planned.update(weight=int(phase.learn[plan.wiring.target].sum()))
    needed = Counter(kind for kind, _ in module("floor").needed_products(6, steps, how))
    assert needed == planned


def test_spiking_with_silence_needs_one_product_of_each_kind_per_edge() -> None:
    variants, floor = module("variants"), module("floor")
    needed = Counter(floor.needed_products(7, 7, variants.SILENT))
    assert needed == Counter(floor.needed_products(7, 0, variants.BACKPROP))
    assert max(needed.values()) == 1


def test_an_exponent_is_the_slope_in_logarithms() -> None:
    growth, sizes = module("growth"), [10, 30, 100]
    assert growth.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert np.isnan(growth.exponent([10], [1.0]))


def test_a_limit_says_whether_it_is_kept() -> None:
    limit = module("limits").Limit
    assert [limit("time", 1.0, m).verdict for m in (1.0, 1.01, None)] == ["pass", "over", "not measured"]


def test_what_cannot_run_is_left_out_and_no_round_starts_late(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    contender, rounds = module("contender"), module("rounds")

    class Fails(contender.Contender):
        def step(self) -> float:
            raise contender.UnavailableError("no compiler")

        def half_squared_error(self) -> None:
            return None

    class TakesTen(Fails):
        def step(self) -> float:
            clock[0] += 10
            return 1e-3

    clock = [0.0]
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    present = [Fails("backprop", "compiled"), TakesTen("backprop", "plain")]
    [row] = rounds.measure(present, "W1", rounds=1000, warm_up=2, seconds=100.0)
    assert (row.implementation, row.note) == ("plain", "slow: 9 of 1000 rounds")  # and 2 to warm up: over at 110
    assert "compiled : left out: no compiler" in capsys.readouterr().err
    clock[0] = 0.0
    assert rounds.measure(present[1:], "W1", rounds=1, warm_up=2, seconds=10.0) == []
    assert "no time is left to warm it up" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["VGG10", "ResNet18"])
@pytest.mark.parametrize("small", [True, False])
def test_topologies_are_as_deep_as_they_say(name: str, small: bool) -> None:
    import pcsim

    [topology] = module("workloads").workloads(small, [name])
    design = topology.design
    make = pcsim.topologies.vgg if design.startswith("VGG") else pcsim.topologies.resnet
    levels = make(design, image=topology.image, width=1 / 32).levels()
    assert topology.depth == levels["input"] == module("variants").SILENT.steps(topology)


def test_an_epoch_trains_all_on_the_same_batches_until_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    epoch, cpu = module("epoch"), torch.device("cpu")
    [topology] = module("workloads").workloads(True, ["VGG10"])
    rows = epoch.train_an_epoch(topology, cpu, [None, torch.float32], 60.0, images=12, test_images=6)
    assert [row.implementation for row in rows] == ["pcsim-batched", "pcsim-batched-float32", "torch-backprop"]
    assert [row.rounds for row in rows] == [3, 3, 3]
    assert len({row.accuracy for row in rows}) == 1  # single precision rounds nothing, and the rule is backprop's
    assert {row.rounds for row in epoch.train_an_epoch(topology, cpu, [None], 0.0, 12, 6)} == {1}
    assert "stopped after 1 of 3 batches" in capsys.readouterr().err


def test_a_class_of_synthetic_images_is_told_by_its_pattern() -> None:
    full_width = module("full_width")
    [topology] = module("workloads").workloads(True, ["VGG10"])
    train, test = (full_width.synthetic_images(topology, 200, torch.device("cpu"), seed) for seed in (1, 2))
    means = torch.stack([train[0][train[1] == one].mean(0).flatten() for one in range(topology.classes)])
    assert (torch.cdist(test[0].flatten(1), means).argmin(1) == test[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "outcome"), [("nothing", "failed"), ("epoch", "stopped for want of time")])
def test_a_part_that_fails_or_hangs_takes_nothing_along(part: str, outcome: str) -> None:
    device = module("device")
    options = device.parsed(["--device", "cpu", "--quick"])
    assert device.measured(part, options, 0.0 if part == "epoch" else 60.0) == ([], outcome)


def test_a_device_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("device").parsed(["--device", "abacus"])
    assert "--device abacus" in capsys.readouterr().err
    assert sum(module("device").SECONDS.values()) <= 8 * 60


def test_an_unequal_computation_is_told() -> None:
    rows = module("rows")
    one, other, third = (
        rows.Row("W1", "constant", name, 1, 1, 1, 0, trained=3, half_squared_error=error)
        for name, error in (("a", 1.0), ("b", 1.0005), ("c", 1.01))
    )
    rows.check_agreement([one, other, third], "a")
    assert (one.agrees, other.agrees, third.agrees) == (None, True, False)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_memory_holds_at_least_what_must_be_kept() -> None:
    memory, workloads = module("memory"), module("workloads")
    held = memory.measure_apart("W1", "constant", "pcsim-batched", "", 1, False)
    assert held is not None
    weights = memory.weight_bytes(workloads.WORKLOADS["W1"])
    assert 4 * weights < held.tensors < 3 * memory.budget(workloads.WORKLOADS["W1"])
    assert 4 * weights < held.peak


def test_a_missing_peer_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    peers = module("peers")
    monkeypatch.setitem(peers.PEERS, "nobody", "benchmarks.peer_nobody")
    assert peers.start_peer("nobody", "constant", "W1", None, 1, True) is None
    assert "nobody" in capsys.readouterr().err

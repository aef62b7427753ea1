"""Checkpoints: whole or not there, refused where they do not fit, and training goes on as if nothing had happened."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

import pcsim
from pcsim import io
from pcsim.callbacks import Checkpoint, EarlyStopping
from pcsim.errors import DivergenceError, FileError, SettingError
from pcsim.training import Trainer, warmup_cosine

EXAMPLES = Path(__file__).parent.parent / "examples"


def data() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    return DataLoader(TensorDataset(images, labels), 16, shuffle=True)


def trainer(path: Path | None = None, *, width: int = 8, callbacks: Any = None, seed: int | None = 5) -> Trainer:
    """With everything that has a state: momentum, normalisation, dropout, a scheduler, and early stopping."""
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("input", (6,))
    net.add_node("first", (width,), transfer=nn.Sequential(nn.BatchNorm1d(width), nn.Tanh()))
    net.add_node("second", (width,), transfer=nn.Sequential(nn.Dropout(0.2), nn.Tanh()))
    net.add_node("output", (3,))
    net.add_edge("input", "first", nn.Linear(6, width))
    net.add_edge("first", "second", nn.Linear(width, width))
    net.add_edge("second", "output", nn.Linear(width, 3))
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.3), pcsim.ForwardUpdate())
    optimizer = AdamW(net.parameters(), lr=1e-2)
    if callbacks is None:
        callbacks = [EarlyStopping(restore=False), *([] if path is None else [Checkpoint(path)])]
    scheduler = warmup_cosine(optimizer, 12)
    return Trainer(
        sim, optimizer, scheduler=scheduler, schedule_per="batch", callbacks=callbacks, progress=False, seed=seed
    )


def state(own: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in own.simulator.network.state_dict().items()}


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = trainer()
    straight.fit(data(), epochs=4, validation=data())
    first = trainer(tmp_path / "run")
    first.fit(data(), epochs=2, validation=data())
    torch.rand(7)
    second = trainer(tmp_path / "run")
    second.load_checkpoint(tmp_path / "run")
    second.fit(data(), epochs=2, validation=data())
    assert all(torch.equal(tensor, state(second)[name]) for name, tensor in state(straight).items())
    assert second.learning_rate == straight.learning_rate
    for part in ("train", "validation"):
        assert second.history.of("accuracy", part) == straight.history.of("accuracy", part)
    ours, theirs = second.callbacks[0], straight.callbacks[0]
    assert isinstance(ours, EarlyStopping)
    assert isinstance(theirs, EarlyStopping)
    assert (ours.best, ours.best_epoch) == (theirs.best, theirs.best_epoch)


@pytest.mark.parametrize("part", ["network", "optimizer", "scheduler", "callbacks"])
def test_a_checkpoint_of_another_trainer_changes_nothing(tmp_path: Path, part: str) -> None:
    path = tmp_path / "run"
    own = trainer(path)
    own.fit(data(), epochs=1, validation=data())
    other = trainer(width=9) if part == "network" else trainer(callbacks=() if part == "callbacks" else None)
    if part == "optimizer":
        groups = [{"params": [parameter]} for parameter in other.simulator.network.parameters()]
        other = Trainer(other.simulator, SGD(groups, lr=0.1), callbacks=[EarlyStopping(), Checkpoint(path)])
    if part == "scheduler":
        optimizer = AdamW(other.simulator.network.parameters())
        other = Trainer(other.simulator, optimizer, callbacks=[EarlyStopping(), Checkpoint(path)])
    before = state(other)
    expected = (
        "nodes.first.* and .* here; give the file"
        if part == "network"
        else f"was written with the {part} .*, and here it is .*"
    )
    with pytest.raises(FileError, match=expected):
        other.load_checkpoint(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(other).items())
    assert not other.history.records


def test_callbacks_in_another_order_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "run").fit(data(), epochs=1, validation=data())
    other = trainer(callbacks=[Checkpoint(tmp_path / "run"), EarlyStopping(restore=False)])
    with pytest.raises(FileError, match=r"callbacks \['EarlyStopping', 'Checkpoint'\], and here it is \['Checkpoint"):
        other.load_checkpoint(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_taken_over_changes_nothing(tmp_path: Path) -> None:
    class Picky(pcsim.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": 1}

        def load_state_dict(self, state: Any) -> None:
            if state != self.state_dict():
                raise ValueError(f"not mine: {state}")

    own = trainer(callbacks=[EarlyStopping(), Picky()])
    own.fit(data(), epochs=1, validation=data())
    own.save_checkpoint(tmp_path / "run")
    other = trainer(callbacks=[EarlyStopping(), Picky()], width=8)
    other.fit(data(), epochs=2, validation=data())
    before = {name: tensor.clone() for name, tensor in state(other).items()}
    Picky.state_dict = lambda self: {"seen": 2}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="not mine"):
        other.load_checkpoint(tmp_path / "run")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(other).items())
    assert len(other.history.records) == 2
    early = other.callbacks[0]
    assert isinstance(early, EarlyStopping)
    assert early.state_dict()["epochs"] == 2


class Counting(pcsim.Callback):
    """Something to keep that no tensor tells."""

    def __init__(self) -> None:
        self.epochs = 0

    def on_epoch_end(self, trainer: Trainer, record: Any) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: Any) -> None:
        self.epochs = state["epochs"]


def everything(own: Trainer) -> dict[str, Any]:
    """All that a checkpoint keeps, in tensors of its own."""
    return copy.deepcopy(own._state())


def assert_same(one: Any, other: Any, place: str = "") -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, parts in enumerate(zip(one, other, strict=True)):
            assert_same(*parts, f"{place}[{number}]")
    else:
        assert one == other or (one != one and other != other), place


@pytest.fixture(scope="module")
def kept_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, and all that is in it."""
    path = tmp_path_factory.mktemp("kept") / "run"
    own = trainer(callbacks=[Counting(), EarlyStopping(restore=False)])
    own.fit(data(), epochs=1, validation=data())
    own.save_checkpoint(path)
    return path, everything(own)


@pytest.mark.parametrize("part", ["first callback", "last callback", "network", "optimizer", "scheduler", "history"])
@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
def test_a_failure_anywhere_in_taking_over_a_checkpoint_changes_nothing(
    part: str, after: bool, kept_checkpoint: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, there = kept_checkpoint
    other = trainer(callbacks=[Counting(), EarlyStopping(restore=False)], seed=6)
    other.fit(data(), epochs=2, validation=data())
    before = everything(other)
    places: dict[str, Any] = {
        "first callback": other.callbacks[0],
        "last callback": other.callbacks[1],
        "network": other.simulator.network,
        "optimizer": other.optimizer,
        "scheduler": other.scheduler,
    }
    calls: list[str] = []
    if part == "history":

        def record(**given: Any) -> Any:
            calls.append(part)
            if len(calls) == 1:
                raise RuntimeError("no memory left")
            return pcsim.callbacks.EpochRecord(**given)

        monkeypatch.setattr("pcsim.training.EpochRecord", record)
    else:
        load = type(places[part]).load_state_dict

        def load_once(whole: Any, state: Any) -> Any:
            calls.append(part)
            if len(calls) > 1:
                return load(whole, state)
            if after:
                load(whole, state)
            raise RuntimeError("no memory left")

        monkeypatch.setattr(type(places[part]), "load_state_dict", load_once)
    with pytest.raises(RuntimeError, match="no memory left"):
        other.load_checkpoint(path)
    assert_same(everything(other), before)
    other.load_checkpoint(path)
    assert_same(everything(other), there)


class TestFiles:
    def test_trees_come_back_as_they_were(self, tmp_path: Path) -> None:
        shared = torch.arange(6.0).view(2, 3)
        tree = {
            "tensors": [shared[0], shared.mT, torch.tensor(3), torch.zeros(0, dtype=torch.bool)],
            "plain": {"none": None, "yes": True, "number": 0.1, "text": "π", "pair": (1, (2.0,)), "empty": {}},
            3: {0: "numbers as keys", "0": "stay numbers"},
        }
        io.save(tmp_path / "new folder" / "file", "test", tree)
        found = io.load(tmp_path / "new folder" / "file", "test")
        for ours, theirs in zip(tree["tensors"], found.pop("tensors"), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        del tree["tensors"]
        assert found == tree
        assert list((tmp_path / "new folder").iterdir()) == [tmp_path / "new folder" / "file"]

    def test_what_cannot_be_kept_is_named_and_the_old_file_stays(self, tmp_path: Path) -> None:
        io.save(tmp_path / "file", "test", {"old": 1})
        with pytest.raises(FileError, match=r"test\.a\[1\] is a function"):
            io.save(tmp_path / "file", "test", {"a": [0, lambda: 0]})
        assert io.load(tmp_path / "file", "test") == {"old": 1}

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        io.save(tmp_path / "file", "test", {"old": 1})

        def full(_: int) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="no space left"):
            io.save(tmp_path / "file", "test", {"new": 1})
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert io.load(tmp_path / "file", "test") == {"old": 1}

    def test_every_cut_and_flipped_byte_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        io.save(path, "test", {"weights": torch.randn(4), "epoch": 7})
        content = path.read_bytes()
        spoiled = [content[:size] for size in range(0, len(content), 7)]
        spoiled += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(0, len(content), 3)]
        for damaged in spoiled:
            path.write_bytes(damaged)
            with pytest.raises(FileError):
                io.load(path, "test")

    def test_foreign_files(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with pytest.raises(FileError, match="no such file"):
            io.load(path, "test")
        torch.save({"a": torch.zeros(2)}, path)
        with pytest.raises(FileError, match="no file of pcsim"):
            io.load(path, "test")
        safetensors.torch.save_file({"a": torch.zeros(2)}, path)
        with pytest.raises(FileError, match="not written by pcsim"):
            io.load(path, "test")
        io.save(path, "network", {})
        with pytest.raises(FileError, match="holds 'network', expected 'training'"):
            io.load(path, "training")

    def test_another_version(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(io, "VERSION", 99)
        io.save(tmp_path / "file", "test", {})
        monkeypatch.undo()
        with pytest.raises(FileError, match="version 99 of the format, expected 1"):
            io.load(tmp_path / "file", "test")


class TestEarlyStopping:
    @staticmethod
    def run(numbers: list[float], **options: Any) -> tuple[EarlyStopping, Trainer, list[dict[str, Tensor]]]:
        """A training whose validation measures these numbers; weights after each epoch."""

        class Given(pcsim.Metric):
            def measure(self, outcome: pcsim.metrics.Outcome) -> dict[str, Tensor]:
                return {"given": torch.tensor(numbers[len(own.history.records)])}

        after: list[dict[str, Tensor]] = []

        class Watch(pcsim.Callback):
            def on_epoch_end(self, trainer: Trainer, record: pcsim.EpochRecord) -> None:
                after.append(state(trainer))

        early = EarlyStopping("given", **{"mode": "max", **options})
        own = trainer(callbacks=[Watch(), early])
        own.metrics = (Given(),)
        own.fit(data(), epochs=len(numbers), validation=data())
        return early, own, after

    def test_best_weights_are_put_back(self) -> None:
        early, own, after = self.run([0.1, 0.5, 0.4, 0.5])
        assert (early.best, early.best_epoch, len(after)) == (0.5, 2, 4)
        assert all(torch.equal(tensor, after[1][name]) for name, tensor in state(own).items())

    def test_where_nothing_was_ever_best_patience_counts_from_the_first_epoch(self) -> None:
        early, _, after = self.run([math.nan] * 4, patience=2)
        assert (early.best, early.best_epoch, len(after)) == (None, None, 2)

    def test_a_number_that_is_none_is_never_best(self) -> None:
        early, own, after = self.run([math.nan, 0.2, math.nan, 0.1])
        assert (early.best, early.best_epoch) == (0.2, 2)
        assert all(torch.equal(tensor, after[1][name]) for name, tensor in state(own).items())

    def test_the_last_weights_stay_where_asked_for(self) -> None:
        _, own, after = self.run([3.0, 1.0, 2.0], mode="min", restore=False)
        assert all(torch.equal(tensor, after[2][name]) for name, tensor in state(own).items())

    def test_patience(self) -> None:
        early, own, after = self.run([0.1, 0.5, 0.4, 0.45, 0.9], patience=2)
        assert len(after) == 4
        assert early.exhausted
        own.fit(data(), epochs=3, validation=data())
        assert len(own.history.records) == 4, "an exhausted run does not begin again"

    def test_settings(self) -> None:
        with pytest.raises(SettingError, match="patience"):
            EarlyStopping(patience=0)
        with pytest.raises(SettingError, match="mode"):
            EarlyStopping(mode="best")  # type: ignore[arg-type]
        with pytest.raises(SettingError, match="every"):
            Checkpoint("x", every=0)
        with pytest.raises(SettingError, match="given None for 'acuracy', expected 'max' or 'min'"):
            EarlyStopping("acuracy")
        assert EarlyStopping("energy").mode == "min"

    def test_what_cannot_work_is_refused_before_any_training(self, tmp_path: Path) -> None:
        own = trainer()
        before = {name: tensor.clone() for name, tensor in state(own).items()}
        with pytest.raises(SettingError, match="no validation given, but EarlyStopping reads 'accuracy'"):
            own.fit(data(), epochs=1)
        own.callbacks = (Checkpoint(tmp_path),)
        with pytest.raises(SettingError, match="a folder; name a file in it"):
            own.fit(data(), epochs=1)
        with pytest.raises(SettingError, match="given None, expected the path of a file"):
            Checkpoint(None)  # type: ignore[arg-type]
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(own).items())
        assert not own.history.records


class TestWarmupCosine:
    def test_rises_to_the_peak_and_falls_to_a_tenth(self) -> None:
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        schedule = warmup_cosine(optimizer, 200)
        rates = []
        for _ in range(200):
            rates.append(optimizer.param_groups[0]["lr"] / 0.5)
            optimizer.step()
            schedule.step()
        assert rates[0] == 1.0
        assert rates[10] == pytest.approx(1.05)
        assert rates[20] == pytest.approx(1.1)
        assert rates[110] == pytest.approx((1.1 + 0.1) / 2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
        assert max(rates) == pytest.approx(1.1)

    @pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "warmup": 2.0}, {"steps": 5, "end": -1.0}])
    def test_refuses(self, options: dict[str, Any]) -> None:
        with pytest.raises(SettingError, match="warmup_cosine"):
            warmup_cosine(SGD([nn.Parameter(torch.zeros(1))], lr=0.5), **options)


def command(folder: Path, name: str) -> list[str]:
    options = "--data digits --topology mlp4 --width 0.25 --epochs 6 --seeds 0 1 --threads 1 --no-progress --patience 6"
    paths = ["--json", str(folder / f"{name}.json"), "--resume", str(folder / name)]
    return [sys.executable, str(EXAMPLES / "train_images.py"), *options.split(), *paths]


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())["runs"]
    return [{key: value for key, value in run.items() if key != "seconds"} for run in runs]


def written(folder: Path) -> int:
    """When a checkpoint was last put into the folder."""
    return max((path.stat().st_mtime_ns for path in folder.glob("seed*.safetensors")), default=0)


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_numbers(tmp_path: Path) -> None:
    subprocess.run(command(tmp_path, "straight"), check=True, capture_output=True)
    moments = random.Random()
    for _ in range(2):
        before = written(tmp_path / "killed")
        with subprocess.Popen(
            command(tmp_path, "killed"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            if moments.random() < 0.7:  # most often a little after training went on, which takes seconds
                while written(tmp_path / "killed") == before and process.poll() is None:
                    time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
    subprocess.run(command(tmp_path, "killed"), check=True, capture_output=True)
    assert results(tmp_path, "killed") == results(tmp_path, "straight")


def test_divergence_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    own = trainer(tmp_path / "run")
    own.fit(data(), epochs=1, validation=data())
    own.simulator.relaxation = pcsim.Relaxation(2000, 50.0)
    with pytest.raises(DivergenceError):
        own.fit(data(), epochs=1, validation=data())
    other = trainer(tmp_path / "run")
    other.load_checkpoint(tmp_path / "run")
    assert len(other.history.records) == 1


@pytest.mark.parametrize("mode", ["max", "min"])
def test_of_equal_epochs_the_first_is_kept_and_patience_is_counted_from_it(mode: Any) -> None:
    early = EarlyStopping("accuracy", patience=2, mode=mode)
    own = trainer(callbacks=[early])
    for epoch, number in enumerate((0.5, 0.5, 0.5), start=1):
        assert not early.exhausted
        early.on_epoch_end(own, pcsim.callbacks.EpochRecord(epoch, 0.1, {}, {"accuracy": number}, 0.1))
    assert (early.best_epoch, early.best, early.exhausted) == (1, 0.5, True)


def test_checkpoints_are_written_every_so_many_epochs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[int] = []
    own = trainer(callbacks=[Checkpoint(tmp_path / "run", every=2)])
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, path: written.append(len(trainer.history.records)))
    own.fit(data(), epochs=5)
    assert written == [2, 4]

"""What is written for TensorBoard: into a writer that keeps it, and, where tensorboard is there, into its files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, optim

import pcsim
from pcsim.callbacks import TensorBoard
from pcsim.errors import PCError, SettingError

Pair = tuple[Tensor, Tensor]


class Writer:
    """Stands in for torch's SummaryWriter."""

    made: list[Writer]

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.closed = False
        self.made.append(self)

    def add_scalar(self, tag: str, number: float, step: int) -> None:
        assert not self.closed
        assert isinstance(number, float)
        self.scalars.setdefault(tag, []).append((step, number))

    def close(self) -> None:
        self.closed = True


class Scale(torch.nn.Module):
    """Multiplies by a number that it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.factor


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [], raising=False)
    return Writer.made


def trainer(*callbacks: pcsim.Callback) -> pcsim.Trainer:
    torch.manual_seed(0)
    net = pcsim.Network()
    for name, size in (("input", 3), ("left", 4), ("right", 2), ("output", 2)):
        net.add_node(name, (size,))
    for side, size in (("left", 4), ("right", 2)):
        net.add_edge("input", side, torch.nn.Linear(3, size))
        net.add_edge(side, "output", torch.nn.Linear(size, 2))
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps=3, rate=0.1))
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return pcsim.Trainer(sim, optimizer, scheduler=scheduler, callbacks=callbacks, progress=False, seed=0)


def batches(count: int = 3) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, generator=generator), torch.eye(2)[torch.arange(5) % 2].clone()) for _ in range(count)]


def test_metrics_and_learning_rate_are_written_by_epoch(written: list[Writer]) -> None:
    own = trainer(TensorBoard("runs"))
    history = own.fit(batches(), epochs=2, validation=batches(1))
    (writer,) = written
    assert writer.log_dir == "runs"
    assert writer.closed
    assert writer.scalars["learning_rate"] == [(1, 0.1), (2, 0.05)]
    for part in ("train", "validation"):
        for metric in ("accuracy", "energy"):
            assert writer.scalars[f"{part}/{metric}"] == list(enumerate(history.of(metric, part), start=1))


def test_energies_and_errors_are_written_by_level_every_so_many_batches(written: list[Writer]) -> None:
    class Watch(pcsim.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float, float, float]] = []

        def on_batch_end(self, trainer: pcsim.Trainer, record: pcsim.BatchRecord) -> None:
            left, right, output = (trainer.simulator.network[name] for name in ("left", "right", "output"))
            squares = [node.error.double().square().sum() / 5 for node in (left, right, output)]
            energies = [node.energy.double().mean() for node in (left, right, output)]
            numbers = energies[2], energies[0] + energies[1], squares[2] ** 0.5, (squares[0] + squares[1]) ** 0.5
            self.seen.append(tuple(map(float, numbers)))

    watch = Watch()
    trainer(watch, TensorBoard("runs", every=2)).fit(batches(), epochs=2)
    scalars = written[0].scalars
    for place, tag in enumerate(("energy/level_0", "energy/level_1", "error/level_0", "error/level_1")):
        assert [step for step, _ in scalars[tag]] == [0, 2, 3, 5]
        assert [number for _, number in scalars[tag]] == pytest.approx(
            [watch.seen[step][place] for step in (0, 2, 3, 5)]
        )
    assert not any(tag.endswith("level_2") for tag in scalars)


def test_nodes_of_a_single_unit_without_axes_are_written(written: list[Writer]) -> None:
    net = pcsim.Network()
    net.add_node("input", ())
    net.add_node("output", ())
    net.add_edge("input", "output", Scale())
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps=1, rate=0.1))
    optimizer = optim.SGD(net.parameters(), lr=0.0)
    own = pcsim.Trainer(sim, optimizer, metrics=(), callbacks=[TensorBoard("runs")], progress=False)
    own.fit([(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0]))], epochs=1)
    assert written[0].scalars["error/level_0"] == [(0, pytest.approx(12.5**0.5))]
    assert written[0].scalars["energy/level_0"] == [(0, pytest.approx(6.25))]


def test_writing_changes_nothing(written: list[Writer]) -> None:
    logged, plain = trainer(TensorBoard("runs", every=1)), trainer()
    logged.fit(batches(), epochs=2)
    plain.fit(batches(), epochs=2)
    for one, other in zip(*(t.simulator.network.parameters() for t in (logged, plain)), strict=True):
        assert torch.equal(one, other)


def test_batches_are_counted_on_from_a_checkpoint(written: list[Writer], tmp_path: Path) -> None:
    first = trainer(TensorBoard(tmp_path))
    first.fit(batches(), epochs=1)
    first.save_checkpoint(tmp_path / "checkpoint")
    second = trainer(TensorBoard(tmp_path))
    second.load_checkpoint(tmp_path / "checkpoint")
    second.fit(batches(), epochs=1)
    assert [step for step, _ in written[1].scalars["energy/level_0"]] == [3]
    assert [step for step, _ in written[1].scalars["train/accuracy"]] == [2]


def test_the_file_is_closed_when_training_fails(written: list[Writer]) -> None:
    own = trainer(TensorBoard("runs"))
    with pytest.raises(pcsim.PCError):
        own.fit([(torch.ones(2, 3), torch.full((2, 2), float("nan")))], epochs=1)
    assert written[0].closed


def test_bad_settings_and_a_missing_tensorboard_are_told(
    monkeypatch: pytest.MonkeyPatch, written: list[Writer]
) -> None:
    with pytest.raises(SettingError, match="every: given 0"):
        TensorBoard("runs", every=0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PCError, match=r"pip install 'pcsim\[tensorboard\]'"):
        TensorBoard("runs")
    assert not written


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is an extra of its own")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = trainer(TensorBoard(tmp_path)).fit(batches(), epochs=2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    energies = events.Scalars("train/energy")
    assert [event.step for event in energies] == [1, 2]
    assert [event.value for event in energies] == pytest.approx(history.of("energy"))
    assert {"energy/level_0", "error/level_1", "learning_rate"} <= set(events.Tags()["scalars"])

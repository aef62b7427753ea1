"""What the tests of training by several processes run in each of them; a scenario is the same for one with the whole.

As a script, under torchrun: trains with checkpoints, and one process is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, TensorDataset

import pcsim
from pcsim.callbacks import BatchRecord, Callback, Checkpoint, EarlyStopping, EpochRecord
from pcsim.training import Trainer

Group = Any
SAMPLES, BATCH = 21, 5
"""Every batch is divided unevenly, by two and by three, and of the last one there is a single sample."""
PATIENCE = timedelta(seconds=60)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(images, torch.randint(3, (SAMPLES,), generator=generator))


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(data(), BATCH, shuffle=True, **options)


def network(*, dropout: float = 0.0) -> pcsim.Network:
    """Of float64, with a normalisation that has some statistics."""
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("input", (6,))
    net.add_node("first", (8,), transfer=nn.Sequential(nn.BatchNorm1d(8), nn.Tanh()))
    net.add_node("second", (8,), transfer=nn.Sequential(nn.Dropout(dropout), nn.Tanh()))
    net.add_node("output", (3,))
    net.add_edge("input", "first", nn.Linear(6, 8))
    net.add_edge("first", "second", nn.Linear(8, 8))
    net.add_edge("second", "output", nn.Linear(8, 3))
    net.to(torch.float64)
    with torch.no_grad():
        normalising(net).running_mean.copy_(torch.linspace(-0.2, 0.2, 8))
        normalising(net).running_var.copy_(torch.linspace(0.5, 2, 8))
    return net


def normalising(net: pcsim.Network) -> Any:
    return next(module for module in net.modules() if isinstance(module, nn.BatchNorm1d))


RULES: dict[str, tuple[pcsim.LearningRule, pcsim.PrecisionSchedule]] = {
    "settled": (pcsim.SettledUpdate(), pcsim.Constant()),
    "forward": (pcsim.ForwardUpdate(), pcsim.Spiking(alpha=0.0)),
    "arrival": (pcsim.ArrivalUpdate(), pcsim.Spiking.for_rate(0.4)),
    "incremental": (pcsim.IncrementalUpdate(), pcsim.Constant()),
    "backprop": (pcsim.Backprop(), pcsim.Constant()),
}


def trainer(
    group: Group, rule: str = "forward", *, evaluating: bool = True, dropout: float = 0.0, **options: Any
) -> Trainer:
    net = network(dropout=dropout)
    normalising(net).train(not evaluating)
    learns, precision = RULES[rule]
    sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.4, precision=precision), learns)
    optimizer = options.pop("optimizer", AdamW)(net.parameters(), lr=3e-3)
    return Trainer(
        sim, optimizer, **{"progress": False, "seed": 3, "process_group": group, "relaxed_every": 1, **options}
    )


def result(own: Trainer) -> dict[str, Any]:
    """What has to be the same: weights, the optimizer's moments, metrics."""
    moments = own.optimizer.state_dict()["state"]
    return {
        "weights": {name: tensor.clone() for name, tensor in own.simulator.network.state_dict().items()},
        "moments": {f"{n} {name}": value for n, state in moments.items() for name, value in state.items()},
        "metrics": {
            f"{record.epoch} {part} {name}": number
            for record in own.history.records
            for part in ("train", "validation")
            for name, number in getattr(record, part).items()
        },
    }


def rule_scenario(rule: str) -> Callable[[Group, Path], dict[str, Any]]:
    def run(group: Group, folder: Path) -> dict[str, Any]:
        own = trainer(group, rule)
        own.fit(loader(), epochs=4)  # 20 steps
        return {**result(own), "evaluated": own.evaluate(loader())}

    return run


class ByLists(Dataset[tuple[Tensor, Tensor]]):
    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = data().tensors
        return images[indices], labels[indices]

    def __len__(self) -> int:
        return SAMPLES


def masked(batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """A mask for each sample, and one for all."""
    some = batch[0] > -1
    return {
        "input": (batch[0], some),
        "output": (torch.eye(3, dtype=torch.float64)[batch[1]], torch.tensor([1, 1, 0]) > 0),
    }


def other_data(group: Group, folder: Path) -> dict[str, Any]:
    """Lists of indices, ready batches, and masks."""
    own = trainer(group)
    indices = BatchSampler(RandomSampler(ByLists(), generator=torch.Generator()), BATCH, drop_last=False)
    own.fit(DataLoader(ByLists(), sampler=indices, batch_size=None), epochs=1)
    images, labels = data().tensors
    own.fit(list(zip(images.split(BATCH), labels.split(BATCH), strict=True)), epochs=1)
    own.fit(DataLoader(list(zip(images.split(BATCH), labels.split(BATCH), strict=True)), batch_size=None), epochs=1)
    with_masks = Trainer(own.simulator, own.optimizer, clamps=masked, seed=1, progress=False, process_group=group)
    with_masks.fit(loader(generator=torch.Generator()), epochs=2)
    clipping = Trainer(own.simulator, own.optimizer, clip=0.05, seed=2, progress=False, process_group=group)
    clipping.fit(loader(), epochs=1)
    return result(own)


def plateau(group: Group, folder: Path) -> dict[str, Any]:
    """A scheduler that watches a metric of every batch."""
    own = trainer(group, optimizer=SGD)
    schedule = ReduceLROnPlateau(own.optimizer, patience=0, factor=0.5)
    own = Trainer(own.simulator, own.optimizer, scheduler=schedule, schedule_per="batch", monitor="accuracy",
                  relaxed_every=1, seed=3, progress=False, process_group=group)  # fmt: skip
    own.fit(loader(), epochs=2)
    return {**result(own), "rate": own.learning_rate}


def resumed(group: Group, folder: Path) -> dict[str, Any]:
    """The first part of a training, which others go on with."""
    own = trainer(group, callbacks=[EarlyStopping(restore=False), Checkpoint(folder / "run")])
    path = folder / "run"
    if path.exists():
        own.load_checkpoint(path)
    own.fit(loader(), epochs=2, validation=loader())
    return result(own)


EQUAL: dict[str, Callable[[Group, Path], dict[str, Any]]] = {
    **{rule: rule_scenario(rule) for rule in RULES},
    "other data": other_data,
    "plateau": plateau,
}
"""Scenarios that end with the same numbers, whatever the number of processes."""


# Scenarios of which each process tells what happened


class Failing(Callback):
    """Fails, or stops, in one process alone."""

    def __init__(self, group: Group, how: str) -> None:
        self.here, self.how = dist.get_rank(group) == 1, how

    def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
        if self.here and (record.epoch, record.batch) == (2, 1):
            if self.how == "stop":
                trainer.stop()
            else:
                raise ValueError("of my own")


def told(group: Group, own: Trainer, batches: Any, **options: Any) -> dict[str, Any]:
    """What a training that fails raises, and what it leaves; and that the processes can go on afterwards."""
    kind = message = ""
    try:
        own.fit(batches, epochs=3, **options)
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    found = {**result(own), "kind": kind, "message": message, "epochs": len(own.history.records)}
    after = trainer(group)
    after.fit(loader(), epochs=1)
    return {**found, "after": result(after)["weights"]}


def an_exception(group: Group, folder: Path) -> dict[str, Any]:
    return told(group, trainer(group, callbacks=[Failing(group, "raise")]), loader())


def a_stop(group: Group, folder: Path) -> dict[str, Any]:
    return told(group, trainer(group, callbacks=[Failing(group, "stop")]), loader())


def a_divergence(group: Group, folder: Path, rule: str = "forward") -> dict[str, Any]:
    """In the second process, which alone has the large target, in the second batch; statistics are moving."""
    images, labels = data().tensors
    targets = torch.eye(3, dtype=torch.float64)[labels]
    targets[11] = 1e200
    batches = [(images[first : first + 10], targets[first : first + 10]) for first in (0, 10)]
    own = trainer(group, rule, evaluating=False)
    before: dict[str, Tensor] = {}

    class Keep(Callback):
        def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
            before.update(result(trainer)["weights"])

    own.callbacks = (Checkpoint(folder / f"diverged {rule}"), Keep())
    return {**told(group, own, batches), "before": before}


def uneven_numbers(group: Group, folder: Path) -> dict[str, Any]:
    """One process has a batch more."""
    images, labels = data().tensors
    many = 3 + (dist.get_rank(group) == 1)
    return told(group, trainer(group), [(images[:6], labels[:6])] * many)


def bad_batch(group: Group, folder: Path) -> dict[str, Any]:
    """A batch that fits in no process but one."""
    images, labels = data().tensors
    wrong = images[:6, : 5 if dist.get_rank(group) == 1 else 6]
    return told(group, trainer(group), [(wrong, labels[:6])])


def by_itself(group: Group, folder: Path) -> dict[str, Any]:
    """With a tolerance, every process takes steps of its own, between which the incremental rule cannot average."""
    own = trainer(group, "incremental")
    own.simulator.relaxation = pcsim.Relaxation(4, 0.4, tolerance=1e-3)
    return told(group, own, loader())


def kept_equal(group: Group, folder: Path) -> dict[str, Any]:
    """Unequal weights at the start, draws, statistics of each process's own batches, no seed, one written file."""
    torch.manual_seed(dist.get_rank(group))
    own = trainer(group, evaluating=False, dropout=0.3, seed=None, callbacks=[Checkpoint(folder / "kept")])
    with torch.no_grad():
        for parameter in own.simulator.network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    written: list[str] = []
    save, pcsim.io.save = pcsim.io.save, lambda path, *rest: (written.append(str(path)), save(path, *rest))
    draws: list[Tensor] = []

    class Draws(Callback):
        def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
            draws.append(torch.rand(2))

    own.callbacks = (*own.callbacks, Draws())
    try:
        own.fit(DataLoader(data(), 10, shuffle=True, drop_last=True), epochs=2)
    finally:
        pcsim.io.save = save
    found = own.evaluate(loader())
    return {**result(own), "evaluated": found, "written": written, "draws": torch.stack(draws)}


def own_sampler(group: Group, folder: Path) -> dict[str, Any]:
    """A DistributedSampler of the user's own divides."""
    seen: list[Tensor] = []
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sampler: DistributedSampler[Any] = DistributedSampler(data(), size, rank, seed=4)

    class See(Callback):
        def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
            seen.append(trainer.simulator.network["input"].value[:, 0])

        def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
            seen.append(torch.full((1,), torch.nan, dtype=torch.float64))

    own = trainer(group, callbacks=[See()])
    own.fit(DataLoader(data(), 4, sampler=sampler), epochs=2)
    wrong: DistributedSampler[Any] = DistributedSampler(data(), size + 1, rank, seed=4)
    return {**told(group, own, DataLoader(data(), 4, sampler=wrong)), "seen": torch.cat(seen)}


TOLD: dict[str, Callable[[Group, Path], dict[str, Any]]] = {
    "an exception": an_exception,
    "a stop": a_stop,
    "a divergence": a_divergence,
    "a divergence, incremental": lambda group, folder: a_divergence(group, folder, "incremental"),
    "uneven numbers": uneven_numbers,
    "bad batch": bad_batch,
    "by itself": by_itself,
    "kept equal": kept_equal,
    "own sampler": own_sampler,
}
"""Scenarios of three processes, each of which tells what it met."""


def work(rank: int, size: int, folder: str) -> None:
    """All scenarios in one process: with all processes, and with the first two."""
    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size, timeout=PATIENCE)
    pair = dist.new_group([0, 1])
    found = {name: scenario(None, path) for name, scenario in {**EQUAL, **TOLD, "resumed": resumed}.items()}
    torch.save(found, path / f"{size}-{rank}.pt")
    dist.barrier()
    if rank < 2:
        found = {name: scenario(pair, path) for name, scenario in {**EQUAL, "resumed": resumed}.items()}
        torch.save(found, path / f"2-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Killed(Callback):
    """The second process is gone in the middle of the third epoch."""

    def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
        if (record.epoch, record.batch) == (3, 2) and not trainer.is_first_process:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    """Under torchrun."""
    dist.init_process_group("gloo", timeout=PATIENCE)
    own = trainer(None, callbacks=[Killed(), EarlyStopping(restore=False), Checkpoint(folder / "run")])
    own.fit(loader(), epochs=4, validation=loader())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Callbacks, and the records of training that they receive."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
from torch import Tensor

from pcsim.errors import PCError, SettingError
from pcsim.trace import Trace

if TYPE_CHECKING:
    import pandas

    from pcsim.training import Trainer


BEST: Mapping[str, Literal["max", "min"]] = {
    "accuracy": "max",
    "energy": "min",
    "mean_squared_error": "min",
}
"""Whether the largest or the smallest is best, of the metrics of which that is known."""


@attrs.frozen(eq=False)
class BatchRecord:
    """One batch of training.

    Args:
        epoch: number of the epoch, from 1.
        batch: number of the batch in the epoch, from 0.
        trace: of its relaxation.
        metrics: 0-d tensors by name, those of the relaxed state only where measured; reading one waits for the device.
            Of several processes, those of this one's share.
    """

    epoch: int
    batch: int
    trace: Trace
    metrics: Mapping[str, Tensor]


@attrs.frozen
class EpochRecord:
    """One epoch of training.

    Args:
        epoch: number of the epoch, from 1.
        learning_rate: of the optimizer's first parameter group, at the last batch.
        train: metrics, averaged over the samples as they were met.
        validation: metrics after the epoch; empty without validation.
        seconds: of training, validation left out.
    """

    epoch: int
    learning_rate: float
    train: Mapping[str, float]
    validation: Mapping[str, float]
    seconds: float


@attrs.define
class History:
    """All epochs that a trainer has trained, oldest first; a further ``fit`` adds to them."""

    records: list[EpochRecord] = attrs.field(factory=list)

    def of(self, metric: str, part: Literal["train", "validation"] = "train") -> list[float]:
        """One metric, epoch by epoch; SettingError where an epoch has not measured it."""
        numbers = []
        for record in self.records:
            measured = record.train if part == "train" else record.validation
            if metric not in measured:
                known = ", ".join(map(repr, measured)) or "nothing"
                raise SettingError(f"metric {metric!r} given, but {part} measured {known}; choose one of those")
            numbers.append(measured[metric])
        return numbers

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for each epoch, by its number: "learning_rate", "seconds", "train_<metric>", "validation_<metric>".

        What an epoch has not measured is NaN there.

        Raises:
            PCError: pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise PCError("History.to_dataframe needs pandas: pip install 'pcsim[pandas]'") from error
        rows = [
            {
                "epoch": record.epoch,
                "learning_rate": record.learning_rate,
                "seconds": record.seconds,
                **{f"train_{name}": number for name, number in record.train.items()},
                **{f"validation_{name}": number for name, number in record.validation.items()},
            }
            for record in self.records
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row)) or ["epoch", "learning_rate", "seconds"]
        return pandas.DataFrame(rows, columns=columns).set_index("epoch")


class Callback:
    """Base class of callbacks: override what is needed; ``trainer.stop()`` ends the training early."""

    watches: str | None = None
    """A metric of validation without which it cannot do its work; ``fit`` refuses to start without."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first batch, after seeding."""

    def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
        """After the weights learned from a batch; nodes and edges show its state."""

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """After validation and the scheduler; the record is in ``trainer.history``."""

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """At the end: after the last epoch, a stop, or an exception."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep of this callback: tensors and plain values; nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""


class EarlyStopping(Callback):
    """Remembers the best epoch by a metric of validation, stops when none has been better for a while, and goes back.

    Args:
        metric: of validation, such as "accuracy".
        patience: epochs without a better one before training stops, at least 1; None never stops.
        mode: whether the largest ("max") or the smallest ("min") is best; known of "accuracy", "energy"
            and "mean_squared_error".
        restore: put the best epoch's parameters and buffers back when training ends.

    Raises:
        SettingError: a value outside its range, or no mode for another metric; in training, the metric is not measured
            in validation.
    """

    watches: str

    def __init__(
        self,
        metric: str = "accuracy",
        *,
        patience: int | None = None,
        mode: Literal["max", "min"] | None = None,
        restore: bool = True,
    ) -> None:
        if patience is not None and not (isinstance(patience, int) and patience >= 1):
            raise SettingError(f"EarlyStopping.patience: given {patience!r}, expected a whole number from 1, or None")
        mode = BEST.get(metric) if mode is None else mode
        if mode not in ("max", "min"):
            raise SettingError(f"EarlyStopping.mode: given {mode!r} for {metric!r}, expected 'max' or 'min'")
        self.watches, self.patience, self.mode, self.restore = metric, patience, mode, restore
        self.best_epoch: int | None = None
        self.best: float | None = None
        self._weights: dict[str, Tensor] = {}
        self._epochs = 0

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        waited = self._epochs - (self.best_epoch or 0)
        return self.patience is not None and waited >= self.patience

    def on_fit_start(self, trainer: Trainer) -> None:
        """Stop at once where patience had run out before."""
        if self.exhausted:
            trainer.stop()

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Compare with the best so far."""
        if self.watches not in record.validation:
            known = ", ".join(map(repr, record.validation)) or "nothing"
            raise SettingError(
                f"EarlyStopping.metric: {self.watches!r} given, but validation measured {known}; give fit(validation=) "
                "data, or choose one of those"
            )
        number, self._epochs = record.validation[self.watches], record.epoch
        better = self.best is None or (number > self.best if self.mode == "max" else number < self.best)
        if better and not math.isnan(number):
            self.best, self.best_epoch = number, record.epoch
            state = trainer.simulator.network.state_dict()
            self._weights = {name: tensor.detach().clone() for name, tensor in state.items()}
        if self.exhausted:
            trainer.stop()

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """Put the best epoch's weights back."""
        if self.restore and self._weights:
            trainer.simulator.network.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """The best epoch, its weights, and how many epochs there have been."""
        return {"best": self.best, "epoch": self.best_epoch, "epochs": self._epochs, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.best, self.best_epoch, self._epochs = state["best"], state["epoch"], state["epochs"]
        self._weights = dict(state["weights"])


class Checkpoint(Callback):
    """Writes a checkpoint after every so many epochs; it belongs at the end of the callbacks, to keep what they keep.

    Args:
        path: of the file, which each checkpoint replaces.
        every: epochs from one to the next, at least 1.

    Raises:
        SettingError: ``every`` is less than 1, or the path is none; in training, it is that of a folder.
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1) -> None:
        if every < 1:
            raise SettingError(f"Checkpoint.every: given {every}, expected at least 1")
        if not isinstance(path, str | os.PathLike):
            raise SettingError(f"Checkpoint.path: given {path!r}, expected the path of a file")
        self.path, self.every = path, every

    def on_fit_start(self, trainer: Trainer) -> None:
        """Refuse a path that cannot be a file, before any training."""
        if os.path.isdir(self.path):
            raise SettingError(f"Checkpoint.path: given {os.fspath(self.path)!r}, a folder; name a file in it")

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Write it, if it is time."""
        if record.epoch % self.every == 0:
            trainer.save_checkpoint(self.path)


class TensorBoard(Callback):
    """Writes what TensorBoard shows: ``tensorboard --logdir <log_dir>``.

    By epoch: "train/<metric>" and "validation/<metric>", and "learning_rate". By batch, counted over all epochs:
    "energy/level_<level>", E_n of the relaxed state before precision, summed over the nodes of a level and averaged
    over the samples, and "error/level_<level>", ‖ε‖ over the units and nodes of a level, root mean square over the
    samples, both at the weights after the update. Level 0 holds the targets (SPEC §2, Arrival).

    Args:
        log_dir: folder for the event files; every call of ``fit`` adds one.
        every: energies and errors are written on the first batch of each epoch and on every so-many-th after it, at
            least 1. Reading them costs an evaluation of the whole network, which the metrics of the relaxed state
            share (``Trainer(relaxed_every=)``).

    Raises:
        SettingError: ``every`` is less than 1.
        PCError: tensorboard is missing.
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, every: int = 100) -> None:
        if every < 1:
            raise SettingError(f"TensorBoard.every: given {every}, expected at least 1")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PCError("TensorBoard needs tensorboard: pip install 'pcsim[tensorboard]'") from error
        self.log_dir, self.every = log_dir, every
        self._open: Callable[[str], Any] = SummaryWriter
        self._writer: Any = None
        self._batches = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open an event file."""
        if trainer.is_first_process:
            self._writer = self._open(os.fspath(self.log_dir))

    def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
        """Write energies and errors by level, if it is time."""
        if self._writer is not None and record.batch % self.every == 0:
            nodes, levels = trainer.simulator.network.nodes, record.trace.levels
            for level in sorted({levels[name] for name in record.trace.nodes if name in levels}):
                members = [nodes[name] for name in record.trace.nodes if levels.get(name) == level]
                energy = sum(node.energy.double().mean().item() for node in members)
                error = sum(node.error.double().square().sum().item() / len(node.error) for node in members)
                self._writer.add_scalar(f"energy/level_{level}", energy, self._batches)
                self._writer.add_scalar(f"error/level_{level}", math.sqrt(error), self._batches)
        self._batches += 1

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Write the metrics and the learning rate."""
        if self._writer is None:
            return
        for part, metrics in (("train", record.train), ("validation", record.validation)):
            for metric, number in metrics.items():
                self._writer.add_scalar(f"{part}/{metric}", number, record.epoch)
        self._writer.add_scalar("learning_rate", record.learning_rate, record.epoch)

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """How many batches there have been."""
        return {"batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._batches = state["batches"]

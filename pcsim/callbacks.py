"""Callbacks, and the records of training that they receive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import attrs
from torch import Tensor

from pcsim.errors import SettingError
from pcsim.simulator import Trace

if TYPE_CHECKING:
    from pcsim.training import Trainer


@attrs.frozen(eq=False)
class BatchRecord:
    """One batch of training.

    Args:
        epoch: number of the epoch, from 1.
        batch: number of the batch in the epoch, from 0.
        trace: of its relaxation.
        metrics: 0-d tensors by name, those of the relaxed state only where measured; reading one waits for the device.
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


class Callback:
    """Base class of callbacks: override what is needed; ``trainer.stop()`` ends the training early."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first batch, after seeding."""

    def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
        """After the weights learned from a batch; nodes and edges show its state."""

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """After validation and the scheduler; the record is in ``trainer.history``."""

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """At the end: after the last epoch, a stop, or an exception."""

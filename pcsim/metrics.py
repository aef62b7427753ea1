"""Metrics: what a trainer measures of each batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import attrs
import torch
from torch import Tensor

from pcsim.engine.problem import together
from pcsim.errors import SettingError
from pcsim.graph.network import Network
from pcsim.trace import Trace


@attrs.frozen(eq=False)
class Outcome:
    """One batch after a run, as metrics see it; the network's nodes and edges show its state.

    Args:
        network: the network that ran.
        target: what was given of the target node, (batch, *shape); None where it was not.
        output: prediction of the target node, (batch, *shape): in training by the forward pass of the run itself, so
            before the weights learned; in evaluation by :meth:`Simulator.predict`. None where there is no target.
        trace: of the relaxation; None in evaluation of a batch that was not relaxed.
        mask: which units of the target are given, bool, (*shape) or (batch, *shape); None for all.
    """

    network: Network
    target: Tensor | None
    output: Tensor | None
    trace: Trace | None
    mask: Tensor | None = None


class PartialMean(NamedTuple):
    """A mean over a share of a batch, such as the units that are given of a target."""

    mean: Tensor
    """0-d; anything where the share is nothing."""
    of: Tensor
    """How much of the batch it is over, 0 to 1, 0-d."""

    def detach(self) -> PartialMean:
        """The same, without what it was computed by."""
        return PartialMean(self.mean.detach(), self.of.detach())


class Metric(ABC):
    """Base class of metrics; a user's own needs only ``measure``."""

    relaxed: ClassVar[bool] = False
    """Whether it reads the relaxed state, which costs an evaluation of the whole network: ``relaxed_every``."""

    @abstractmethod
    def measure(self, outcome: Outcome) -> Mapping[str, Tensor | PartialMean]:
        """Means over the samples of one batch, 0-d, or over a share of it, by name."""


@attrs.frozen
class Accuracy(Metric):
    """The share of samples, 0 to 1, or of their positions, whose largest output is at the largest target; of a partly
    given target, of those whose classes are all given.

    In training it is that of the forward pass before the weights learned from the batch, and costs nothing.

    Args:
        axis: of the classes in the target's shape, the batch axis left out, at least 0.
    """

    axis: int = 0

    def measure(self, outcome: Outcome) -> Mapping[str, Tensor | PartialMean]:
        """{"accuracy": 0-d}; SettingError where the batch has no target, or one that tells no classes apart."""
        output, target = _compared("Accuracy", outcome)
        axis = self.axis + 1
        if output.shape[axis : axis + 1] <= (1,):
            raise SettingError(
                f"Accuracy: outputs of shape {tuple(output.shape)} given, expected two units or more along "
                f"axis {axis}, of which one is largest; measure something else"
            )
        right = (output.argmax(axis) == target.argmax(axis)).float()
        if outcome.mask is None:
            return {"accuracy": right.mean()}
        known = outcome.mask.expand_as(target).all(axis).float()
        return {"accuracy": PartialMean((right * known).sum() / known.sum(), known.mean())}


@attrs.frozen
class MeanSquaredError(Metric):
    """The mean of (output − target)² over samples and units, of a partly given target over the units that are given.

    As :class:`Accuracy` in training of the forward pass before the weights learned from the batch, at no cost.
    """

    def measure(self, outcome: Outcome) -> Mapping[str, Tensor | PartialMean]:
        """{"mean_squared_error": 0-d}; SettingError where the batch has no target."""
        output, target = _compared("MeanSquaredError", outcome)
        squared = (output - target).square()
        if outcome.mask is None:
            return {"mean_squared_error": squared.mean()}
        given = outcome.mask.expand_as(squared)
        return {
            "mean_squared_error": PartialMean(torch.where(given, squared, 0).sum() / given.sum(), given.float().mean())
        }


def _compared(metric: str, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Output and target, (batch, *shape)."""
    if outcome.output is None or outcome.target is None:
        raise SettingError(f"{metric} needs a clamped target: name it with target=, or measure something else")
    return outcome.output, outcome.target


@attrs.frozen
class RelaxedEnergy(Metric):
    """Σ w_n E_n per sample, precision left out, at the relaxed values and the present weights."""

    relaxed: ClassVar[bool] = True

    def measure(self, outcome: Outcome) -> Mapping[str, Tensor]:
        """{"energy": 0-d}, in training at the weights after the update."""
        nodes = outcome.network.nodes.values()
        return {"energy": together([node.energy_weight * node.energy.mean() for node in nodes]).sum()}


@attrs.frozen
class ErrorByLevel(Metric):
    """‖ε_n‖ per sample, averaged over the nodes of each level (SPEC §2, Arrival)."""

    relaxed: ClassVar[bool] = True

    def measure(self, outcome: Outcome) -> Mapping[str, Tensor]:
        """{"error_level_<level>": 0-d} of every level that holds a node with an energy."""
        assert outcome.trace is not None, "metrics of the relaxed state are measured after a relaxation only"
        norms: dict[int, list[Tensor]] = {}
        for name in outcome.trace.nodes:
            if name in outcome.trace.levels:
                norm = torch.linalg.vector_norm(outcome.network[name].error.flatten(1), dim=1).mean()
                norms.setdefault(outcome.trace.levels[name], []).append(norm)
        return {f"error_level_{level}": together(norms[level]).mean() for level in sorted(norms)}


def measure_all(metrics: Sequence[Metric], outcome: Outcome) -> dict[str, Tensor | PartialMean]:
    """What all metrics measure of one batch, 0-d, by name; those of the relaxed state only where there is one.

    Raises:
        SettingError: two metrics measure something of the same name.
    """
    measured: dict[str, Tensor | PartialMean] = {}
    for metric in metrics:
        if metric.relaxed and outcome.trace is None:
            continue
        for name, mean in metric.measure(outcome).items():
            if name in measured:
                raise SettingError(
                    f"metric {name!r} is measured twice, the second time by {metric}; drop or rename one"
                )
            measured[name] = mean.detach()
    return measured


Totals = Mapping[str, tuple[float, float]]
"""Sum over samples, and how many they were, by name."""


class RunningMeans:
    """Means over the samples of many batches, by name; they stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor | int] = {}
        self._batches = 0

    def add(self, measured: Mapping[str, Tensor | PartialMean], samples: int) -> None:
        """Count in means, 0-d, over so many samples, or a share of them."""
        self._batches += 1
        for name, mean in measured.items():
            weight: Tensor | int = samples
            if isinstance(mean, PartialMean):
                weight, mean = samples * mean.of, torch.where(mean.of > 0, mean.mean, 0)
            self._sums[name] = self._sums.get(name, 0) + weight * mean
            self._samples[name] = self._samples.get(name, 0) + weight

    def read(self, gather: Callable[[Totals], list[Totals]] | None = None) -> dict[str, float]:
        """The means so far; waits for the device. SettingError if nothing was counted in yet.

        Args:
            gather: the sums of all processes that share the batches, given those of this one.
        """
        if not self._batches:
            raise SettingError("no batches given, expected at least one; a generator, for one, gives its batches once")
        own = {name: (total.item(), float(self._samples[name])) for name, total in self._sums.items()}
        parts = [own] if gather is None else gather(own)
        sums: dict[str, tuple[float, float]] = {}
        for name, (total, samples) in (item for part in parts for item in part.items()):
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + samples
        return {name: total / samples for name, (total, samples) in sums.items() if samples}

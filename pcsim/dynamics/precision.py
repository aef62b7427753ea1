"""Precision schedules: how much an error counts at each inference step (arXiv 2506.23800, §4; SPEC §3)."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import attrs

from pcsim.errors import PrecisionWarning, SettingError
from pcsim.messages import is_number


class PrecisionSchedule(ABC):
    """Base class of schedules; multiplies each node's own precision.

    A schedule is a pure function of the step and the node's level, so that what it makes exactly zero is known before
    any tensor exists.
    """

    @abstractmethod
    def at(self, step: int, level: int | None, steps: int) -> float:
        """π(t) of a node, at least 0.

        Args:
            step: inference step t, from 0 to steps − 1.
            level: latent hops from the node to the targets; None where it reaches none.
            steps: T.
        """

    def check(self, levels: Mapping[str, int], steps: int) -> None:  # noqa: B027 - most schedules reach every node
        """Say so if the relaxation is too short for the schedule to reach some node; nothing by default.

        Args:
            levels: level by name of the nodes with an energy.
            steps: T.
        """


def _at_least_zero(instance: object, attribute: attrs.Attribute[float], number: float) -> None:
    if not is_number(number) or number < 0:
        raise SettingError(
            f"{type(instance).__name__}.{attribute.name}: given {number!r}, expected a finite number of at least 0; a "
            "negative precision would reward errors"
        )


@attrs.frozen
class Constant(PrecisionSchedule):
    """The same precision at every step.

    Args:
        value: π, at least 0.

    Raises:
        SettingError: value is negative or not finite.
    """

    value: float = attrs.field(default=1.0, validator=_at_least_zero)

    def at(self, step: int, level: int | None, steps: int) -> float:
        """``value``, whatever the step and the level."""
        return self.value


@attrs.frozen
class Spiking(PrecisionSchedule):
    """``peak`` at the step at which the error arrives, ``alpha`` at every other (arXiv 2506.23800, Eq. 4).

    The defaults are those of the paper's experiments. With ``alpha`` = 0 nearly all of the work is on exact zeros and
    is left out.

    Args:
        alpha: precision away from the arrival, at least 0.
        peak: precision at the arrival, at least 0. rate · peak = 1 undoes the attenuation of the travelling error.

    Raises:
        SettingError: a precision is negative or not finite.
    """

    alpha: float = attrs.field(default=1e-3, validator=_at_least_zero)
    peak: float = attrs.field(default=1.0, validator=_at_least_zero)

    @classmethod
    def as_covariance(cls, rate: float) -> Spiking:
        """The paper's Eq. 4 as printed: a covariance of ``rate`` at the arrival, 1 otherwise.

        Args:
            rate: the inference rate α of the paper, > 0.

        Raises:
            SettingError: the rate is not positive.
        """
        if not rate > 0:
            raise SettingError(f"Spiking.as_covariance: rate {rate} given, expected a positive number")
        return cls(alpha=1.0, peak=1.0 / rate)

    @classmethod
    def for_rate(cls, rate: float) -> Spiking:
        """The schedule that undoes the attenuation and is silent otherwise: peak 1/rate, alpha 0.

        With it every error arrives whole, so that :class:`ArrivalUpdate` finds backprop's gradient (SPEC §10).

        Args:
            rate: of the relaxation, > 0.

        Raises:
            SettingError: the rate is not positive.
        """
        if not 0 < rate < float("inf"):
            raise SettingError(f"Spiking.for_rate: rate {rate} given, expected a positive number")
        return cls(alpha=0.0, peak=1.0 / rate)

    def at(self, step: int, level: int | None, steps: int) -> float:
        """``peak`` where step = level, else ``alpha``."""
        return self.peak if step == level else self.alpha

    def check(self, levels: Mapping[str, int], steps: int) -> None:
        """Warn (:class:`PrecisionWarning`) of the nodes whose spike comes after the last step."""
        late = _too_late(levels, steps)
        if late:
            warnings.warn(
                f"spiking precision never spikes at {late} within {steps} steps: the error arrives there at its level. "
                f"Relax for at least {max(levels.values()) + 1} steps",
                PrecisionWarning,
                stacklevel=2,
            )


@attrs.frozen
class Decaying(PrecisionSchedule):
    """0 before the error arrives, 1 when it does, then a small decaying tail (arXiv 2506.23800, §4).

    With n = T − level and j steps since the arrival, the tail is e^{−kj}/100 times Σ_{i<n} e^{−ki} as in the paper's
    published code (``tail="multiplied"``), or divided by that sum as in an earlier version (``tail="divided"``).

    Args:
        k: rate of the decay, at least 0.
        tail: which of the two.

    Raises:
        SettingError: k is negative or not finite, or the tail is unknown.
    """

    k: float = attrs.field(default=1.0, validator=_at_least_zero)
    tail: Literal["multiplied", "divided"] = attrs.field(default="multiplied")

    @tail.validator
    def _known_tail(self, attribute: attrs.Attribute[str], tail: str) -> None:
        if tail not in ("multiplied", "divided"):
            raise SettingError(f"Decaying.tail: given {tail!r}, expected 'multiplied' or 'divided'")

    def at(self, step: int, level: int | None, steps: int) -> float:
        """0 before the arrival (and where no error arrives), 1 at it, the tail after it."""
        if level is None or step < level:
            return 0.0
        since = step - level
        if since == 0:
            return 1.0
        count = steps - level
        total = math.expm1(-self.k * count) / math.expm1(-self.k) if self.k else float(count)
        share = total if self.tail == "multiplied" else 1.0 / total
        return math.exp(-self.k * since) / 100.0 * share

    def check(self, levels: Mapping[str, int], steps: int) -> None:
        """Raise :class:`SettingError` if an error would not arrive at some node in time."""
        late = _too_late(levels, steps)
        if late:
            raise SettingError(
                f"decaying precision stays 0 at {late} within {steps} steps: the error arrives there at its level. "
                f"Relax for at least {max(levels.values()) + 1} steps"
            )


def _too_late(levels: Mapping[str, int], steps: int, most: int = 6) -> str:
    late = [f"{name!r} (level {level})" for name, level in levels.items() if level >= steps]
    return ", ".join(late[:most]) + (f" and {len(late) - most} more" if len(late) > most else "")

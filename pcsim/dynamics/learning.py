"""Learning rules: what the weights of an edge see (SPEC §4).

Every rule is local: −(∂a_e/∂θ)ᵀ (∂g/∂a)ᵀ δ, of one edge, its source's activity, and its target's error. The rules
differ in the state from which activity and error are taken. Gradients are divided by the batch size and go to any
``torch.optim`` optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import attrs
from torch import Tensor

from pcsim.dynamics.inference import Relaxation
from pcsim.errors import SettingError
from pcsim.graph.energy import Energy, Scale
from pcsim.messages import listed


class LearningRule:
    """Base class of learning rules; a user's own overrides the declarations below, or ``delta``."""

    at_forward: ClassVar[bool] = False
    """Take activities and predictions from the forward pass instead of the relaxed state."""
    every_step: ClassVar[bool] = False
    """Learn after every inference step, from the state before it, with the precision of that step."""
    at_arrival: ClassVar[bool] = False
    """Learn from each node's error at the step at which it arrives, from the state before that step."""
    backprop: ClassVar[bool] = False
    """Treat every free node as deterministic."""

    @property
    def usual(self) -> bool:
        """Whether ``delta`` is the derivative of the energy, not one of a user's own."""
        return type(self).delta is LearningRule.delta

    def check(self, relaxation: Relaxation, levels: Mapping[str, int]) -> None:
        """Refuse a relaxation with which the rule makes no sense.

        Args:
            relaxation: how the free nodes move.
            levels: level by name of the nodes with an energy (SPEC §2, Arrival).

        Raises:
            SettingError: the weights would learn during the relaxation from predictions that are held throughout, or
                from errors that the relaxation does not move as the rule takes them to.
        """
        if relaxation.multipliers and (self.at_forward or self.every_step or self.at_arrival):
            raise SettingError(
                f"{type(self).__name__} knows nothing of multipliers, whose errors are learned from where they have "
                "settled; use SettledUpdate(), or leave multipliers out"
            )
        if relaxation.relaxes_errors and (self.at_forward or self.every_step or self.at_arrival):
            raise SettingError(
                f"{type(self).__name__} learns from errors on their way, and {type(relaxation).__name__} moves all of "
                "them at once; use SettledUpdate(), or Relaxation"
            )
        if self.every_step and relaxation.least_rate is not None:
            raise SettingError(
                f"{type(self).__name__} changes the weights, and so the energy, at every step, but least_rate="
                f"{relaxation.least_rate:g} judges steps by whether it falls; leave one of the two"
            )
        if self.every_step and relaxation.hold_predictions:
            raise SettingError(
                f"{type(self).__name__} changes the weights at every step, but hold_predictions=True keeps the "
                "predictions of the forward pass; leave one of the two"
            )

    def delta(self, energy: Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """What a node hands to the edges that predict it, for their weights: :meth:`descent` unless overridden.

        Args:
            energy: the node's energy.
            value: v_n, (batch, *shape).
            prediction: u_n, (batch, *shape).
            scale: w_n; with ``every_step``, π_n(t) w_n.

        Returns:
            (batch, *shape).
        """
        return self.descent(energy, value, prediction, scale)

    @staticmethod
    def descent(energy: Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """δ_n = −∂(scale · E_n)/∂u_n (SPEC §2), (batch, *shape)."""
        return -energy.prediction_gradient(value, prediction, scale)


@attrs.frozen
class SettledUpdate(LearningRule):
    """Plain predictive coding: everything at the relaxed state, precision left out (arXiv 2407.01163, §2)."""


@attrs.frozen
class ForwardUpdate(LearningRule):
    """Activities and predictions of the forward pass, errors of relaxed values to them (arXiv 2506.23800, Eq. 5).

    It learns from what the relaxation leaves of each error: with a schedule that is silent but for the arrival, and
    rate · precision = 1 there (``Spiking.for_rate``), that is nothing below the targets. Take :class:`ArrivalUpdate`.
    """

    at_forward: ClassVar[bool] = True


@attrs.frozen
class IncrementalUpdate(LearningRule):
    """Incremental predictive coding: weights learn after every inference step, precision kept (arXiv 2212.00720)."""

    every_step: ClassVar[bool] = True


@attrs.frozen
class ArrivalUpdate(LearningRule):
    """Each edge learns from the error that arrives, when it arrives (Z-IL: Salvatori et al., AAAI 2022; SPEC §4).

    The gradients of the edges into a node of level k come from the state before step k, precision left out, and are
    kept; one optimizer step follows the relaxation. Errors on their way through deterministic nodes teach the edges
    into these as well. With ``Spiking.for_rate(rate)`` they are backprop's gradients on every graph without cycles
    whose paths are balanced (:func:`balance_paths`), and with held predictions on every graph without cycles.
    """

    at_arrival: ClassVar[bool] = True

    def check(self, relaxation: Relaxation, levels: Mapping[str, int]) -> None:
        """Refuse a schedule that speaks before the arrival, or a relaxation that ends before it.

        Raises:
            SettingError: names the nodes.
        """
        super().check(relaxation, levels)
        late = [f"{name} (level {level})" for name, level in levels.items() if level >= relaxation.steps]
        if late:
            raise SettingError(
                f"ArrivalUpdate: no error arrives at {listed(late, 6)} within {relaxation.steps} steps; relax for at "
                f"least {max(levels.values()) + 1} steps"
            )
        schedule, steps = relaxation.precision, relaxation.steps
        if any(schedule.at(step, level, steps) != 0 for level in {*levels.values()} for step in range(level)):
            raise SettingError(
                f"ArrivalUpdate: {schedule} weighs errors before they have all arrived; it needs a schedule that is 0 "
                f"until then: Spiking.for_rate({relaxation.rate:g}), Spiking(alpha=0) or Decaying()"
            )


@attrs.frozen
class Backprop(LearningRule):
    """The baseline: backpropagation on the same graph, every free node treated as deterministic.

    Not local: the error reaches every layer within one step.
    """

    backprop: ClassVar[bool] = True

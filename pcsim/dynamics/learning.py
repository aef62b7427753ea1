"""Learning rules: what the weights of an edge see (SPEC §4).

Every rule is local: −(∂a_e/∂θ)ᵀ (∂g/∂a)ᵀ δ, of one edge, its source's activity, and its target's error. The rules
differ in the state from which activity and error are taken. Gradients are divided by the batch size and go to any
``torch.optim`` optimizer.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
from torch import Tensor

from pcsim.graph.energy import Energy, Scale


class LearningRule:
    """Base class of learning rules; a user's own overrides the declarations below, or ``delta``."""

    at_forward: ClassVar[bool] = False
    """Take activities and predictions from the forward pass instead of the relaxed state."""
    every_step: ClassVar[bool] = False
    """Learn after every inference step, from the state before it, with the precision of that step."""
    backprop: ClassVar[bool] = False
    """Treat every free node as deterministic."""

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
    """Activities and predictions of the forward pass, errors of relaxed values to them (arXiv 2506.23800, Eq. 5)."""

    at_forward: ClassVar[bool] = True


@attrs.frozen
class IncrementalUpdate(LearningRule):
    """Incremental predictive coding: weights learn after every inference step, precision kept (arXiv 2212.00720)."""

    every_step: ClassVar[bool] = True


@attrs.frozen
class Backprop(LearningRule):
    """The baseline: backpropagation on the same graph, every free node treated as deterministic.

    Not local: the error reaches every layer within one step.
    """

    backprop: ClassVar[bool] = True

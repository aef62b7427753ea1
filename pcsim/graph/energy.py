"""Energies: what it costs a node that its value differs from its prediction.

An energy belongs to what the network *is* (it is the node's noise model), so it lives in this room; how the
energy is weighed over time (precision schedules) and descended are questions of dynamics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from pcsim.errors import GraphError
from pcsim.messages import is_number

Scale = Tensor | float
"""A factor on an energy: a number, or a tensor that broadcasts to the node's value."""


class Energy(ABC):
    """Base class of energies; a user's own needs only ``unit_energy``.

    The two derivatives come from autograd unless a subclass gives them in closed form. ``scale`` is the product
    of precision and weight, π_n(t) w_n; it multiplies the energy unit by unit.
    """

    normalised: ClassVar[bool] = False
    """Whether ``precision * energy - log(precision) / 2`` is a negative log-likelihood, unit by unit, up to a
    constant: what a learned precision needs (true of the Gaussian)."""

    rests_at_prediction: ClassVar[bool] = False
    """Whether both derivatives are exactly zero where value = prediction, so that nothing needs to be computed there.
    False is always right, and True (of the Gaussian, say) is faster."""

    has_minimum: ClassVar[bool] = True
    """Whether the energy has a minimum in the value, at any prediction, so that a free node may have it."""

    @property
    def gaussian(self) -> bool:
        """Whether this is exactly the Gaussian energy, whose derivative is a multiple of value − prediction."""
        return type(self) is Gaussian

    @abstractmethod
    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """Energy of each unit.

        Args:
            value: latent values, (batch, *shape).
            prediction: predictions of them, (batch, *shape).

        Returns:
            (batch, *shape), before precision and weight: one number for each unit. An energy that does not split over
            units may return (batch, 1, ..., 1), and then takes one number as precision.
        """

    def sample_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """E_n of SPEC §1: the energy summed over units, one number per sample, (batch,)."""
        return self.unit_energy(value, prediction).reshape(len(value), -1).sum(1)

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """∂(scale · E)/∂value, (batch, *shape)."""
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            total = (scale * self.unit_energy(leaf, prediction.detach())).sum()
            return torch.autograd.grad(total, leaf)[0]

    def prediction_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """∂(scale · E)/∂prediction, (batch, *shape)."""
        with torch.enable_grad():
            leaf = prediction.detach().requires_grad_()
            total = (scale * self.unit_energy(value.detach(), leaf)).sum()
            return torch.autograd.grad(total, leaf)[0]


@attrs.frozen
class Gaussian(Energy):
    """½ ‖value − prediction‖², the energy of a Gaussian with unit covariance (arXiv 2407.01163, §2)."""

    normalised: ClassVar[bool] = True
    rests_at_prediction: ClassVar[bool] = True

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """½ (value − prediction)², (batch, *shape)."""
        return 0.5 * (value - prediction).square()

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """Scale times (value − prediction), (batch, *shape)."""
        return scale * (value - prediction)

    def prediction_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """−scale · (value − prediction), (batch, *shape)."""
        return scale * (prediction - value)


@attrs.frozen
class CrossEntropy(Energy):
    """−Σ value · log softmax(prediction) along an axis of the node's shape (arXiv 2407.01163, §2).

    The value is a distribution over classes (a one-hot target, say) and the prediction holds logits. It is linear in
    the value and so has no minimum in it: for clamped nodes.

    Args:
        axis: of the classes in the node's shape, the batch axis left out; the first by default.

    Raises:
        GraphError: the axis is no whole number.
    """

    has_minimum: ClassVar[bool] = False
    axis: int = 0

    def __attrs_post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise GraphError(f"CrossEntropy.axis: given {self.axis!r}, expected a whole number")

    @property
    def _axis(self) -> int:
        return self.axis + 1 if self.axis >= 0 else self.axis

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """−value · log softmax(prediction), (batch, *shape)."""
        return -value * torch.log_softmax(prediction, self._axis)

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """−scale · log softmax(prediction), (batch, *shape)."""
        return -scale * torch.log_softmax(prediction, self._axis)

    def prediction_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """softmax(prediction) · Σ(scale · value) − scale · value, (batch, *shape)."""
        weighted = scale * value
        return torch.softmax(prediction, self._axis) * weighted.sum(self._axis, keepdim=True) - weighted


def _positive(instance: object, attribute: attrs.Attribute[float], number: float) -> None:
    if not is_number(number) or number <= 0:
        raise GraphError(
            f"LearnedPrecision.{attribute.name}: given {number!r}, expected a positive finite number; the precision is "
            "learned as its logarithm"
        )


@attrs.frozen
class LearnedPrecision:
    """Asks for a node's precision to be learned: its logarithm becomes a parameter of the node.

    The term −½ log π of the Gaussian's negative log-likelihood joins the energy (SPEC §3), so that the fixed point
    is the inverse of the mean squared error.

    Args:
        initial: precision at the start, > 0.
        per_unit: one precision for each unit instead of one for the node.

    Raises:
        GraphError: initial is not positive and finite.
    """

    initial: float = attrs.field(default=1.0, validator=_positive)
    per_unit: bool = False

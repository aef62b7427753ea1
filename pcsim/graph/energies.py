"""Energies beside the Gaussian and the cross-entropy: robust ones, of binary values, and of correlated units."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from pcsim.errors import GraphError
from pcsim.graph.energy import Energy, Scale
from pcsim.messages import is_number


def _positive(instance: object, attribute: attrs.Attribute[float], number: float) -> None:
    if not is_number(number) or number <= 0:
        raise GraphError(
            f"{type(instance).__name__}.{attribute.name}: given {number!r}, expected a positive finite number"
        )


class OfDifference(Energy):
    """Base class of energies of value − prediction alone; a subclass gives the energy and its slope."""

    rests_at_prediction: ClassVar[bool] = True

    @property
    def outlying(self) -> float | None:
        """The error beyond which a unit pulls less than a Gaussian would let it; None where there is no such."""
        return None

    def slope(self, error: Tensor) -> Tensor:
        """∂E/∂error of each unit, (batch, *shape); exactly zero where the error is."""
        raise NotImplementedError

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """Scale times the slope, (batch, *shape)."""
        return scale * self.slope(value - prediction)

    def prediction_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """−scale times the slope, (batch, *shape)."""
        return -scale * self.slope(value - prediction)


@attrs.frozen
class Laplace(OfDifference):
    """|value − prediction| / width: errors pull alike whatever their size, so that outliers count little.

    At a free node latents hover about their prediction within rate · precision / width, since the pull does not fade.

    Args:
        width: the scale b of the Laplace distribution, > 0.

    Raises:
        GraphError: the width is not positive.
    """

    width: float = attrs.field(default=1.0, validator=_positive)

    @property
    def outlying(self) -> float:
        """The width."""
        return self.width

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """|value − prediction| / width, (batch, *shape)."""
        return (value - prediction).abs() / self.width

    def slope(self, error: Tensor) -> Tensor:
        """The error's sign over the width, (batch, *shape)."""
        return error.sign() / self.width


@attrs.frozen
class Huber(OfDifference):
    """Gaussian for errors up to ``threshold``, linear beyond (Huber, Annals of Mathematical Statistics 1964).

    Args:
        threshold: the error at which it turns, > 0.

    Raises:
        GraphError: the threshold is not positive.
    """

    threshold: float = attrs.field(default=1.0, validator=_positive)

    @property
    def outlying(self) -> float:
        """The threshold."""
        return self.threshold

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """½ ε² where |ε| ≤ threshold, else threshold (|ε| − ½ threshold), (batch, *shape)."""
        return functional.huber_loss(value, prediction, reduction="none", delta=self.threshold)

    def slope(self, error: Tensor) -> Tensor:
        """The error, within ± threshold, (batch, *shape)."""
        return error.clamp(-self.threshold, self.threshold)


@attrs.frozen
class StudentT(OfDifference):
    """½ (ν + 1) log(1 + ε² / ν): large errors pull less and less, as those of a sparse or heavy-tailed cause.

    It has a minimum, but is not convex beyond |ε| = √ν.

    Args:
        freedom: ν, the degrees of freedom, > 0.

    Raises:
        GraphError: ν is not positive.
    """

    freedom: float = attrs.field(default=3.0, validator=_positive)

    @property
    def outlying(self) -> float:
        """√ν, where the pull is largest."""
        return math.sqrt(self.freedom)

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """½ (ν + 1) log(1 + ε² / ν), (batch, *shape)."""
        return 0.5 * (self.freedom + 1) * torch.log1p((value - prediction).square() / self.freedom)

    def slope(self, error: Tensor) -> Tensor:
        """(ν + 1) ε / (ν + ε²), (batch, *shape)."""
        return (self.freedom + 1) * error / (self.freedom + error.square())


@attrs.frozen
class Bernoulli(Energy):
    """Binary values predicted by logits: softplus(prediction) − value · prediction, unit by unit.

    The value is a probability, 0 to 1. The energy is linear in it and so has no minimum in it: for clamped nodes.
    """

    has_minimum: ClassVar[bool] = False

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """−value · log σ(prediction) − (1 − value) · log σ(−prediction), (batch, *shape)."""
        return functional.softplus(prediction) - value * prediction

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """−scale · prediction, (batch, *shape)."""
        return -scale * prediction

    def prediction_gradient(self, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """Scale · (σ(prediction) − value), (batch, *shape)."""
        return scale * (torch.sigmoid(prediction) - value)


@attrs.frozen(eq=False)
class CorrelatedGaussian(OfDifference):
    """½ εᵀ Σ⁻¹ ε over all units of a node: a Gaussian of full covariance Σ. It takes one number as precision.

    Args:
        covariance: Σ, (units, units), symmetric and positive definite, the node's units in the order of its shape.

    Raises:
        GraphError: Σ is no such matrix.
    """

    covariance: Tensor
    inverse: Tensor = attrs.field(init=False, repr=False)
    _inverses: dict[tuple[torch.device, torch.dtype], Tensor] = attrs.field(init=False, repr=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        given = self.covariance
        if not isinstance(given, Tensor) or given.dim() != 2 or given.shape[0] != given.shape[1]:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise GraphError(f"CorrelatedGaussian.covariance: given {shape}, expected a square matrix (units, units)")
        factor, failed = torch.linalg.cholesky_ex(given.detach().double())
        if int(failed) or not torch.allclose(given, given.mT):
            raise GraphError("CorrelatedGaussian.covariance: expected a symmetric, positive definite matrix")
        object.__setattr__(self, "inverse", torch.cholesky_inverse(factor))

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """½ εᵀ Σ⁻¹ ε, (batch, 1, ..., 1)."""
        error = value - prediction
        total = 0.5 * (error * self.slope(error)).flatten(1).sum(1)
        return total.view(-1, *(1,) * (value.dim() - 1))

    def slope(self, error: Tensor) -> Tensor:
        """Σ⁻¹ ε, (batch, *shape)."""
        flat = error.flatten(1)
        place = flat.device, flat.dtype
        inverse = self._inverses.get(place)
        if inverse is None:
            inverse = self.inverse.to(flat)  # once a place, or each evaluation would wait for a device to have it
            if not inverse.is_inference():
                self._inverses[place] = inverse
        return (flat @ inverse).view_as(error)

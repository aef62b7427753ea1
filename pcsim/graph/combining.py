"""How a node combines what its incoming edges contribute."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """Adds the contributions of a node's incoming edges: the usual way to combine them."""

    def forward(self, *contributions: Tensor) -> Tensor:
        """Sum of contributions of one shape, (batch, *shape)."""
        total = contributions[0]
        for contribution in contributions[1:]:
            total = total + contribution
        return total


class Product(nn.Module):
    """Multiplies the contributions of a node's incoming edges, unit by unit (gating)."""

    def forward(self, *contributions: Tensor) -> Tensor:
        """Product of contributions of one shape, (batch, *shape)."""
        product = contributions[0]
        for contribution in contributions[1:]:
            product = product * contribution
        return product


class Concatenate(nn.Module):
    """Joins the contributions of a node's incoming edges, in the order in which the edges were added.

    Args:
        axis: axis of the node's shape (the batch axis not counted), 0 by default.
    """

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *contributions: Tensor) -> Tensor:
        """Contributions joined along ``axis``, (batch, *shape)."""
        return torch.cat(contributions, self.axis + 1 if self.axis >= 0 else self.axis)

    def extra_repr(self) -> str:
        """The axis, for printing."""
        return f"axis={self.axis}"

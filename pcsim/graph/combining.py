"""How a node combines what its incoming edges contribute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pcsim.errors import GraphError


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


class Attention(nn.Module):
    """Attends from each position to all: softmax(q kᵀ / √d) v (Vaswani et al., arXiv 1706.03762, §3.2), head by head.

    The contributions are queries, keys and values, of three edges added in this order. No parameters: the edges carry
    the maps.

    Args:
        heads: parts of equal size into which the features are divided, at least 1.
        causal: each position attends to itself and those before it.

    Raises:
        GraphError: heads is no whole number of at least 1.
    """

    def __init__(self, heads: int = 1, causal: bool = False) -> None:
        super().__init__()
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise GraphError(f"Attention: heads={heads!r} given, expected a whole number of at least 1")
        self.heads, self.causal = heads, causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each position attends to, (batch, positions, features), from queries, keys and values of that shape."""
        split = *query.shape[:2], self.heads, query.shape[2] // self.heads
        queries, keys, values = (given.reshape(split).transpose(1, 2) for given in (query, key, value))
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        return attended.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Heads and mask, for printing."""
        return f"heads={self.heads}, causal={self.causal}"

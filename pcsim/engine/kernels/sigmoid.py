"""``nn.Sigmoid``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class Sigmoid(Activation[nn.Sigmoid]):
    """``nn.Sigmoid``."""

    reads, function = "output", torch.sigmoid

    def rises(self, module: nn.Sigmoid) -> bool:
        """It always rises."""
        return True

    def pulling(self, module: nn.Sigmoid, delta: Tensor, at: Tensor, out: Tensor) -> Callable[[], object]:
        """Delta · output (1 − output)."""
        return partial(aten.sigmoid_backward.grad_input, delta, at, grad_input=out)


register(nn.Sigmoid, Sigmoid())

"""``nn.Sigmoid``."""

from __future__ import annotations

import torch
from torch import nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class Sigmoid(Activation[nn.Sigmoid]):
    """``nn.Sigmoid``."""

    reads, function, derivative = "output", torch.sigmoid, aten.sigmoid_backward.grad_input

    def rises(self, module: nn.Sigmoid) -> bool:
        """It always rises."""
        return True


register(nn.Sigmoid, Sigmoid())

"""``nn.Sigmoid``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class Sigmoid(Activation[nn.Sigmoid]):
    """``nn.Sigmoid``."""

    reads, function = "output", aten.sigmoid

    def pull_back(self, module: nn.Sigmoid, delta: Tensor, at: Tensor, out: Tensor) -> Tensor:
        """Delta · output (1 − output)."""
        result: Tensor = aten.sigmoid_backward.grad_input(delta, at, grad_input=out)
        return result


register(nn.Sigmoid, Sigmoid())

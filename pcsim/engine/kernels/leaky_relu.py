"""``nn.LeakyReLU``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class LeakyReLU(Activation[nn.LeakyReLU]):
    """``nn.LeakyReLU``."""

    reads, function = "input", aten.leaky_relu

    def settings(self, module: nn.LeakyReLU) -> tuple[float, ...]:
        """The slope below zero."""
        return (module.negative_slope,)

    def pull_back(self, module: nn.LeakyReLU, delta: Tensor, at: Tensor, out: Tensor) -> Tensor:
        """Delta, times the slope where the input is not positive."""
        result: Tensor = aten.leaky_relu_backward.grad_input(delta, at, module.negative_slope, False, grad_input=out)
        return result


register(nn.LeakyReLU, LeakyReLU())

"""``nn.LeakyReLU``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, register

aten = torch.ops.aten


class LeakyReLU(Kernel[nn.LeakyReLU]):
    """``nn.LeakyReLU``."""

    stacks, reads, fills_out, elementwise = True, "input", True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Each unit, times the slope where it is negative."""
        slope = call.module.negative_slope
        result: Tensor = aten.leaky_relu(value, slope) if out is None else aten.leaky_relu.out(value, slope, out=out)
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta, times the slope where the input is not positive."""
        if out is None:
            out = torch.empty_like(value)
        slope = call.module.negative_slope
        result: Tensor = aten.leaky_relu_backward.grad_input(delta, value, slope, False, grad_input=out)
        return result


register(nn.LeakyReLU, LeakyReLU())

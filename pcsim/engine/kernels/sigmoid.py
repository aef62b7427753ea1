"""``nn.Sigmoid``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, register

aten = torch.ops.aten


class Sigmoid(Kernel[nn.Sigmoid]):
    """``nn.Sigmoid``."""

    stacks, reads, fills_out, elementwise = True, "output", True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The logistic function of each unit."""
        return torch.sigmoid(value, out=out)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta · output (1 − output)."""
        if out is None:
            out = torch.empty_like(value)
        result: Tensor = aten.sigmoid_backward.grad_input(delta, output, grad_input=out)
        return result


register(nn.Sigmoid, Sigmoid())

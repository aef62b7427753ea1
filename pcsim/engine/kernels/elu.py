"""``nn.ELU``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, register

aten = torch.ops.aten


class ELU(Kernel[nn.ELU]):
    """``nn.ELU``: α (exp(value) − 1) below zero, the value above."""

    stacks, reads, fills_out, elementwise = True, "input", True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The exponential linear unit of each unit."""
        alpha = call.module.alpha
        result: Tensor = aten.elu(value, alpha) if out is None else aten.elu.out(value, alpha, out=out)
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the derivative at the input."""
        if out is None:
            out = torch.empty_like(value)
        # Scales of the output and of the input are 1 in this module, and what is given is the input.
        settings = call.module.alpha, 1, 1, False
        result: Tensor = aten.elu_backward.grad_input(delta, *settings, value, grad_input=out)
        return result


register(nn.ELU, ELU())

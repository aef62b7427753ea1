"""``nn.Softplus``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, register

aten = torch.ops.aten


class Softplus(Kernel[nn.Softplus]):
    """``nn.Softplus``: log(1 + exp(β value)) / β, the value itself above a threshold."""

    stacks, reads, fills_out, elementwise = True, "input", True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The softplus of each unit."""
        settings = call.module.beta, call.module.threshold
        result: Tensor = (
            aten.softplus(value, *settings) if out is None else aten.softplus.out(value, *settings, out=out)
        )
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the derivative at the input."""
        if out is None:
            out = torch.empty_like(value)
        settings = call.module.beta, call.module.threshold
        result: Tensor = aten.softplus_backward.grad_input(delta, value, *settings, grad_input=out)
        return result


register(nn.Softplus, Softplus())

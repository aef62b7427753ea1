"""``nn.SiLU``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, register

aten = torch.ops.aten


class SiLU(Kernel[nn.SiLU]):
    """``nn.SiLU``: each unit times its sigmoid."""

    stacks, reads, fills_out, elementwise = True, "input", True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Value · σ(value)."""
        result: Tensor = aten.silu(value) if out is None else aten.silu.out(value, out=out)
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the derivative at the input."""
        if out is None:
            out = torch.empty_like(value)
        result: Tensor = aten.silu_backward.grad_input(delta, value, grad_input=out)
        return result


register(nn.SiLU, SiLU())

"""``nn.SiLU``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class SiLU(Activation[nn.SiLU]):
    """``nn.SiLU``: each unit times its sigmoid."""

    reads, function = "input", aten.silu

    def pull_back(self, module: nn.SiLU, delta: Tensor, at: Tensor, out: Tensor) -> Tensor:
        """Delta times the derivative at the input."""
        result: Tensor = aten.silu_backward.grad_input(delta, at, grad_input=out)
        return result


register(nn.SiLU, SiLU())

"""``nn.Softplus``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class Softplus(Activation[nn.Softplus]):
    """``nn.Softplus``: log(1 + exp(β value)) / β, the value itself above a threshold."""

    reads, function = "input", aten.softplus

    def settings(self, module: nn.Softplus) -> tuple[float, ...]:
        """β and the threshold."""
        return module.beta, module.threshold

    def pull_back(self, module: nn.Softplus, delta: Tensor, at: Tensor, out: Tensor) -> Tensor:
        """Delta times the derivative at the input."""
        result: Tensor = aten.softplus_backward.grad_input(delta, at, *self.settings(module), grad_input=out)
        return result


register(nn.Softplus, Softplus())

"""``nn.ELU``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class ELU(Activation[nn.ELU]):
    """``nn.ELU``: α (exp(value) − 1) below zero, the value above."""

    reads, function = "input", aten.elu

    def settings(self, module: nn.ELU) -> tuple[float, ...]:
        """α."""
        return (module.alpha,)

    def pull_back(self, module: nn.ELU, delta: Tensor, at: Tensor, out: Tensor) -> Tensor:
        """Delta times the derivative at the input."""
        # Scales of the output and of the input are 1 in this module, and what is given is the input.
        result: Tensor = aten.elu_backward.grad_input(delta, module.alpha, 1, 1, False, at, grad_input=out)
        return result


register(nn.ELU, ELU())

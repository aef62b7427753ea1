"""``nn.Softplus``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class Softplus(Activation[nn.Softplus]):
    """``nn.Softplus``: log(1 + exp(β value)) / β, the value itself above a threshold."""

    reads, function, derivative = "input", aten.softplus.out, aten.softplus_backward.grad_input

    def settings(self, module: nn.Softplus) -> dict[str, Any]:
        """β and the threshold."""
        return {"beta": module.beta, "threshold": module.threshold}

    def rises(self, module: nn.Softplus) -> bool:
        """It always rises."""
        return True


register(nn.Softplus, Softplus())

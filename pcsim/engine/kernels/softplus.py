"""``nn.Softplus``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class Softplus(Activation[nn.Softplus]):
    """``nn.Softplus``: log(1 + exp(β value)) / β, the value itself above a threshold."""

    reads, function = "input", aten.softplus.out

    def settings(self, module: nn.Softplus) -> dict[str, Any]:
        """β and the threshold."""
        return {"beta": module.beta, "threshold": module.threshold}

    def rises(self, module: nn.Softplus) -> bool:
        """It always rises."""
        return True

    def pulling(self, module: nn.Softplus, delta: Tensor, at: Tensor, out: Tensor) -> Callable[[], object]:
        """Delta times the derivative at the input."""
        return partial(aten.softplus_backward.grad_input, delta, at, **self.settings(module), grad_input=out)


register(nn.Softplus, Softplus())

"""``nn.LeakyReLU``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class LeakyReLU(Activation[nn.LeakyReLU]):
    """``nn.LeakyReLU``."""

    reads, function = "input", aten.leaky_relu.out

    def settings(self, module: nn.LeakyReLU) -> dict[str, Any]:
        """The slope below zero."""
        return {"negative_slope": module.negative_slope}

    def rises(self, module: nn.LeakyReLU) -> bool:
        """Where its slope below zero is not negative."""
        return module.negative_slope >= 0

    def pulling(self, module: nn.LeakyReLU, delta: Tensor, at: Tensor, out: Tensor) -> Callable[[], object]:
        """Delta, times the slope where the input is not positive."""
        return partial(aten.leaky_relu_backward.grad_input, delta, at, module.negative_slope, False, grad_input=out)


register(nn.LeakyReLU, LeakyReLU())

"""``nn.SiLU``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class SiLU(Activation[nn.SiLU]):
    """``nn.SiLU``: each unit times its sigmoid."""

    reads, function = "input", aten.silu.out

    def pulling(self, module: nn.SiLU, delta: Tensor, at: Tensor, out: Tensor) -> Callable[[], object]:
        """Delta times the derivative at the input."""
        return partial(aten.silu_backward.grad_input, delta, at, grad_input=out)


register(nn.SiLU, SiLU())

"""``nn.SiLU``."""

from __future__ import annotations

import torch
from torch import nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class SiLU(Activation[nn.SiLU]):
    """``nn.SiLU``: each unit times its sigmoid."""

    reads, function, derivative = "input", aten.silu.out, aten.silu_backward.grad_input


register(nn.SiLU, SiLU())

"""``nn.ELU``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import register

aten = torch.ops.aten


class ELU(Activation[nn.ELU]):
    """``nn.ELU``: α (exp(value) − 1) below zero, the value above."""

    reads, function = "input", aten.elu.out

    def settings(self, module: nn.ELU) -> dict[str, Any]:
        """α."""
        return {"alpha": module.alpha}

    def rises(self, module: nn.ELU) -> bool:
        """Where α is not negative."""
        return module.alpha >= 0

    def pulling(self, module: nn.ELU, delta: Tensor, at: Tensor, out: Tensor) -> Callable[[], object]:
        """Delta times the derivative at the input."""
        # Scales of the output and of the input are 1 in this module, and what is given is the input.
        return partial(aten.elu_backward.grad_input, delta, module.alpha, 1, 1, False, at, grad_input=out)


register(nn.ELU, ELU())

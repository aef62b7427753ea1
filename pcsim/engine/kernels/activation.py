"""What activations have in common that ATen computes together with their derivatives."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel

M = TypeVar("M", bound=nn.Module)


class Activation(Kernel[M]):
    """Base class: a function of each unit by itself, with settings of its module's."""

    stacks, fills_out, elementwise = True, True, True
    function: ClassVar[Any]
    """Of the values and the settings, with an overload that fills ``out``."""

    def settings(self, module: M) -> tuple[float, ...]:
        """What the function takes beside the values; nothing by default."""
        return ()

    @abstractmethod
    def pull_back(self, module: M, delta: Tensor, at: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` with delta times the derivative.

        Args:
            module: whose settings count.
            delta: the error, (batch, *shape).
            at: the input or the output, whichever the kernel reads.
            out: of the same shape.
        """

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The function of each unit."""
        settings = self.settings(call.module)
        result: Tensor = (
            self.function(value, *settings) if out is None else self.function.out(value, *settings, out=out)
        )
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the derivative."""
        at = value if self.reads == "input" else output
        return self.pull_back(call.module, delta, at, torch.empty_like(delta) if out is None else out)

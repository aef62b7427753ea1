"""What activations have in common that ATen computes together with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel

M = TypeVar("M", bound=nn.Module)


class Activation(Kernel[M]):
    """Base class: a function of each unit by itself, with settings of its module's."""

    stacks, fills_out, elementwise = True, True, True
    function: ClassVar[Any]
    """Of the values and the settings; it fills ``out``."""
    derivative: ClassVar[Any]
    """Times delta, of the input or output and the settings; it fills ``grad_input``. Not where ``pulling`` is there."""

    def settings(self, module: M) -> dict[str, Any]:
        """What the function takes beside the values, by keyword; nothing by default."""
        return {}

    def rises(self, module: M) -> bool:
        """Whether the function never falls; taken not to be known by default."""
        return False

    def pulling(self, module: M, delta: Tensor, at: Tensor, out: Tensor) -> Callable[[], object]:
        """What fills ``out`` with delta times the derivative when it is called.

        Args:
            module: whose settings count.
            delta: the error, (batch, *shape).
            at: the input or the output, whichever the kernel reads.
            out: of the same shape.
        """
        return partial(type(self).derivative, delta, at, **self.settings(module), grad_input=out)

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The function of each unit."""
        out = torch.empty_like(value) if out is None else out
        self.predicting(call, value, out)()
        return out

    def predicting(self, call: Call, value: Tensor, out: Tensor) -> Callable[[], object]:
        """Fills ``out`` with the function of each unit."""
        return partial(type(self).function, value, **self.settings(call.module), out=out)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the derivative."""
        out = torch.empty_like(delta) if out is None else out
        self.messaging(call, delta, value, output, out)()
        return out

    def messaging(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor) -> Callable[[], object]:
        """Fills ``out`` with delta times the derivative."""
        return self.pulling(call.module, delta, value if self.reads == "input" else output, out)

"""What takes each unit by itself: activations, gains, and what changes nothing but the shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcsim.engine.kernels import products
from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.kernel import Call, Kernel, register

aten = torch.ops.aten


class Identity(Kernel[nn.Identity]):
    """``nn.Identity``; the engine leaves it out of a chain, so nothing is ever computed."""

    stacks, reads, fills_out, elementwise, identity = True, "nothing", True, True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The value itself."""
        return value if out is None else out.copy_(value)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta itself."""
        return delta if out is None else out.copy_(delta)


class Gain(Kernel[nn.Module]):
    """An edge's fixed factor."""

    stacks, reads, fills_out, elementwise = True, "nothing", True, True

    def __init__(self, gain: float) -> None:
        self._gain = gain

    def signature(self, module: nn.Module) -> Hashable:
        """The factor."""
        return self._gain

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Value times the gain."""
        return torch.mul(value, self._gain, out=out)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the gain."""
        return torch.mul(delta, self._gain, out=out)

    def predicting(self, call: Call, value: Tensor, out: Tensor) -> Callable[[], object]:
        """Writes the value times the gain."""
        return partial(torch.mul, value, self._gain, out=out)

    def messaging(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor) -> Callable[[], object]:
        """Writes delta times the gain."""
        return partial(torch.mul, delta, self._gain, out=out)


class Tanh(Activation[nn.Tanh]):
    """``nn.Tanh``."""

    reads, function, derivative = "output", torch.tanh, aten.tanh_backward.grad_input

    def predicting(self, call: Call, value: Tensor, out: Tensor) -> Callable[[], object]:
        """Fills ``out`` with the tangent, by the library that the engine's ``products`` names."""
        if products.tanh_by_onednn(call.products, value, out):
            return partial(products.fill_tanh, products.in_parts(value), out=products.in_parts(out))
        return super().predicting(call, value, out)

    def rises(self, module: nn.Tanh) -> bool:
        """It always rises."""
        return True


class ReLU(Activation[nn.ReLU]):
    """``nn.ReLU``."""

    reads, function = "output", torch.clamp_min

    def settings(self, module: nn.ReLU) -> dict[str, Any]:
        """Where values are cut off."""
        return {"min": 0}

    def rises(self, module: nn.ReLU) -> bool:
        """It never falls."""
        return True

    def pulling(self, module: nn.ReLU, delta: Tensor, at: Tensor, out: Tensor) -> Callable[[], object]:
        """Delta where the output is positive."""
        return partial(aten.threshold_backward.grad_input, delta, at, 0, grad_input=out)


class GELU(Activation[nn.GELU]):
    """``nn.GELU``, exact or in its tanh approximation: each unit times the Gaussian distribution function of it."""

    reads, function, derivative = "input", aten.gelu.out, aten.gelu_backward.grad_input

    def settings(self, module: nn.GELU) -> dict[str, Any]:
        """How it is approximated."""
        return {"approximate": module.approximate}


class Flatten(Kernel[nn.Flatten]):
    """``nn.Flatten()`` of a value to (batch, features)."""

    reads = "nothing"

    def accepts(self, module: nn.Flatten, shape: tuple[int, ...]) -> bool:
        """Whether all axes but the batch are flattened."""
        return (module.start_dim, module.end_dim) == (1, -1)

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The value, one axis per sample; a copy, since latents move in place while this is still read."""
        return value.flatten(1).clone() if out is None else out.copy_(value.flatten(1))

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta in the value's shape."""
        return delta.reshape(value.shape)


register(nn.Identity, Identity())
register(nn.Tanh, Tanh())
register(nn.ReLU, ReLU())
register(nn.GELU, GELU())
register(nn.Flatten, Flatten())

"""What takes each unit by itself: activations, gains, and what changes nothing but the shape."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

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


class Tanh(Kernel[nn.Tanh]):
    """``nn.Tanh``."""

    stacks, reads, fills_out, elementwise = True, "output", True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The hyperbolic tangent of each unit."""
        return torch.tanh(value, out=out)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta · (1 − output²)."""
        if out is None:
            return _tensor(aten.tanh_backward(delta, output))
        return _tensor(aten.tanh_backward.grad_input(delta, output, grad_input=out))


class ReLU(Kernel[nn.ReLU]):
    """``nn.ReLU``."""

    stacks, reads, fills_out, elementwise = True, "output", True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Each unit, or 0 where it is negative."""
        return torch.clamp_min(value, 0, out=out)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta where the output is positive."""
        if out is None:
            return _tensor(aten.threshold_backward(delta, output, 0))
        return _tensor(aten.threshold_backward.grad_input(delta, output, 0, grad_input=out))


class GELU(Kernel[nn.GELU]):
    """``nn.GELU``, exact or in its tanh approximation."""

    stacks, reads, fills_out, elementwise = True, "input", True, True

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Each unit times the Gaussian distribution function of it."""
        if out is None:
            return _tensor(aten.gelu(value, approximate=call.module.approximate))
        return _tensor(aten.gelu.out(value, approximate=call.module.approximate, out=out))

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the derivative at the input."""
        how = call.module.approximate
        if out is None:
            return _tensor(aten.gelu_backward(delta, value, approximate=how))
        return _tensor(aten.gelu_backward.grad_input(delta, value, approximate=how, grad_input=out))


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


def _tensor(result: Tensor) -> Tensor:
    """What an ATen operation returns; their stubs leave it untyped."""
    return result


register(nn.Identity, Identity())
register(nn.Tanh, Tanh())
register(nn.ReLU, ReLU())
register(nn.GELU, GELU())
register(nn.Flatten, Flatten())

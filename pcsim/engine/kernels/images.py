"""Convolution and pooling of images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, owns, register

aten = torch.ops.aten


class Conv2d(Kernel[nn.Conv2d]):
    """``nn.Conv2d`` with zero padding, one at a time: each is large enough to fill the machine."""

    reads, products, memory_format = "nothing", True, torch.channels_last

    def accepts(self, module: nn.Conv2d, shape: tuple[int, ...]) -> bool:
        """Whether the padding is zeros, given in numbers."""
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return len(shape) == 3 and zeros and owns(module, "weight", "bias")

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The convolution, (batch, channels, height, width)."""
        own, weights = call.module, call.weights
        bias = weights.get("bias")
        return torch.conv2d(value, weights["weight"], bias, own.stride, own.padding, own.dilation, own.groups)

    @staticmethod
    def _backward(
        call: Call, delta: Tensor, value: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        own, weight = call.module, call.weights["weight"]
        settings = own.stride, own.padding, own.dilation, False, [0, 0], own.groups
        result: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
            delta, value, weight, [weight.shape[0]], *settings, wanted
        )
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """The transposed convolution of delta."""
        return self._backward(call, delta, value, (True, False, False))[0]

    def gradients(self, call: Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]) -> None:
        """Write the weights' gradient, and the bias's if there is one."""
        if max(call.module.kernel_size) < max(call.module.stride):
            # oneDNN writes past its memory there for images laid out channels last, on some processors.
            delta, value = delta.contiguous(), value.contiguous()
        _, weight, bias = self._backward(call, delta, value, (False, "weight" in out, "bias" in out))
        for name, gradient in (("weight", weight), ("bias", bias)):
            if name in out:
                torch.mul(gradient, factor, out=out[name])


class MaxPool2d(Kernel[nn.MaxPool2d]):
    """``nn.MaxPool2d``; the place of each window's winner is kept for the messages."""

    reads = "nothing"

    def accepts(self, module: nn.MaxPool2d, shape: tuple[int, ...]) -> bool:
        """Whether it pools images and returns no indices."""
        return len(shape) == 3 and not module.return_indices

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The largest value of each window."""
        saved, window = call.saved, _window(call.module)
        if out is not None and "indices" in saved:
            aten.max_pool2d_with_indices.out(value, *window, out=out, indices=saved["indices"])
            return out
        result: tuple[Tensor, Tensor] = aten.max_pool2d_with_indices(value, *window)
        pooled, saved["indices"] = result
        return pooled

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta at the largest value of each window, 0 elsewhere."""
        settings = (*_window(call.module), call.saved["indices"])
        backward = aten.max_pool2d_with_indices_backward
        result: Tensor = (
            backward(delta, value, *settings)
            if out is None
            else backward.grad_input(delta, value, *settings, grad_input=out)
        )
        return result


def _window(module: nn.MaxPool2d) -> tuple[list[int], list[int], list[int], list[int], bool]:
    def pair(size: int | tuple[int, ...]) -> list[int]:
        return [size, size] if isinstance(size, int) else list(size)

    stride = module.kernel_size if module.stride is None else module.stride
    return pair(module.kernel_size), pair(stride), pair(module.padding), pair(module.dilation), module.ceil_mode


register(nn.Conv2d, Conv2d())
register(nn.MaxPool2d, MaxPool2d())

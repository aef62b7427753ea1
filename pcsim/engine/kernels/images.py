"""Convolution and pooling of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, Saved, owns, register

aten = torch.ops.aten


Convolving = TypeVar("Convolving", nn.Conv2d, nn.ConvTranspose2d)


class Convolution(Kernel[Convolving]):
    """Base class of convolutions with zero padding, one at a time: each is large enough to fill the machine."""

    reads, products = "nothing", True

    def accepts(self, module: Convolving, shape: tuple[int, ...]) -> bool:
        """Whether it takes images, and the padding is zeros, given in numbers."""
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return len(shape) == 3 and zeros and owns(module, "weight", "bias")

    @staticmethod
    def _backward(
        call: Call, delta: Tensor, value: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        own, weight = call.module, call.weights["weight"]
        if own.transposed or (not wanted[0] and max(own.kernel_size) < max(own.stride)):
            # For weights, oneDNN writes past its memory there for images laid out channels last, on some processors.
            delta, value = delta.contiguous(), value.contiguous()
        settings = own.stride, own.padding, own.dilation, own.transposed, own.output_padding, own.groups
        result: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
            delta, value, weight, [own.out_channels], *settings, wanted
        )
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """The transposed convolution of delta; of a transposed one, the convolution."""
        return self._backward(call, delta, value, (True, False, False))[0]

    def gradients(self, call: Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]) -> None:
        """Write the weights' gradient, and the bias's if there is one."""
        _, weight, bias = self._backward(call, delta, value, (False, "weight" in out, "bias" in out))
        for name, gradient in (("weight", weight), ("bias", bias)):
            if name in out:
                torch.mul(gradient, factor, out=out[name])


class Conv2d(Convolution[nn.Conv2d]):
    """``nn.Conv2d``."""

    memory_format = torch.channels_last

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The convolution, (batch, channels, height, width)."""
        own, weights = call.module, call.weights
        bias = weights.get("bias")
        return torch.conv2d(value, weights["weight"], bias, own.stride, own.padding, own.dilation, own.groups)


class ConvTranspose2d(Convolution[nn.ConvTranspose2d]):
    """``nn.ConvTranspose2d``."""

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The transposed convolution, (batch, channels, height, width)."""
        own, weights = call.module, call.weights
        settings = own.stride, own.padding, own.output_padding, own.groups, own.dilation
        return torch.conv_transpose2d(value, weights["weight"], weights.get("bias"), *settings)


class MaxPool2d(Kernel[nn.MaxPool2d]):
    """``nn.MaxPool2d``; the place of each window's winner is kept for the messages."""

    reads = "nothing"

    def accepts(self, module: nn.MaxPool2d, shape: tuple[int, ...]) -> bool:
        """Whether it pools images and returns no indices."""
        return len(shape) == 3 and not module.return_indices

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The largest value of each window."""
        pooled, indices = pool(call.module, value, out)
        keep_indices(call.saved, indices, value)
        return pooled

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta at the largest value of each window, 0 elsewhere."""
        settings = (*_window(call.module), call.saved["indices"].long())
        backward = aten.max_pool2d_with_indices_backward
        result: Tensor = (
            backward(delta, value, *settings)
            if out is None
            else backward.grad_input(delta, value, *settings, grad_input=out)
        )
        return result


def pool(module: nn.MaxPool2d, images: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest value of each window, in ``out`` if that is given, and its place in its channel."""
    if out is None:
        made: tuple[Tensor, Tensor] = aten.max_pool2d_with_indices(images, *_window(module))
        return made
    indices = torch.empty_like(out, dtype=torch.long)
    aten.max_pool2d_with_indices.out(images, *_window(module), out=out, indices=indices)
    return out, indices


def keep_indices(saved: Saved, indices: Tensor, images: Tensor) -> None:
    """Keep places in a channel of such images, in a quarter of the bytes where that is enough to number them."""
    kept = saved.get("indices")
    if kept is not None and kept.shape == indices.shape:
        kept.copy_(indices)
        return
    count = images.shape[-2] * images.shape[-1]
    saved["indices"] = indices.to(torch.int16 if count <= 2**15 else torch.int32)


class AvgPool2d(Kernel[nn.AvgPool2d]):
    """``nn.AvgPool2d``."""

    reads, fills_out = "nothing", True

    def accepts(self, module: nn.AvgPool2d, shape: tuple[int, ...]) -> bool:
        """Whether it pools images."""
        return len(shape) == 3

    @staticmethod
    def _settings(module: nn.AvgPool2d) -> tuple[object, ...]:
        window = (_pair(size) for size in (module.kernel_size, module.stride, module.padding))
        return *window, module.ceil_mode, module.count_include_pad, module.divisor_override

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The mean of each window."""
        settings, pool = self._settings(call.module), aten.avg_pool2d
        result: Tensor = pool(value, *settings) if out is None else pool.out(value, *settings, out=out)
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta spread over the windows; of the value only the shape counts."""
        settings, backward = self._settings(call.module), aten.avg_pool2d_backward
        result: Tensor = (
            backward(delta, value, *settings)
            if out is None
            else backward.grad_input(delta, value, *settings, grad_input=out)
        )
        return result


def _pair(size: int | tuple[int, ...]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _window(module: nn.MaxPool2d) -> tuple[list[int], list[int], list[int], list[int], bool]:
    stride = module.kernel_size if module.stride is None else module.stride
    sizes = module.kernel_size, stride, module.padding, module.dilation
    kernel, step, padding, dilation = map(_pair, sizes)
    return kernel, step, padding, dilation, module.ceil_mode


register(nn.Conv2d, Conv2d())
register(nn.ConvTranspose2d, ConvTranspose2d())
register(nn.MaxPool2d, MaxPool2d())
register(nn.AvgPool2d, AvgPool2d())

"""Average pooling of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, register

aten = torch.ops.aten


class AvgPool2d(Kernel[nn.AvgPool2d]):
    """``nn.AvgPool2d``."""

    reads, fills_out = "nothing", True

    def accepts(self, module: nn.AvgPool2d, shape: tuple[int, ...]) -> bool:
        """Whether it pools images."""
        return len(shape) == 3

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The mean of each window."""
        window = _window(call.module)
        result: Tensor = (
            aten.avg_pool2d(value, *window) if out is None else aten.avg_pool2d.out(value, *window, out=out)
        )
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta spread over the windows."""
        window, backward = _window(call.module), aten.avg_pool2d_backward
        # Of the value only the shape counts.
        result: Tensor = (
            backward(delta, value, *window)
            if out is None
            else backward.grad_input(delta, value, *window, grad_input=out)
        )
        return result


def _window(module: nn.AvgPool2d) -> tuple[list[int], list[int], list[int], bool, bool, int | None]:
    def pair(size: int | tuple[int, ...]) -> list[int]:
        return [size, size] if isinstance(size, int) else list(size)

    kernel, stride, padding = module.kernel_size, module.stride, module.padding
    return (
        pair(kernel),
        pair(stride),
        pair(padding),
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


register(nn.AvgPool2d, AvgPool2d())

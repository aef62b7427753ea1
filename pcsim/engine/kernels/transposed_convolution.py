"""Transposed convolution of images, as generative networks have it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, owns, register

aten = torch.ops.aten


class ConvTranspose2d(Kernel[nn.ConvTranspose2d]):
    """``nn.ConvTranspose2d``, one at a time."""

    reads, products = "nothing", True

    def accepts(self, module: nn.ConvTranspose2d, shape: tuple[int, ...]) -> bool:
        """Whether it takes images."""
        return len(shape) == 3 and module.padding_mode == "zeros" and owns(module, "weight", "bias")

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The transposed convolution, (batch, channels, height, width)."""
        own, weights = call.module, call.weights
        settings = own.stride, own.padding, own.output_padding, own.groups, own.dilation
        return torch.conv_transpose2d(value, weights["weight"], weights.get("bias"), *settings)

    @staticmethod
    def _backward(
        call: Call, delta: Tensor, value: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        own, weight = call.module, call.weights["weight"]
        settings = own.stride, own.padding, own.dilation, True, own.output_padding, own.groups
        result: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
            delta.contiguous(), value.contiguous(), weight, [own.out_channels], *settings, wanted
        )
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """The convolution of delta."""
        return self._backward(call, delta, value, (True, False, False))[0]

    def gradients(self, call: Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]) -> None:
        """Write the weights' gradient, and the bias's if there is one."""
        _, weight, bias = self._backward(call, delta, value, (False, "weight" in out, "bias" in out))
        for name, gradient in (("weight", weight), ("bias", bias)):
            if name in out:
                torch.mul(gradient, factor, out=out[name])


register(nn.ConvTranspose2d, ConvTranspose2d())

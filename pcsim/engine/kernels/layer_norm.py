"""``nn.LayerNorm``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, owns, register

aten = torch.ops.aten


class LayerNorm(Kernel[nn.LayerNorm]):
    """``nn.LayerNorm``; mean and deviation of each row are kept for the messages."""

    reads = "input"

    def accepts(self, module: nn.LayerNorm, shape: tuple[int, ...]) -> bool:
        """Whether values end in the shape that is normalised."""
        last = tuple(module.normalized_shape)
        return shape[len(shape) - len(last) :] == last and owns(module, "weight", "bias")

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Each row less its mean, over its deviation, times weight plus bias."""
        own, saved = call.module, call.saved
        result: tuple[Tensor, Tensor, Tensor] = aten.native_layer_norm(value, *_affine(call), own.eps)
        normal, saved["mean"], saved["inverse deviation"] = result
        return normal

    @staticmethod
    def _backward(call: Call, delta: Tensor, value: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        shape, weight, bias = _affine(call)
        statistics = call.saved["mean"], call.saved["inverse deviation"]
        result: tuple[Tensor, Tensor, Tensor] = aten.native_layer_norm_backward(
            delta.contiguous(), value.contiguous(), shape, *statistics, weight, bias, wanted
        )
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta pulled back, through the row's own mean and deviation as well."""
        return self._backward(call, delta, value, [True, False, False])[0]

    def gradients(self, call: Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]) -> None:
        """Write the gradients of weight and bias."""
        _, weight, bias = self._backward(call, delta, value, [False, "weight" in out, "bias" in out])
        for name, gradient in (("weight", weight), ("bias", bias)):
            if name in out:
                torch.mul(gradient, factor, out=out[name])


def _affine(call: Call) -> tuple[list[int], Tensor | None, Tensor | None]:
    return list(call.module.normalized_shape), call.weights.get("weight"), call.weights.get("bias")


register(nn.LayerNorm, LayerNorm())

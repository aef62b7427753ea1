"""Normalisation over the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, owns, register

aten = torch.ops.aten

Normalising: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d


class BatchNorm(Kernel[Normalising]):
    """``nn.BatchNorm1d`` and ``nn.BatchNorm2d``.

    In training mode with the statistics of the batch at hand, which are kept for the messages (arXiv 2506.23800,
    Eq. 6); in evaluation mode with the running ones.
    """

    reads = "input"

    def accepts(self, module: Normalising, shape: tuple[int, ...]) -> bool:
        """Whether values have as many axes as the module takes."""
        axes = (3,) if isinstance(module, nn.BatchNorm2d) else (1, 2)
        return len(shape) in axes and owns(module, "weight", "bias")

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Each channel less its mean, over its deviation, times weight plus bias."""
        own, weights, saved = call.module, call.weights, call.saved
        result: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm(
            value, weights.get("weight"), weights.get("bias"), *_running(own), _by_batch(own), 0.0, own.eps
        )
        normal, saved["mean"], saved["inverse deviation"] = result
        return normal

    @staticmethod
    def _backward(call: Call, delta: Tensor, value: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        own, saved = call.module, call.saved
        statistics = *_running(own), saved["mean"], saved["inverse deviation"]
        result: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm_backward(
            delta, value, call.weights.get("weight"), *statistics, _by_batch(own), own.eps, wanted
        )
        return result

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta pulled back, through the batch's own mean and deviation as well."""
        return self._backward(call, delta, value, [True, False, False])[0]

    def gradients(self, call: Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]) -> None:
        """Write the gradients of weight and bias."""
        _, weight, bias = self._backward(call, delta, value, [False, True, True])
        for name, gradient in (("weight", weight), ("bias", bias)):
            if name in out:
                torch.mul(gradient, factor, out=out[name])


def _by_batch(module: Normalising) -> bool:
    return module.training or module.running_mean is None


def _running(module: Normalising) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if _by_batch(module) else (module.running_mean, module.running_var)


register(nn.BatchNorm1d, BatchNorm())
register(nn.BatchNorm2d, BatchNorm())

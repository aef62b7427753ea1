"""An activation and the pooling after it, as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.images import MaxPool2d
from pcsim.engine.kernels.kernel import Call, Kernel


class PooledActivation(Kernel[nn.Sequential]):
    """An activation of images, followed by ``nn.MaxPool2d``.

    Where an activation never falls, the largest value of a window has the largest input; where it first falls and then
    rises, the largest input or the smallest. So pooling comes first, and the activation, as its derivative, is computed
    of the pooled images, with a quarter of the units where windows are 2x2; no image before the pooling is kept.

    Args:
        activation: the kernel of the module's first part.
        pooling: the kernel of its second.
    """

    forgets = True

    def __init__(self, activation: Activation[Any], pooling: MaxPool2d) -> None:
        self._activation, self._pooling = activation, pooling
        self.reads = "output" if activation.reads == "output" else "nothing"  # type: ignore[misc]

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The largest activation of each window."""
        activate, saved = Call(call.module[0], {}, {}, call.products), call.saved
        saved["image"] = value.new_empty(()).expand(value.shape)
        largest = self._pooling.forward(Call(call.module[1], {}, saved), value, saved.get("largest"))
        if self._activation.reads == "input":
            saved["largest"] = largest
        pooled = self._activation.forward(activate, largest, out)
        if self._activation.rises(call.module[0]):
            return pooled
        among: dict[str, Tensor] = {}
        value.neg_()  # and back, which leaves no trace, and takes no second image
        try:
            smallest = self._pooling.forward(Call(call.module[1], {}, among), value).neg_()
        finally:
            value.neg_()
        other = self._activation.forward(activate, smallest)
        chosen = torch.gt(other, pooled, out=torch.empty_like(pooled))  # 1 or 0, since torch.where takes far longer
        largest.lerp_(smallest, chosen)
        torch.where(chosen.bool(), among["indices"], saved["indices"], out=saved["indices"])
        return torch.maximum(pooled, other, out=pooled)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the derivative at the chosen unit of each window, 0 elsewhere."""
        chosen, image = call.saved.get("largest", output), call.saved["image"]
        pulled = self._activation.message(Call(call.module[0], {}, {}, call.products), delta, chosen, chosen)
        if out is None:
            last = not pulled.is_contiguous()
            layout = torch.channels_last if last else torch.contiguous_format
            out = torch.empty(image.shape, dtype=delta.dtype, device=delta.device, memory_format=layout)
        return self._pooling.message(Call(call.module[1], {}, call.saved), pulled, image, output, out)

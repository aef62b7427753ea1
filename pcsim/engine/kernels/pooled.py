"""An activation and the pooling after it, as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.images import MaxPool2d, keep_indices, pool
from pcsim.engine.kernels.kernel import Call, Kernel

ACTIVATED_PART, PULLED_PART = 2**20, 2**21
"""Bytes of the images that are activated at once, or reached by errors, where all of them are pooled."""


class PooledActivation(Kernel[nn.Sequential]):
    """An activation of images, followed by ``nn.MaxPool2d``.

    No image before the pooling is kept. Where an activation never falls, the largest value of a window has the largest
    input, so that pooling comes first, and the activation is computed of the pooled images, with a quarter of the units
    where windows are 2x2. So is the derivative of any activation. Of others a few images are activated at a time.

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
        by_input = self._activation.reads == "input"
        if self._activation.rises(call.module[0]):
            largest = self._pooling.forward(Call(call.module[1], {}, saved), value, saved.get("chosen"))
            if by_input:
                saved["chosen"] = largest
            return self._activation.forward(activate, largest, out)
        if out is None or "indices" not in saved:
            pooled, indices = pool(call.module[1], self._activation.forward(activate, value), out)
            keep_indices(saved, indices, value)
            if by_input:
                saved["chosen"] = _at(value, indices)
            return pooled
        for images, goal, kept, chosen in _parts(
            ACTIVATED_PART, value, out, saved["indices"], saved.get("chosen", out)
        ):
            _, indices = pool(call.module[1], self._activation.forward(activate, images), goal)
            kept.copy_(indices)
            if by_input:
                chosen.copy_(_at(images, indices))
        return out

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta times the derivative at the chosen unit of each window, 0 elsewhere."""
        chosen, image = call.saved.get("chosen", output), call.saved["image"]
        if out is None:
            last = not (delta.is_contiguous() and chosen.is_contiguous())
            layout = torch.channels_last if last else torch.contiguous_format
            out = torch.empty(image.shape, dtype=delta.dtype, device=delta.device, memory_format=layout)
        activate = Call(call.module[0], {}, {}, call.products)
        for images, own, at, indices, goal in _parts(PULLED_PART, image, delta, chosen, call.saved["indices"], out):
            pulled = self._activation.message(activate, own, at, at)
            self._pooling.message(Call(call.module[1], {}, {"indices": indices}), pulled, images, own, goal)
        return out


def _parts(largest: int, images: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Images of so many bytes at most at a time, and what belongs to the same samples."""
    count = min(len(images), -(-images.numel() * images.element_size() // largest))
    return zip(*(tensor.tensor_split(count) for tensor in (images, *others)), strict=True)


def _at(images: Tensor, indices: Tensor) -> Tensor:
    """The units of each channel at these places in it, (batch, channels, rows, columns)."""
    if images.is_contiguous():
        return images.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
    images, places = images.permute(0, 2, 3, 1), indices.permute(0, 2, 3, 1)
    found = images.flatten(1, 2).gather(1, places.flatten(1, 2))
    return found.view(places.shape).permute(0, 3, 1, 2)

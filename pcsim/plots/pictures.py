"""Pictures of what nodes hold and of what edges have learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pcsim.errors import SettingError
from pcsim.plots.style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

PICTURE_WIDTH, TITLE_HEIGHT = 0.8, 0.25
"""In inches."""


def images(
    pictures: Tensor,
    *,
    titles: Sequence[str] = (),
    columns: int | None = None,
    signed: bool = False,
    figure: FigureBase | None = None,
) -> FigureBase:
    """Pictures side by side, in grey: images of a batch, samples, or the features that weights have learned.

    Args:
        pictures: (N, height, width); of a linear edge into an image, ``module.weight.T.unflatten(1, (height, width))``.
        titles: one above each picture, or none.
        columns: pictures abreast, at least 1; about a square of all by default.
        signed: each on a scale of its own, from black for its most negative over grey for zero to white; otherwise all
            on one scale, from the smallest number to the largest.
        figure: where to draw; a new figure by default.

    Raises:
        SettingError: there is no picture, its shape is another one, or titles or columns do not fit.
        PCError: matplotlib is missing.
    """
    if pictures.dim() != 3 or not pictures.numel():
        raise SettingError(f"images: pictures of shape {tuple(pictures.shape)} given, expected (N, height, width)")
    if len(titles) not in (0, len(pictures)):
        raise SettingError(f"images: {len(titles)} titles given, expected one for each of {len(pictures)} pictures")
    if columns is not None and columns < 1:
        raise SettingError(f"images: columns={columns} given, expected at least 1")
    shown = pictures.detach().float().cpu()
    count, height, width = shown.shape
    abreast = min(columns or math.ceil(math.sqrt(count * height / width)), count)
    rows = -(-count // abreast)
    if figure is None:
        high = PICTURE_WIDTH * height / width + (TITLE_HEIGHT if titles else 0)
        figure = new_figure(PICTURE_WIDTH * abreast + 0.3, high * rows + 0.3)
    panels = list(figure.subplots(rows, abreast, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for k, (axes, picture) in enumerate(zip(panels, shown, strict=False)):
        scale = float(picture.abs().max())
        low, high = (-scale, scale) if signed else (float(shown.min()), float(shown.max()))
        axes.imshow(picture.numpy(), cmap="gray", vmin=low, vmax=high)
        if titles:
            axes.set_title(titles[k], fontsize=9)
    return figure

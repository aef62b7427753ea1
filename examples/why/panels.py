"""One figure for several settings: a panel each, and a line for each method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from comparing import STYLES, save

from pcsim import plots

Curve = Callable[[str, str], tuple[Iterable[float], Iterable[float]]]


def draw_panels(
    settings: Sequence[str], methods: Sequence[str], curve: Curve, labels: tuple[str, str], width: float, path: Path
) -> None:
    """Draw curves of values from 0 to 1, and write the figure.

    Args:
        settings: titles of the panels.
        methods: names of the lines.
        curve: of a setting and a method, where and how high.
        labels: of both axes.
        width: of the figure, in inches.
        path: as PNG or SVG says.
    """
    figure = plots.new_figure(width, 3)
    for axes, setting in zip(figure.subplots(1, len(settings), sharey=True), settings, strict=True):
        for method, (colour, _, dashes) in zip(methods, STYLES, strict=False):
            axes.plot(*curve(setting, method), label=method, color=colour, linestyle=dashes)
        axes.set(xlabel=labels[0], title=setting, ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(labels[1])
    figure.axes[0].legend(frameon=False)
    save(figure, path)

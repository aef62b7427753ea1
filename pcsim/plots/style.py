"""What figures share: an empty one that needs no display, lines by title, and colours that everybody tells apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pcsim.errors import PCError, SettingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

# Okabe and Ito's palette, which colour-blind readers tell apart, with markers and dashes for grey printers.
LINES = (
    ("#000000", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#E69F00", "^", ":"),
    ("#0072B2", "D", "-"),
    ("#56B4E9", "v", "--"),
    ("#009E73", "P", "-."),
    ("#CC79A7", "X", ":"),
    ("#332288", "*", "--"),
    ("#882255", "p", "-."),
    ("#117733", "<", "-"),
    ("#8C510A", ">", ":"),
    ("#777777", "h", "--"),
)
# Fill and outline: tints and shades of Okabe and Ito's colours. The outline stays where energy gives the fill.
KIND_COLOURS = {
    "latent": ("#D3EAF8", "#0072B2"),
    "deterministic": ("#F0F0F0", "#555555"),
    "auxiliary": ("#FBE3B3", "#B87800"),
    "clamped": ("#BFE8DA", "#006B4E"),
}
FORWARD = "#333333"
BACK = "#D55E00"
UNREACHED = "#DDDDDD"
DECADES = 10


def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """An empty figure; its ``savefig`` writes PNG, SVG or PDF.

    Args:
        width: inches, > 0.
        height: inches, > 0.

    Raises:
        PCError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PCError("plots need matplotlib: pip install 'pcsim[examples]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def lines(curves: Mapping[str, Sequence[tuple[int, float]]], figure: FigureBase | None) -> tuple[FigureBase, Any]:
    """One line per title, each with a colour, marker and dashes of its own: the figure, and its axes.

    Args:
        curves: points (x, y) by title.
        figure: where to draw; None makes a new one.

    Raises:
        SettingError: there is no curve.
        PCError: matplotlib is missing.
    """
    if not curves:
        raise SettingError("nothing given to draw, expected at least one curve by its title")
    figure = new_figure() if figure is None else figure
    axes = figure.subplots()
    for number, (title, curve) in enumerate(curves.items()):
        colour, marker, dashes = LINES[number % len(LINES)]
        axes.plot([x for x, _ in curve], [y for _, y in curve], label=title, color=colour, marker=marker,
                  linestyle=dashes, markersize=4)  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure, axes

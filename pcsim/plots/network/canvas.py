"""What is drawn of a network by matplotlib: boxes, edges, frames and the legend. Imported only once it is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import BoxStyle, FancyArrowPatch, PathPatch
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

from pcsim.plots.network.folding import KINDS, Box, Diagram
from pcsim.plots.network.layout import Frame, Line, label_lines
from pcsim.plots.style import BACK, DECADES, FORWARD, KIND_COLOURS, UNREACHED

BACK_DASHES = (0, (4, 2))
TEXT, ARROW = 8.0, 8.0
"""Sizes in points, where an inch of the layout is an inch of the figure."""

ROUNDING = 0.13


def energy_fills(figure: FigureBase, axes: Axes, energies: Sequence[float]) -> list[Any]:
    """A colour for each energy, of which one is above zero, by a logarithmic scale that is shown below the axes."""
    positive = [energy for energy in energies if energy > 0]
    largest = max(positive)
    least = max(min(positive), largest * 10.0**-DECADES) * (1 - 1e-6)
    colours = ScalarMappable(LogNorm(least, largest), colormaps["viridis"])
    bar = figure.colorbar(colours, ax=axes, label="energy per sample", location="bottom", shrink=0.5, aspect=40)
    ticks = [least, math.sqrt(least * largest), largest]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks], minor=False)
    bar.minorticks_off()
    shades = colours.to_rgba(np.array(energies))
    return [shade if energy > 0 else UNREACHED for shade, energy in zip(shades, energies, strict=True)]


def _outline(kind: str, width: float, height: float) -> Path:
    """The shape of a kind of node around the origin."""
    x, y = width / 2, height / 2
    if kind == "latent":
        return BoxStyle.Round(pad=0, rounding_size=ROUNDING)(-x, -y, width, height, 1)
    if kind == "auxiliary":
        return Path.unit_circle().transformed(Affine2D().scale(x, 1.15 * y))
    cut = 0.3 * height if kind == "clamped" else 0.0
    corners = [(x - cut, y), (x, y - cut), (x, cut - y), (x - cut, -y)]
    return Path([*corners, *((-a, b) for a, b in reversed(corners)), corners[0]], closed=True)


def draw_box(axes: Axes, box: Box, centre: tuple[float, float], size: tuple[float, float], fill: Any) -> None:
    """One node: its outline, name and shape."""
    shape = _outline(box.kind, *size).transformed(Affine2D().translate(*centre))
    axes.add_patch(PathPatch(shape, facecolor=fill, edgecolor=KIND_COLOURS[box.kind][1], linewidth=1.6, zorder=3))
    red, green, blue = to_rgb(fill)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    text = "\n".join(label_lines(box))
    axes.text(*centre, text, ha="center", va="center", color="white" if dark else "black", parse_math=False, zorder=4)


def draw_line(axes: Axes, line: Line) -> None:
    """One edge, with the number that it stands for where there are several."""
    colour, dashes = (BACK, BACK_DASHES) if line.back else (FORWARD, "solid")
    axes.add_patch(
        FancyArrowPatch(path=_rounded(line.points), arrowstyle="-|>", mutation_scale=ARROW, color=colour,
                        linestyle=dashes, linewidth=1.0, capstyle="butt", joinstyle="miter", zorder=2)
    )  # fmt: skip
    if line.count > 1:
        middle = len(line.points) // 2
        (a, b), (c, d) = line.points[middle - 1], line.points[middle]
        _annotate(axes, ((a + c) / 2, (b + d) / 2), f"×{line.count}", colour)


def draw_frame(axes: Axes, frame: Frame) -> None:
    """The frame of a block, with the number of its copies."""
    left, right, bottom, top = frame.left, frame.right, frame.bottom, frame.top
    corners = [(left, bottom), (left, top), (right, top), (right, bottom), (left, bottom)]
    axes.add_patch(
        PathPatch(Path(corners, closed=True), facecolor="#F7F7F7", edgecolor="#888888", linestyle=":", zorder=1)
    )
    _annotate(axes, ((left + right) / 2, bottom), f"× {frame.copies:,}", "black", weight="bold", va="top")


def _annotate(axes: Axes, place: tuple[float, float], text: str, colour: str, **options: Any) -> None:
    space = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    options = {"va": "center", **options}
    axes.text(*place, text, ha="center", color=colour, bbox=space, zorder=5, **options)


def _rounded(points: Sequence[tuple[float, float]]) -> Path:
    """A way with its corners rounded, by a quadratic curve each."""
    vertices, codes = [points[0]], [Path.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        for end in (before, after):
            length = max(1e-9, abs(end[0] - corner[0]) + abs(end[1] - corner[1]))
            share = min(0.5, ROUNDING / length)
            vertices.append((corner[0] + share * (end[0] - corner[0]), corner[1] + share * (end[1] - corner[1])))
            if end is before:
                vertices.append(corner)
        codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
    return Path([*vertices, points[-1]], [*codes, Path.LINETO])


def draw_legend(figure: FigureBase, shown: Diagram) -> None:
    """What shapes, colours and dashes say, of those that are there."""
    present = {box.kind for box in shown.boxes}
    handles = [
        Line2D([], [], linestyle="none", marker=_outline(kind, 2, 1), markersize=18, label=kind,
               markerfacecolor=KIND_COLOURS[kind][0], markeredgecolor=KIND_COLOURS[kind][1])
        for kind in KINDS if kind in present
    ]  # fmt: skip
    if any(arrow.back for arrow in shown.arrows):
        handles.append(Line2D([], [], color=BACK, linestyle=BACK_DASHES, label="closes a cycle"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=TEXT)


def fit(figure: FigureBase, axes: Axes) -> None:
    """Give text and lines the size that goes with that of the boxes, whatever the figure's size."""
    whole: Any = figure.figure
    whole.draw_without_rendering()
    (left, _), (right, _) = axes.transData.transform([(0, 0), (1, 0)])
    scale = (right - left) / whole.dpi
    for text in axes.texts:
        text.set_fontsize(TEXT * scale)
    for patch in axes.patches:
        patch.set_linewidth(patch.get_linewidth() * scale)
        if isinstance(patch, FancyArrowPatch):
            patch.set_mutation_scale(ARROW * scale)

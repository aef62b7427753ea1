"""Figures that set methods side by side: accuracy against depth, and agreement with backprop's updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pcsim.errors import SettingError
from pcsim.plots.style import LINES, lines, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


def accuracy_by_depth(
    accuracies: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    chance: float | None = None,
    figure: FigureBase | None = None,
) -> FigureBase:
    """One line per method: mean accuracy against depth, with a bar from the worst to the best run.

    Args:
        accuracies: by method, then by depth in edges: the accuracies, 0 to 1, of its runs, at least one.
        chance: accuracy of a guess, 0 to 1; None draws none.
        figure: where to draw; a new figure by default.

    Raises:
        SettingError: there is nothing to draw.
        PCError: matplotlib is missing.
    """
    if not any(accuracies.values()) or not all(runs for curve in accuracies.values() for runs in curve.values()):
        raise SettingError(f"accuracies {accuracies!r} given, expected at least one run for each method and depth")
    figure = new_figure() if figure is None else figure
    axes = figure.subplots()
    depths = sorted({depth for curve in accuracies.values() for depth in curve})
    for number, (method, curve) in enumerate(accuracies.items()):
        colour, marker, dashes = LINES[number % len(LINES)]
        own = sorted(curve)
        means = [sum(curve[depth]) / len(curve[depth]) for depth in own]
        # Side by side within a depth, since good methods agree to a percent and would hide each other.
        places = [depths.index(depth) + 0.05 * (number - (len(accuracies) - 1) / 2) for depth in own]
        axes.plot(places, means, label=method, color=colour, marker=marker, linestyle=dashes)
        axes.vlines(places, [min(curve[depth]) for depth in own], [max(curve[depth]) for depth in own], color=colour)
    if chance is not None:
        axes.axhline(chance, color="grey", linewidth=1, linestyle=(0, (1, 3)))
        axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey")
    axes.set(xlabel="depth (edges)", ylabel="test accuracy", ylim=(0, 1.03), xticks=range(len(depths)))
    axes.set_xticklabels([str(depth) for depth in depths])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def similarity_by_edge(
    similarities: Mapping[str, Mapping[str, float]], *, figure: FigureBase | None = None
) -> FigureBase:
    """One line per method: the cosine of each edge's update with backprop's, of ``diagnosis.update_similarity``.

    Args:
        similarities: by title, then by edge, in the order in which they are drawn.
        figure: where to draw; a new figure by default.

    Raises:
        SettingError: there is none.
        PCError: matplotlib is missing.
    """
    edges = list(dict.fromkeys(edge for own in similarities.values() for edge in own))
    points = {title: [(edges.index(edge), own[edge]) for edge in own] for title, own in similarities.items()}
    figure, axes = lines(points, figure)
    shown = range(0, len(edges), max(1, -(-len(edges) // 12)))
    axes.set(ylabel="cosine with backprop's update", ylim=(-1.05, 1.05), xticks=list(shown))
    axes.set_xticklabels([edges[place] for place in shown], rotation=30, ha="right")
    return figure

"""Figures: a network, accuracy against depth, and how energy spreads over its levels as it relaxes.

They need no display: each is drawn into a matplotlib figure of its own, or into a part of one that is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pcsim import diagnosis
from pcsim.drawing import draw, graphviz
from pcsim.errors import SettingError
from pcsim.figures import DECADES, LINES, UNREACHED, new_figure
from pcsim.looking import energy_over_steps, error_histograms
from pcsim.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

__all__ = [
    "LINES",
    "accuracy_by_depth",
    "draw",
    "energy_by_level",
    "energy_over_steps",
    "error_by_level",
    "error_front",
    "error_histograms",
    "graphviz",
    "imbalance_by_step",
    "new_figure",
    "similarity_by_edge",
]


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


def energy_by_level(traces: Mapping[str, Trace], *, figure: FigureBase | None = None) -> FigureBase:
    """One heat map per trace: energy of each level (0 is the target) at each inference step, on one log scale.

    Energies are those of :func:`pcsim.diagnosis.level_energies`. Exact zeros, where no error has arrived yet, are
    grey; at most ten decades are shown.

    Args:
        traces: recorded relaxations, by title.
        figure: where to draw; a new figure by default.

    Raises:
        SettingError: there is no trace, or no energy in any.
        StateError: a trace holds no energies.
        PCError: matplotlib is missing.
    """
    maps = {title: diagnosis.level_energies(trace) for title, trace in traces.items()}
    return _heat_maps(maps, "energy per sample", figure)


def error_by_level(traces: Mapping[str, Trace], *, figure: FigureBase | None = None) -> FigureBase:
    """The same of errors: :func:`pcsim.diagnosis.level_errors`."""
    maps = {title: diagnosis.level_errors(trace) for title, trace in traces.items()}
    return _heat_maps(maps, "error norm per sample", figure)


def _heat_maps(maps: Mapping[str, Tensor], label: str, figure: FigureBase | None) -> FigureBase:
    positive = [numbers[numbers > 0] for numbers in maps.values()]
    if not any(len(numbers) for numbers in positive):
        raise SettingError(f"traces {list(maps)} given, expected at least one with an energy above zero")
    figure = new_figure(height=3.2) if figure is None else figure
    from matplotlib.colors import LogNorm

    largest = max(numbers.max().item() for numbers in positive if len(numbers))
    least = min(numbers.min().item() for numbers in positive if len(numbers))
    scale = LogNorm(max(least, largest * 10.0**-DECADES) * (1 - 1e-6), largest)
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (title, numbers) in zip(panels, maps.items(), strict=True):
        shown = numbers.masked_fill(numbers <= 0, math.nan).T.numpy()
        axes.set_facecolor(UNREACHED)
        image = axes.pcolormesh(shown, norm=scale, cmap="viridis", rasterized=True)
        ticks_x, ticks_y = (range(0, size, max(1, -(-size // 10))) for size in numbers.shape)
        axes.set(title=title, xlabel="inference step", xticks=[x + 0.5 for x in ticks_x], xticklabels=list(ticks_x))
        axes.set(yticks=[y + 0.5 for y in ticks_y], yticklabels=list(ticks_y))
    panels[0].set_ylabel("level (hops from the target)")
    panels[0].annotate("no error yet", (0.04, 0.96), xycoords="axes fraction", va="top")
    figure.colorbar(image, ax=list(panels), label=label)
    return figure


def imbalance_by_step(traces: Mapping[str, Trace], *, figure: FigureBase | None = None) -> FigureBase:
    """One line per trace: the largest energy of a level over the smallest, at each step once all levels have some.

    Args:
        traces: recorded relaxations, by title.
        figure: where to draw; a new figure by default.

    Raises:
        SettingError: there is no trace.
        StateError: a trace holds no energies.
        PCError: matplotlib is missing.
    """
    curves = {title: diagnosis.imbalance(trace) for title, trace in traces.items()}
    points = {
        title: [(step, r) for step, r in enumerate(c.tolist()) if math.isfinite(r)] for title, c in curves.items()
    }
    figure, axes = _lines(points, figure)
    axes.set(xlabel="inference step", ylabel="largest / smallest energy of a level", yscale="log")
    return figure


def error_front(traces: Mapping[str, Trace], *, above: float = 0.0, figure: FigureBase | None = None) -> FigureBase:
    """One line per trace: the step at which an error arrives at each level (:func:`pcsim.diagnosis.arrivals`).

    Args:
        traces: recorded relaxations, by title.
        above: energy per sample that counts as an arrival.
        figure: where to draw; a new figure by default.

    Raises:
        SettingError: there is no trace.
        StateError: a trace holds no energies.
        PCError: matplotlib is missing.
    """
    fronts = {title: diagnosis.arrivals(trace, above=above) for title, trace in traces.items()}
    figure, axes = _lines({title: sorted(front.items()) for title, front in fronts.items()}, figure)
    axes.set(xlabel="level (hops from the target)", ylabel="step of arrival")
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
    figure, axes = _lines(points, figure)
    shown = range(0, len(edges), max(1, -(-len(edges) // 12)))
    axes.set(ylabel="cosine with backprop's update", ylim=(-1.05, 1.05), xticks=list(shown))
    axes.set_xticklabels([edges[place] for place in shown], rotation=30, ha="right")
    return figure


def _lines(points: Mapping[str, Sequence[tuple[int, float]]], figure: FigureBase | None) -> tuple[FigureBase, Any]:
    if not points:
        raise SettingError("nothing given to draw, expected at least one curve by its title")
    figure = new_figure() if figure is None else figure
    axes = figure.subplots()
    for number, (title, curve) in enumerate(points.items()):
        colour, marker, dashes = LINES[number % len(LINES)]
        axes.plot([x for x, _ in curve], [y for _, y in curve], label=title, color=colour, marker=marker,
                  linestyle=dashes, markersize=4)  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure, axes

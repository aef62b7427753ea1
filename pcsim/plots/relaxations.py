"""Figures of a relaxation, from its trace: energies and errors of the levels over the steps, and how they spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from pcsim import diagnosis
from pcsim.errors import SettingError
from pcsim.plots.style import DECADES, UNREACHED, lines, new_figure
from pcsim.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

MOST_NAMED_LEVELS = 8
"""More levels than these are told apart by a colour bar."""

DARK_PART = 0.9
"""Of the colour map, whose lightest part hardly shows on white."""


def energy_over_steps(trace: Trace, *, figure: FigureBase | None = None) -> FigureBase:
    """One line per level: its energy at each inference step, on a log scale, from the step at which it has any.

    Energies are those of :func:`pcsim.diagnosis.level_energies`; level 0 is the target.

    Args:
        trace: a recorded relaxation.
        figure: where to draw; a new figure by default.

    Raises:
        StateError: the trace holds no energies.
        SettingError: no node with an energy reaches a target, or no energy is above zero.
        PCError: matplotlib is missing.
    """
    energies = diagnosis.level_energies(trace)
    if not bool((energies > 0).any()):
        raise SettingError("trace without an energy above zero given, expected one of a relaxation that has an error")
    figure = new_figure() if figure is None else figure
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last = energies.shape[1] - 1
    colours, axes = colormaps["viridis"], figure.subplots()
    for level, curve in enumerate(energies.masked_fill(energies <= 0, math.nan).T.tolist()):
        if not all(map(math.isnan, curve)):
            shade = colours(DARK_PART * level / max(1, last))
            axes.plot(curve, color=shade, marker="o", markersize=3, label=f"level {level}")
    axes.set(xlabel="inference step", ylabel="energy per sample", yscale="log")
    axes.grid(alpha=0.3)
    if last < MOST_NAMED_LEVELS:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    else:
        scale = ScalarMappable(Normalize(0, last / DARK_PART), colours)
        figure.colorbar(scale, ax=axes, label="level (hops from the target)", boundaries=range(last + 2))
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
    figure, axes = lines(points, figure)
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
    figure, axes = lines({title: sorted(front.items()) for title, front in fronts.items()}, figure)
    axes.set(xlabel="level (hops from the target)", ylabel="step of arrival")
    return figure

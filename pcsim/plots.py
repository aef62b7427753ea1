"""Figures: accuracy against depth, and how energy spreads over the levels of a network as it relaxes.

They need no display: each is drawn into a matplotlib figure of its own, or into a part of one that is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcsim.errors import PCError, SettingError, StateError
from pcsim.simulator import Trace

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
)
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

    Energies are E_n before precision, summed over the nodes of a level (SPEC §2, Arrival) and averaged over the batch.
    Exact zeros, where no error has arrived yet, are grey; at most ten decades are shown.

    Args:
        traces: recorded relaxations, by title.
        figure: where to draw; a new figure by default.

    Raises:
        SettingError: there is no trace, or no energy in any.
        StateError: a trace holds no energies.
        PCError: matplotlib is missing.
    """
    maps = {title: level_energies(trace) for title, trace in traces.items()}
    positive = [energies[energies > 0] for energies in maps.values()]
    if not any(len(energies) for energies in positive):
        raise SettingError(f"traces {list(traces)} given, expected at least one with an energy above zero")
    figure = new_figure(height=3.2) if figure is None else figure
    from matplotlib.colors import LogNorm

    largest = max(energies.max().item() for energies in positive if len(energies))
    least = min(energies.min().item() for energies in positive if len(energies))
    scale = LogNorm(max(least, largest * 10.0**-DECADES) * (1 - 1e-6), largest)
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (title, energies) in zip(panels, maps.items(), strict=True):
        shown = energies.masked_fill(energies <= 0, math.nan).T.numpy()
        axes.set_facecolor(UNREACHED)
        image = axes.pcolormesh(shown, norm=scale, cmap="viridis", rasterized=True)
        ticks_x, ticks_y = (range(0, size, max(1, -(-size // 10))) for size in energies.shape)
        axes.set(title=title, xlabel="inference step", xticks=[x + 0.5 for x in ticks_x], xticklabels=list(ticks_x))
        axes.set(yticks=[y + 0.5 for y in ticks_y], yticklabels=list(ticks_y))
    panels[0].set_ylabel("level (hops from the target)")
    panels[0].annotate("no error yet", (0.04, 0.96), xycoords="axes fraction", va="top")
    figure.colorbar(image, ax=list(panels), label="energy per sample")
    return figure


def level_energies(trace: Trace) -> Tensor:
    """E_n summed over the nodes of a level and averaged over the batch, (steps + 1, levels), float64 on the CPU.

    Raises:
        StateError: the trace holds no energies.
        SettingError: no node with an energy reaches a target.
    """
    if trace.energies is None:
        raise StateError("this trace holds no energies: ask for them with infer(..., record=True)")
    reached = [index for index, name in enumerate(trace.nodes) if name in trace.levels]
    if not reached:
        raise SettingError("no node with an energy reaches a clamped target, so there are no levels; clamp a target")
    levels = torch.tensor([trace.levels[trace.nodes[index]] for index in reached])
    means = trace.energies.detach().to("cpu", torch.float64).mean(2)[:, reached]
    return means.new_zeros(len(means), int(levels.max()) + 1).index_add_(1, levels, means)

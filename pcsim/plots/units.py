"""Figures of single units over a relaxation, as one draws neurons: heat maps and rasters of what a probe recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcsim.engine.probe import PARTS
from pcsim.errors import SettingError
from pcsim.graph.node import Node
from pcsim.plots.style import new_figure
from pcsim.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


def unit_map(
    trace: Trace, node: Node | str, *, part: str = "error", sample: int = 0, figure: FigureBase | None = None
) -> FigureBase:
    """A heat map of a node's units (rows) against inference steps (columns), of one sample; white is zero.

    Args:
        trace: a relaxation of which the node was recorded, ``infer(..., record=[node])``.
        node: the node, or its name.
        part: "value", "prediction" or "error".
        sample: which of the batch.
        figure: where to draw; a new figure by default.

    Raises:
        StateError: that was not recorded.
        SettingError: there is no such part or sample.
        PCError: matplotlib is missing.
    """
    units = _units(trace, node, part, sample)
    figure = new_figure() if figure is None else figure
    from matplotlib.colors import CenteredNorm

    axes = figure.subplots()
    image = axes.pcolormesh(
        units.T.numpy(), norm=CenteredNorm(halfrange=_largest(units)), cmap="RdBu_r", rasterized=True
    )
    _label(axes, units, trace, node)
    figure.colorbar(image, ax=axes, label=part)
    return figure


def unit_raster(
    trace: Trace,
    node: Node | str,
    *,
    part: str = "error",
    above: float | None = None,
    sample: int = 0,
    figure: FigureBase | None = None,
) -> FigureBase:
    """A raster of a node's units (rows) against inference steps (columns): a mark where a unit is large in size.

    Args:
        trace: a relaxation of which the node was recorded, ``infer(..., record=[node])``.
        node: the node, or its name.
        part: "value", "prediction" or "error".
        above: size above which there is a mark, ≥ 0; half of the largest by default.
        sample: which of the batch.
        figure: where to draw; a new figure by default.

    Raises:
        StateError: that was not recorded.
        SettingError: there is no such part or sample, or ``above`` is negative.
        PCError: matplotlib is missing.
    """
    units = _units(trace, node, part, sample)
    if above is not None and not above >= 0:
        raise SettingError(f"above={above} given, expected a size of at least 0")
    threshold = _largest(units) / 2 if above is None else above
    figure = new_figure() if figure is None else figure
    axes = figure.subplots()
    large = units.abs() > threshold
    steps = [[step + 0.5 for step in row.nonzero().flatten().tolist()] for row in large.T]
    axes.eventplot(steps, lineoffsets=[row + 0.5 for row in range(len(steps))], linelengths=0.9, colors="black")
    _label(axes, units, trace, node)
    axes.set_title(f"|{part}| > {threshold:.3g}")
    return figure


def _units(trace: Trace, node: Node | str, part: str, sample: int) -> Tensor:
    """One sample's units at every step, (steps + 1, units)."""
    if part not in PARTS:
        raise SettingError(f"part={part!r} given, expected one of {', '.join(PARTS)}")
    recorded: Tensor = getattr(trace, part)(node)
    if not -recorded.shape[1] <= sample < recorded.shape[1]:
        raise SettingError(f"sample={sample} given, but the batch has {recorded.shape[1]}")
    return recorded[:, sample].flatten(1).detach().to("cpu", torch.float64)


def _largest(units: Tensor) -> float:
    return max(units.abs().max().item(), torch.finfo(units.dtype).tiny)


def _label(axes: object, units: Tensor, trace: Trace, node: Node | str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    steps, count = units.shape
    name = node if isinstance(node, str) else node.name
    axes.set(xlabel="inference step", ylabel=f"unit of {name}", xlim=(0, steps), ylim=(0, count))
    chosen = trace.recordings[name].units or tuple((unit,) for unit in range(count))
    names = [", ".join(map(str, place)) for place in chosen]
    for axis, labels in ((axes.xaxis, list(map(str, range(steps)))), (axes.yaxis, names)):
        ticks = range(0, len(labels), max(1, -(-len(labels) // 10)))
        axis.set_ticks([tick + 0.5 for tick in ticks], labels=[labels[tick] for tick in ticks])

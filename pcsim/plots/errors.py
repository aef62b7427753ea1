"""Figures of the errors that a network holds after a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pcsim.errors import SettingError
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.plots.style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

MOST_PANELS = 16
PANELS_ABREAST = 4


def error_histograms(
    network: Network,
    *,
    by: Literal["level", "node"] = "level",
    levels: Mapping[str, int] | None = None,
    bins: int = 40,
    figure: FigureBase | None = None,
) -> FigureBase:
    """One panel per level or node: how many units of how many samples have which error ε after a run.

    Each panel has its own scale, since errors shrink by orders of magnitude with depth, and tells the root mean
    square. Of more than sixteen panels, sixteen are drawn, evenly chosen, the first and the last among them.

    Args:
        network: after a run; nodes without an error of their own (deterministic or predicted by nothing) are left out.
        by: one panel for each "level", the target's first, or for each "node".
        levels: by node name, such as ``trace.levels``; by default they are counted from the network's sinks.
        bins: of each panel, at least 1.
        figure: where to draw; a new figure by default.

    Raises:
        StateError: there has been no run.
        SettingError: an argument is out of its range, or no node has an error.
        PCError: matplotlib is missing.
    """
    if by not in ("level", "node") or bins < 1:
        raise SettingError(
            f"error_histograms: by={by!r}, bins={bins} given, expected 'level' or 'node', and at least one bin"
        )
    members = _nodes_by_level(network, levels) if by == "level" else _nodes_by_name(network)
    if not members:
        raise SettingError("error_histograms: no node of the network has an error and a level; predict some node")
    errors = {title: _errors(nodes) for title, nodes in _evenly_chosen(members).items()}
    abreast = min(PANELS_ABREAST, len(errors))
    rows = -(-len(errors) // abreast)
    figure = new_figure(2.4 * abreast + 0.6, 1.9 * rows + 0.3) if figure is None else figure
    panels = list(figure.subplots(rows, abreast, squeeze=False).flat)
    for axes, (title, own) in zip(panels, errors.items(), strict=False):
        reach = own.abs().max().item() or 1.0
        axes.hist(own.numpy(), bins=bins, range=(-reach, reach), color="#0072B2")
        axes.axvline(0.0, color="#555555", linewidth=0.8)
        axes.set_title(f"{title}, rms {own.square().mean().sqrt():.2g}", fontsize=9, parse_math=False)
        axes.tick_params(labelsize=7)
        axes.ticklabel_format(axis="x", scilimits=(-2, 3))
        axes.xaxis.get_offset_text().set_fontsize(7)
        axes.locator_params(axis="x", nbins=4)
    for axes in panels[len(errors) :]:
        axes.set_axis_off()
    figure.supxlabel("error ε", fontsize=9)
    figure.supylabel("units of samples", fontsize=9)
    return figure


def _nodes_by_name(network: Network) -> dict[str, list[Node]]:
    return {name: [node] for name, node in network.nodes.items() if node.predicted and not node.deterministic}


def _nodes_by_level(network: Network, levels: Mapping[str, int] | None) -> dict[str, list[Node]]:
    levels = network.levels() if levels is None else levels
    members: dict[int, list[Node]] = {}
    for name, (node,) in _nodes_by_name(network).items():
        if name in levels:
            members.setdefault(levels[name], []).append(node)
    return {f"level {level}": members[level] for level in sorted(members)}


def _evenly_chosen(members: Mapping[str, Sequence[Node]]) -> dict[str, Sequence[Node]]:
    titles = list(members)
    if len(titles) > MOST_PANELS:
        titles = [titles[round(place * (len(titles) - 1) / (MOST_PANELS - 1))] for place in range(MOST_PANELS)]
    return {title: members[title] for title in titles}


def _errors(nodes: Sequence[Node]) -> Tensor:
    """The errors of all units of all samples, flat, float64 on the CPU."""
    return torch.cat([node.error.detach().to("cpu", torch.float64).flatten() for node in nodes])

"""A network drawn by matplotlib, in a figure or as SVG: its columns from inputs to outputs."""

from __future__ import annotations

import io
import statistics
from collections.abc import Collection
from typing import TYPE_CHECKING

from pcsim.errors import PCError, SettingError
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.plots.network.folding import Box, Diagram, diagram
from pcsim.plots.network.layout import Layout, place
from pcsim.plots.style import KIND_COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

LEAST_WIDTH, LEGEND, COLOUR_BAR = 3.5, 0.4, 0.6
BANDS = (3.0, 5.0, 7.0, 10.0, 14.5, 20.0, 30.0)
"""Lengths of bands, in inches, of which the one is taken that lets the drawing be largest in a given figure."""


def draw(
    network: Network,
    *,
    clamped: Collection[Node | str] = (),
    energy: bool = False,
    fold: bool | None = None,
    figure: FigureBase | None = None,
) -> FigureBase:
    """A network, from its inputs on the left to its outputs on the right; long ones go on in a further band below.

    Latent nodes are rounded, deterministic ones square, auxiliary ones (:func:`pcsim.is_auxiliary`) ellipses and
    clamped ones octagons, each in a colour of its own. Edges that close a cycle are dashed. Of more than three
    parallel edges, one is drawn, with their number. Blocks that repeat, alike in their nodes, modules and wiring, are
    framed and drawn once, with the number of copies. Long names lose their middle.

    Args:
        network: any with at least one node.
        clamped: nodes to be marked as given, or their names.
        energy: after a run, fill each node by its energy per sample (before precision, mean over the batch, and over
            the nodes that a folded one stands for) on a log scale of at most ten decades; without any, grey.
        fold: whether to fold what repeats; None folds networks of more than 24 nodes, False draws everything.
        figure: where to draw, as large as it is; a new figure of the size that the network needs by default.

    Raises:
        SettingError: the network has no node; with ``energy``, no node has any.
        GraphError: a clamped node is not in the network.
        StateError: energies are asked for before a run.
        PCError: matplotlib is missing.
    """
    if not network.nodes:
        raise SettingError("draw: an empty network given, expected at least one node; add some with add_node")
    shown = diagram(network, clamped=clamped, fold=fold)
    energies = [_mean_energy(box) for box in shown.boxes] if energy else None
    if energies is not None and max(energies) <= 0:
        raise SettingError("draw: no node has an energy above zero; clamp a target and relax, or give energy=False")
    layout = place(shown) if figure is None else _largest(shown, figure)
    if figure is None:
        width, height = layout.size
        figure = new_figure(max(LEAST_WIDTH, width), height + LEGEND + (COLOUR_BAR if energy else 0.0))
    from pcsim.plots.network import canvas

    axes = figure.subplots()
    axes.set(xlim=(0, layout.size[0]), ylim=(-layout.size[1], 0), aspect="equal")
    axes.set_axis_off()
    fills = [KIND_COLOURS[box.kind][0] for box in shown.boxes]
    if energies is not None:
        fills = canvas.energy_fills(figure, axes, energies)
    for frame in layout.frames:
        canvas.draw_frame(axes, frame)
    for line in layout.lines:
        canvas.draw_line(axes, line)
    for box, centre, fill in zip(shown.boxes, layout.centres, fills, strict=True):
        canvas.draw_box(axes, box, centre, layout.box, fill)
    canvas.draw_legend(figure, shown)
    canvas.fit(figure, axes)
    return figure


def svg(network: Network) -> str:
    """The drawing as an SVG element, the same for the same network; "" without matplotlib or without a node."""
    try:
        figure = draw(network)
    except (PCError, SettingError):
        return ""
    from matplotlib import rc_context

    written = io.StringIO()
    # Text stays text, so that it can be searched and read aloud.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pcsim"}):
        figure.savefig(written, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    return written.getvalue()[written.getvalue().index("<svg") :]


def _largest(shown: Diagram, figure: FigureBase) -> Layout:
    width, height = figure.bbox.width, figure.bbox.height  # type: ignore[attr-defined]
    return max((place(shown, band) for band in BANDS), key=lambda one: min(width / one.size[0], height / one.size[1]))


def _mean_energy(box: Box) -> float:
    return statistics.fmean(float(node.energy.detach().double().mean()) for node in box.nodes)

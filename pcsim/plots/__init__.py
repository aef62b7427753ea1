"""Figures of a network and of what happens in it, drawn without a display.

Each is drawn into a matplotlib figure of its own, or into a part of one that is given.
"""

from pcsim.plots.comparisons import accuracy_by_depth, similarity_by_edge
from pcsim.plots.errors import error_histograms
from pcsim.plots.network import draw, graphviz, svg
from pcsim.plots.pictures import images
from pcsim.plots.relaxations import energy_by_level, energy_over_steps, error_by_level, error_front, imbalance_by_step
from pcsim.plots.style import LINES, new_figure
from pcsim.plots.units import unit_map, unit_raster

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
    "images",
    "imbalance_by_step",
    "new_figure",
    "similarity_by_edge",
    "svg",
    "unit_map",
    "unit_raster",
]

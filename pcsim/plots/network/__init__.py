"""Drawings of a network: folded into columns, laid out, and drawn by matplotlib or told to Graphviz."""

from pcsim.graph.network import Network
from pcsim.plots.network.dot import graphviz
from pcsim.plots.network.drawing import draw, svg

__all__ = ["draw", "graphviz", "svg"]

# Notebooks show a network with its picture, and the graph's room knows nothing of drawings.
Network.picture = svg

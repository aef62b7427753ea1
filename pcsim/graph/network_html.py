"""A network as a notebook shows it: its picture, and the table of its nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pcsim import notebook
from pcsim.graph import table

if TYPE_CHECKING:
    from pcsim.graph.network import Network


def network_html(network: Network, picture: str) -> str:
    """The picture, an SVG element or nothing, over the table that ``print`` gives; a long table loses its middle."""
    rows = [table.row(node) for node in network.nodes.values()]
    framed = f'<div style="overflow-x: auto">{picture}</div>' if picture else ""
    return framed + notebook.table(table.HEADINGS, rows, caption=repr(network))

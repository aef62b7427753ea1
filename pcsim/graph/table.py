"""A network as a table that a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from pcsim.graph.network import Network
    from pcsim.graph.node import Node

HEADINGS = ("node", "kind", "shape", "predicted by", "transfer", "energy", "parameters")


def network_table(network: Network) -> str:
    """One line per node, with the edges that predict it, and the totals."""
    rows = [row(node) for node in network.nodes.values()]
    total = sum(parameter.numel() for parameter in network.parameters())
    summary = f"{len(network.nodes)} nodes, {len(network.edges)} edges, {total:,} parameters"
    return f"{aligned([HEADINGS, *rows])}\n{summary}"


def row(node: Node) -> tuple[str, ...]:
    """The cells of one node, as many as there are headings."""
    sources = ", ".join(f"{edge.source_name} ({type(edge.module).__name__})" for edge in node.incoming)
    modules: list[nn.Module] = [node, *(edge.module for edge in node.incoming)]
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    transfer = "" if isinstance(node.transfer, nn.Identity) else type(node.transfer).__name__
    return (
        node.name,
        "deterministic" if node.deterministic else "latent",
        "x".join(str(size) for size in node.shape) or "1",
        sources or ("prior" if node.prior is not None else "-"),
        transfer,
        "" if node.deterministic else type(node.energy_function).__name__,
        f"{count:,}",
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under their headings (the first row), columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])

"""A network as a person reads it: a table of its nodes, printed or shown by a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pcsim import tables

if TYPE_CHECKING:
    from pcsim.graph.network import Network
    from pcsim.graph.node import Node

HEADINGS = ("node", "kind", "shape", "predicted by", "transfer", "energy", "parameters")


def text(network: Network) -> str:
    """One line per node, with the edges that predict it, and the totals."""
    total = sum(parameter.numel() for parameter in network.parameters())
    totals = f"{len(network.nodes)} nodes, {len(network.edges)} edges, {total:,} parameters"
    return f"{tables.text(HEADINGS, _rows(network))}\n{totals}"


def html(network: Network, picture: str) -> str:
    """The picture, an SVG element or nothing, over the same table; a long one loses its middle."""
    framed = f'<div style="overflow-x: auto">{picture}</div>' if picture else ""
    return framed + tables.html(HEADINGS, _rows(network), caption=repr(network))


def _rows(network: Network) -> list[tuple[str, ...]]:
    return [_row(node) for node in network.nodes.values()]


def _row(node: Node) -> tuple[str, ...]:
    sources = ", ".join(f"{edge.source_name} ({type(edge.module).__name__})" for edge in node.incoming)
    modules: list[nn.Module] = [node, *(edge.module for edge in node.incoming)]
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    transfer = "" if isinstance(node.transfer, nn.Identity) else type(node.transfer).__name__
    return (
        node.name,
        "deterministic" if node.deterministic else "latent" if node.integers is None else "integers",
        "x".join(str(size) for size in node.shape) or "1",
        sources or ("prior" if node.prior is not None else "-"),
        transfer,
        "" if node.deterministic else type(node.energy_function).__name__,
        f"{count:,}",
    )

"""A network as source text for Graphviz, in its DOT language."""

from __future__ import annotations

from collections.abc import Collection

from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.plots.network.folding import Box, diagram
from pcsim.plots.style import BACK, FORWARD, KIND_COLOURS

SHAPES = {"latent": "box", "deterministic": "box", "auxiliary": "ellipse", "clamped": "octagon"}


def graphviz(network: Network, *, clamped: Collection[Node | str] = (), fold: bool | None = None) -> str:
    """The same drawing as source text for Graphviz (its DOT language), which arranges it itself.

    Shapes, colours and dashes are those of :func:`draw`; a block that repeats is a cluster, drawn once, with the
    number of copies. Every edge is there but those that the block stands for; parallel ones are drawn side by side.

    Args:
        network: any.
        clamped: nodes to be marked as given, or their names.
        fold: whether to fold what repeats; None folds networks of more than 24 nodes, False draws everything.

    Raises:
        GraphError: a clamped node is not in the network.
    """
    shown = diagram(network, clamped=clamped, fold=fold)
    lines = ["digraph network {", "  rankdir=LR;", "  node [fontname=Helvetica];", "  edge [fontname=Helvetica];"]
    for number, block in enumerate(shown.blocks):
        members = [_node(box) for box in shown.boxes if block.first <= box.column <= block.last]
        label = f"    label={_quoted(f'× {block.copies}')}; style=dotted;"
        lines += [f"  subgraph cluster_{number} {{", label, *(f"  {member}" for member in members), "  }"]
    inside = {column for block in shown.blocks for column in range(block.first, block.last + 1)}
    lines += [_node(box) for box in shown.boxes if box.column not in inside]
    for arrow in shown.arrows:
        ends = " -> ".join(_quoted(shown.boxes[box].nodes[0].name) for box in (arrow.source, arrow.target))
        style = f'color="{BACK}" style=dashed constraint=false' if arrow.back else f'color="{FORWARD}"'
        lines += [f"  {ends} [{style}];"] * arrow.count
    return "\n".join([*lines, "}"]) + "\n"


def _node(box: Box) -> str:
    fill, outline = KIND_COLOURS[box.kind]
    style = "rounded,filled" if box.kind == "latent" else "filled"
    label = _quoted("\n".join((*box.names, box.shape)))
    shape = f'shape={SHAPES[box.kind]} style="{style}" fillcolor="{fill}" color="{outline}"'
    return f"  {_quoted(box.nodes[0].name)} [label={label} {shape}];"


def _quoted(text: str) -> str:
    """A quoted string of Graphviz's, in which backslashes begin escapes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'

"""What all figures share: an empty figure that needs no display, and colours that everybody tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pcsim.errors import PCError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
# Fill and outline: tints and shades of Okabe and Ito's colours. The outline stays where energy gives the fill.
KIND_COLOURS = {
    "latent": ("#D3EAF8", "#0072B2"),
    "deterministic": ("#F0F0F0", "#555555"),
    "auxiliary": ("#FBE3B3", "#B87800"),
    "clamped": ("#BFE8DA", "#006B4E"),
}
FORWARD = "#333333"
BACK = "#D55E00"
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

"""What every script of the gallery has: a command line that ends in a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure, FigureBase

from pcsim import plots


def command_line(script: str, description: str, *, epochs: int) -> argparse.ArgumentParser:
    """A reader of options, with ``--epochs`` and ``--plot``, in the current folder under the script's name.

    Args:
        script: its file.
        description: its docstring.
        epochs: unless others are asked for.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--plot", type=Path, default=Path(f"{Path(script).stem}.png"), metavar="PATH")
    return parser


def draw_accuracy(curves: Mapping[str, Sequence[float]], figure: FigureBase) -> None:
    """Test accuracy over epochs, a line for each method by its title."""
    axes = figure.subplots()
    for (method, curve), (colour, marker, dashes) in zip(curves.items(), plots.LINES, strict=False):
        axes.plot(range(1, len(curve) + 1), curve, label=method, color=colour, marker=marker, linestyle=dashes)
    axes.set(xlabel="epoch", ylabel="test accuracy", xticks=range(1, max(map(len, curves.values())) + 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, as PNG or SVG as its name says, and tell where."""
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")

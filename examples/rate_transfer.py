"""Does a rate that is good for a small network stay good for a wide or a deep one?

Trains tanh MLPs on scikit-learn's digits by predictive coding for a few steps at several learning rates of Adam, over
widths at one depth and over depths at one width, in the standard parametrisation (plain chains) and in muPC (arXiv
2505.13124; SPEC §9), and tells at which rate each loses most. Where rates carry over, the best one is the same.

    python examples/rate_transfer.py --plot mupc.png
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import file, number
from torch.optim import Adam

import pcsim
from pcsim import plots

DEPTH, WIDTH, BATCH, RATE = 8, 64, 128, 0.1


def loss_after(parametrisation: str, width: int, depth: int, lr: float, options: argparse.Namespace) -> float:
    """Half the squared error per sample on all training digits after the steps; infinite where it diverged."""
    torch.manual_seed(0)
    train, _ = pcsim.data.standardise(*pcsim.data.digits())
    sizes = [64, *[width] * (depth - 1), 10]
    net = pcsim.topologies.mlp(sizes, parametrisation=parametrisation, latents="before")
    sim = pcsim.Simulator(net, pcsim.Relaxation(depth, RATE))
    optimizer = Adam(net.parameters(), lr=lr, fused=True)
    try:
        for _ in range(options.steps):
            batch = torch.randint(len(train), (BATCH,))
            sim.update({"input": train.images[batch], "output": train.one_hot()[batch]}, optimizer)
        outputs = sim.predict({"input": train.images})["output"]
    except pcsim.errors.DivergenceError:
        return math.inf
    loss = 0.5 * float((outputs - train.one_hot()).square().sum()) / len(train)
    return loss if math.isfinite(loss) else math.inf


def best(losses: Sequence[float], rates: Sequence[float]) -> float:
    """The rate of the smallest loss."""
    return min(zip(losses, rates, strict=True))[1]


def draw(rows: Sequence[dict[str, Any]], rates: Sequence[float], path: Path) -> None:
    """Loss against the rate, a line per size, the best rate marked."""
    figure = plots.new_figure(10, 5.6)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    places = {
        (p, s): panels[i][j] for i, p in enumerate(("standard", "mupc")) for j, s in enumerate(("width", "depth"))
    }
    for (parametrisation, over), axes in places.items():
        own = [row for row in rows if (row["parametrisation"], row["over"]) == (parametrisation, over)]
        for row, (colour, marker, dashes) in zip(own, plots.LINES, strict=False):
            axes.plot(rates, row["losses"], color=colour, marker=marker, linestyle=dashes, label=row[over])
            axes.plot(row["best"], min(row["losses"]), color=colour, marker="*", markersize=13)
        axes.set(xscale="log", ylim=(0, 1), title=f"{'muPC' if parametrisation == 'mupc' else parametrisation}, {over}")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("learning rate of Adam")
    for axes in panels[:, 0]:
        axes.set_ylabel("training loss")
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Try all rates at all sizes, and show each size as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--widths", nargs="+", type=number(int, 1), default=[32, 128, 512], help=f"at depth {DEPTH}")
    add("--depths", nargs="+", type=number(int, 2), default=[4, 16, 64], help=f"at width {WIDTH}")
    add("--lrs", nargs="+", type=number(float, 0, but=0), default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])
    add("--steps", type=number(int, 1), default=40, help="of training")
    add("--threads", type=number(int, 1), help="of torch, on a CPU")
    add("--json", type=file, metavar="PATH", help="write one object per size")
    add("--plot", type=file, metavar="PATH", help="draw loss against rate, as PNG or SVG say")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print("best learning rate, and training loss there")
    rows: list[dict[str, Any]] = []
    for parametrisation in ("standard", "mupc"):
        sizes = [("width", width, DEPTH) for width in options.widths] + [("depth", WIDTH, d) for d in options.depths]
        for over, width, depth in sizes:
            losses = [loss_after(parametrisation, width, depth, lr, options) for lr in options.lrs]
            row = {"parametrisation": parametrisation, "over": over, "width": width, "depth": depth}
            rows.append({**row, "losses": losses, "best": best(losses, options.lrs)})
            print(
                f"{parametrisation:9} width {width:4} depth {depth:3}  {rows[-1]['best']:g}  {min(losses):.3f}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.plot is not None:
        draw(rows, options.lrs, options.plot)


if __name__ == "__main__":
    main()

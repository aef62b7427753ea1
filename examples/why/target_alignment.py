"""How far does one update move the output toward its target? Target alignment against depth.

Linear chains of width 64 see one input and one target, both random, and learn once. Target alignment is the cosine
between where the output went and where it should go (Song et al., Nature Neuroscience 2024). Predictive coding learns
from the equilibrium; the learning rate of each method is the best of a grid, chosen with other seeds. A network in
which the last layer alone moves has an alignment of 1, whatever it learns: that is where spiking precision with
forward updates comes near, under plain gradient descent.

    python examples/why/target_alignment.py --json target_alignment.json --plot target_alignment.png
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from comparing import STYLES, Comparison, command_line, number, parsed, report, save, search
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

import pcsim
from pcsim import plots

SPIKING = pcsim.Spiking(alpha=0.0)
METHODS = ("predictive coding", "backprop", "spiking + FU")
LRS = (1e-4, 1e-3, 1e-2)


def alignment(before: Tensor, after: Tensor, target: Tensor) -> float:
    """Cosine between the change of the output and the change that was wanted; all three (1, units)."""
    return float(functional.cosine_similarity(after - before, target - before))


def simulator(method: str, depth: int, width: int) -> pcsim.Simulator:
    """A fresh chain of ``depth`` linear edges, in float64, with the rules of a method."""
    net = pcsim.topologies.mlp([width] * (depth + 1), activation=nn.Identity, bias=False).double()
    if method == "backprop":
        return pcsim.Simulator(net, rule=pcsim.Backprop())
    if method == "spiking + FU":
        return pcsim.Simulator(net, pcsim.Relaxation(depth, 0.5, precision=SPIKING), pcsim.ForwardUpdate())
    return pcsim.Simulator(net)


def aligned(method: str, depth: int, width: int, lr: float, seed: int) -> float:
    """The target alignment of one update."""
    torch.manual_seed(seed)
    sim = simulator(method, depth, width)
    x, target = torch.randn(2, 1, width, dtype=torch.float64)
    before = sim.predict({"input": x})["output"]
    (sim.equilibrium if method == "predictive coding" else sim.infer)({"input": x, "output": target})
    sim.learn(SGD(sim.network.parameters(), lr=lr))
    return alignment(before, sim.predict({"input": x})["output"], target)


def draw(results: dict[tuple[str, int], list[float]], options: argparse.Namespace) -> None:
    """Alignment against depth, with the spread over the seeds."""
    figure = plots.new_figure(5.5, 3.4)
    axes = figure.subplots()
    for method, (colour, marker, dashes) in zip(METHODS, STYLES, strict=False):
        own = [results[method, depth] for depth in options.depths]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in own]
        axes.errorbar(options.depths, [statistics.mean(values) for values in own], spread, label=method, color=colour,
                      marker=marker, linestyle=dashes, capsize=3)  # fmt: skip
    axes.set(xlabel="depth (edges)", ylabel="target alignment", ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, measure, tell, and draw."""
    parser = command_line(__doc__)
    parser.add_argument("--depths", nargs="+", type=number(int, 2), default=[2, 4, 8, 15], help="numbers of edges")
    parser.add_argument("--width", type=number(int, 1), default=64)
    options = parsed(parser, arguments)
    results: dict[tuple[str, int], list[float]] = {}
    chosen: dict[str, float] = {}
    for depth in options.depths:
        for method in METHODS:
            # One update of a deep chain differs so much from seed to seed that three would mislead.
            lr = search(LRS, partial(aligned, method, depth, options.width), seeds=8)
            chosen[f"{method}, depth {depth}"] = lr
            results[method, depth] = [aligned(method, depth, options.width, lr, seed) for seed in options.seeds]
    report(
        [
            Comparison(f"depth {depth}", other, results["predictive coding", depth], results[other, depth])
            for other in METHODS[1:]
            for depth in options.depths
        ],
        chosen,
        options,
    )
    if options.plot is not None:
        draw(results, options)


if __name__ == "__main__":
    main()

"""How long does a deep linear network stay at the saddle at the origin? Steps of learning, from small weights.

Where all weights are zero backprop's loss has a saddle without a direction down to second order; the energy of
predictive coding at its equilibrium has one (Innocenti et al., NeurIPS 2024, arXiv 2408.11979). A network 16-12-12-8
learns a random linear map from weights near the origin, by gradient descent on the whole batch and by Adam, and from
weights of the usual size. It has left the saddle when the loss is under nine tenths of that of zero outputs, and
learned when it is under one tenth. Rates are those of a grid with the fewest steps until then, on other maps.

    python examples/why/saddle.py --json saddle.json --plot saddle.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from comparing import STYLES, Comparison, command_line, number, parsed, report, save, search
from torch import nn
from torch.optim import SGD, Adam

import pcsim
from pcsim import plots

SIZES, SAMPLES = (16, 12, 12, 8), 64
OPTIMIZERS = {"gradient descent": SGD, "Adam": Adam}
LRS = {"gradient descent": (0.1, 0.2, 0.4, 0.8, 1.6), "Adam": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
SAME = 0.2
"""The rate of both, where both have the same."""
SCALE = 5e-3
"""Standard deviation of weights near the origin."""
METHODS = {"predictive coding": pcsim.SettledUpdate(), "backprop": pcsim.Backprop()}
RELAXATION = pcsim.Relaxation(20, 0.2)


def losses(method: str, optimizer: str, scale: float | None, lr: float, seed: int, most: int) -> list[float]:
    """The loss over that of zero outputs, before each step, until it is under one tenth, or for ``most`` steps.

    Args:
        method: how the gradient comes about.
        optimizer: what is done with it.
        scale: standard deviation of the weights at the start; None for the usual 1/√fan_in.
        lr: of the optimizer.
        seed: of weights and data.
        most: steps after which the run is given up.
    """
    torch.manual_seed(seed)
    net = pcsim.topologies.mlp(SIZES, activation=nn.Identity, bias=False)
    with torch.no_grad():
        for weights in net.parameters():
            if scale is not None:
                weights.normal_(std=scale)
    x = torch.randn(SAMPLES, SIZES[0])
    target = x @ torch.randn(SIZES[0], SIZES[-1]) / math.sqrt(SIZES[0])
    sim = pcsim.Simulator(net, RELAXATION, METHODS[method])
    steps = OPTIMIZERS[optimizer](net.parameters(), lr=lr)
    found: list[float] = []
    for _ in range(most):
        error = target - sim.predict({"input": x})["output"]
        found.append(float(error.square().sum() / target.square().sum()))
        if found[-1] < 0.1 or not found[-1] < 100:
            break
        try:
            sim.update({"input": x, "output": target}, steps)
        except pcsim.errors.DivergenceError:
            break
    return found


def first_under(found: Sequence[float], share: float, most: int) -> float:
    """The first step at which the loss is under a share; ``most`` where it never is."""
    return float(next((step for step, loss in enumerate(found) if loss < share), most))


def draw(shown: dict[str, list[list[float]]], options: argparse.Namespace) -> None:
    """Loss against steps for the first seed, one panel for each setting."""
    figure = plots.new_figure(11, 3)
    for axes, (title, runs) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
        for method, found, (colour, _, dashes) in zip(METHODS, runs, STYLES, strict=False):
            axes.plot(found, label=method, color=colour, linestyle=dashes)
        axes.set(xlabel="step of learning", xscale="symlog", ylim=(0, 1.1))
        axes.set_title(title.replace(", ", "\n", 1), fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss over that of zero outputs")
    figure.axes[0].legend(frameon=False, fontsize=8)
    save(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, measure, tell, and draw."""
    parser = command_line(__doc__)
    parser.add_argument("--most", type=number(int, 1), default=3000, help="steps after which a run is given up")
    options = parsed(parser, arguments)
    rates: dict[str, float] = {}
    comparisons: list[Comparison] = []
    shown: dict[str, list[list[float]]] = {}

    def compare(optimizer: str, title: str, scale: float | None, lrs: dict[str, float]) -> None:
        most, settings = options.most, (optimizer, scale)
        runs = {m: [losses(m, *settings, lrs[m], seed, most) for seed in options.seeds] for m in METHODS}
        for event, share in (("leaves", 0.9), ("has learned", 0.1)):
            ours, theirs = ([first_under(run, share, most) for run in runs[method]] for method in METHODS)
            comparisons.append(Comparison(f"{title}: {event} after", "backprop", ours, theirs, less=True))
        shown[title] = [runs[method][0] for method in METHODS]

    def best(method: str, optimizer: str, scale: float | None) -> float:
        def steps(lr: float, seed: int) -> float:
            return first_under(losses(method, optimizer, scale, lr, seed, options.most), 0.1, options.most)

        return search(LRS[optimizer], steps, less=True)

    compare("gradient descent", f"gradient descent, {SAME:g} for both", SCALE, dict.fromkeys(METHODS, SAME))
    for optimizer, scale, start in (
        ("gradient descent", SCALE, ""),
        ("Adam", SCALE, ""),
        ("gradient descent", None, ", usual weights"),
    ):
        lrs = {method: best(method, optimizer, scale) for method in METHODS}
        rates.update({f"{method}, {optimizer}{start}": lr for method, lr in lrs.items()})
        compare(optimizer, f"{optimizer}, best rates{start}", scale, lrs)
    report(comparisons, rates, options)
    print(f"a step of predictive coding includes {RELAXATION.steps} steps of inference; backprop has none")
    if options.plot is not None:
        draw(shown, options)


if __name__ == "__main__":
    main()

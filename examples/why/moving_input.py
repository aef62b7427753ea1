"""What if the input moves while the network relaxes? A turning digit, seen in part, with few steps for each frame.

The network of missing_inputs.py sees a digit that turns by a few degrees from frame to frame, half of its pixels
missing, other ones in every frame. It either begins each frame anew, or goes on from where it was
(``Relaxation(start="previous")``), with the same number of steps. Rate and momentum of the latents are the best of one
grid for each of both and each number of steps, on a held-out part. A classifier by backprop has gaps filled with the
mean, or with what was last seen of a pixel. The figure shows accuracy against steps, and errors of single units.

    python examples/why/moving_input.py --json moving_input.json --plot moving_input.png
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch
from comparing import STYLES, Comparison, command_line, number, parsed, report, save, search
from joint_network import METHODS, PRECISION, gaps, train
from torch import Tensor
from torch.nn import functional

import pcsim
from pcsim import plots
from pcsim.data import ImageData

STEPS = (1, 2, 4, 8, 16, 32)
GRID = tuple(itertools.product((0.05 / PRECISION, 0.1 / PRECISION, 0.2 / PRECISION, 0.3 / PRECISION), (0.0, 0.7)))
"""Rates and momenta of the latents."""
ANGLES = torch.linspace(-30, 30, 13)
LR = 3e-3
"""The rate that missing_inputs.py has found."""
UNITS, FRAME = slice(26, 30), 8
"""For the figure: units of image and hidden layer, and steps per frame."""


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Images (N, 64) turned by as many degrees each, (N,)."""
    angle = torch.deg2rad(degrees)
    zero, cos, sin = torch.zeros_like(angle), angle.cos(), angle.sin()
    turns = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = functional.affine_grid(turns, [len(images), 1, 8, 8], align_corners=False)
    return functional.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


def frames(data: ImageData, seed: int, middle: Tensor, scale: float) -> list[tuple[Tensor, Tensor]]:
    """Standardised images and which pixels are given, both (N, 64), of one frame after the other."""
    generator = torch.Generator().manual_seed(seed)
    moving = [(turned(data.images, angle.expand(len(data))) - middle) / scale for angle in ANGLES]
    return [(images, gaps((len(data), 64), 0.5, generator)) for images in moving]


def accuracy(guesses: Sequence[Tensor], data: ImageData) -> float:
    """Mean over the frames; each guess is (N, 10)."""
    return statistics.mean(float((guess.argmax(1) == data.labels).float().mean()) for guess in guesses)


def follow(net: pcsim.Network, seen: Sequence[tuple[Tensor, Tensor]], relaxation: pcsim.Relaxation) -> Iterator[Tensor]:
    """The label (N, 10) after each frame, while the network shows its state."""
    sim = pcsim.Simulator(net, relaxation)
    for frame in seen:
        sim.infer({"image": frame})
        yield net["label"].value


def filled(net: pcsim.Network, seen: Sequence[tuple[Tensor, Tensor]], filling: str) -> list[Tensor]:
    """The label (N, 10) of each frame, by a classifier whose gaps are filled with the mean or what was last seen."""
    sim, image, guesses = pcsim.Simulator(net), torch.zeros(()), []
    for pixels, given in seen:
        image = pixels.where(given, torch.zeros(()) if filling == "mean" else image)
        guesses.append(sim.predict({"image": image})["label"])
    return guesses


def draw(results: dict[str, list[list[float]]], traces: Tensor, options: argparse.Namespace) -> None:
    """Accuracy against steps; errors (time, units), one above the other, with a line where the frame changes."""
    figure = plots.new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    for (title, own), (colour, marker, dashes) in zip(results.items(), STYLES, strict=False):
        means, spreads = [statistics.mean(values) for values in own], [statistics.pstdev(values) for values in own]
        left.errorbar(STEPS, means, spreads, label=title, color=colour, marker=marker, linestyle=dashes, capsize=3)
    left.set(
        xlabel="steps per frame",
        ylabel="test accuracy",
        xscale="log",
        xticks=STEPS,
        xticklabels=STEPS,
        ylim=(0.4, 0.95),
    )
    left.legend(frameon=False, fontsize=8, loc="lower right")
    left.grid(alpha=0.3)
    for place, trace in enumerate(traces.T):
        right.plot(trace / trace.abs().max() - 2.2 * place, color=STYLES[0][0], linewidth=0.9)
    for change in range(0, len(traces), FRAME):
        right.axvline(change, color="0.8", linewidth=0.6)
    right.set(xlabel="step", ylabel="error of a unit", yticks=[])
    save(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, measure, tell, and draw."""
    parser = command_line(__doc__)
    parser.add_argument("--epochs", type=number(int, 1), default=8)
    options = parsed(parser, arguments)
    whole, test = pcsim.data.digits()
    held_out, part = whole.split(len(whole) // 5)
    angles = 60 * torch.rand(2 * len(part), generator=torch.Generator().manual_seed(0)) - 30
    images = turned(part.images.repeat(2, 1), angles)
    middle, scale = images.mean(0), float((images - images.mean(0)).std())
    learned = ImageData((images - middle) / scale, part.labels.repeat(2), 10)

    @cache
    def trained(method: str, seed: int) -> pcsim.Network:
        return train(method, LR, seed, learned, options.epochs).network

    def score(data: ImageData, start: str, steps: int, descent: tuple[float, float], seed: int) -> float:
        relaxation = pcsim.Relaxation(steps, descent[0], momentum=descent[1], start=start)  # type: ignore[arg-type]
        try:
            guesses = [*follow(trained(METHODS[0], seed), frames(data, seed, middle, scale), relaxation)]
        except pcsim.errors.DivergenceError:
            return 0.0
        return accuracy(guesses, data)

    results: dict[str, list[list[float]]] = {"going on": [], "beginning anew": []}
    chosen: dict[str, tuple[float, float]] = {}
    for title, start in zip(results, ("previous", "zeros"), strict=True):
        for steps in STEPS:
            descent = search(GRID, partial(score, held_out, start, steps), seeds=2)
            chosen[f"{title}, {steps} steps"] = descent
            results[title].append([score(test, start, steps, descent, seed) for seed in options.seeds])
    for filling in ("mean", "last seen"):
        own = [filled(trained(METHODS[1], seed), frames(test, seed, middle, scale), filling) for seed in options.seeds]
        results[f"backprop, {filling} filled in"] = [[accuracy(guesses, test) for guesses in own]] * len(STEPS)
    ours, *others = results.items()
    pairs = [(title, k, own[k]) for title, own in others for k in range(len(STEPS))]
    report([Comparison(f"{STEPS[k]} steps", title, ours[1][k], own) for title, k, own in pairs], chosen, options)
    if options.plot is not None:
        seen = [frame for frame in frames(test.take(1), 0, middle, scale) for _ in range(FRAME)]
        net = trained(METHODS[0], options.seeds[0])
        each = follow(net, seen, pcsim.Relaxation(1, 0.1 / PRECISION, start="previous"))
        traces = [torch.cat([net[name].error[0, UNITS] for name in ("image", "hidden")]) for _ in each]
        draw(results, torch.stack(traces), options)


if __name__ == "__main__":
    main()

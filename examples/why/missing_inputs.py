"""What if a part of the image is missing? One network of image and label, trained once, and clamped where it can see.

Causes predict the image, and the image, by a hidden layer, its label. Both are clamped in learning. Then a growing
share of the pixels is left free, by a mask: they are inferred with everything else, and the label follows. A classifier
of the same layers, trained by backprop, has the gaps filled with the mean image or with black; another one is trained
with gaps as well. Learning rates of all are the best of one grid on a held-out part, over all shares. Sampling
(Monte-Carlo predictive coding, Oliviers et al., PLOS Computational Biology 2024) gives inferred pixels error bars.

    python examples/why/missing_inputs.py --json missing_inputs.json --plot missing_inputs.png
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import attrs
import torch
from comparing import STYLES, Comparison, command_line, number, parsed, report, save, search
from joint_network import METHODS, RATE, gaps, train
from torch import Tensor

import pcsim
from pcsim import plots
from pcsim.data import ImageData

ROWS = {
    METHODS[0]: (METHODS[0], False),
    "backprop, mean filled in": (METHODS[1], False),
    "backprop, black filled in": (METHODS[1], True),
    METHODS[2]: (METHODS[2], False),
}
"""The method of each line, and whether its gaps are black."""
SHARES, LRS = (0.0, 0.25, 0.5, 0.75, 0.875), (1e-3, 3e-3, 1e-2)
SEEING = pcsim.Relaxation(100, RATE, momentum=0.7)
SAMPLING = pcsim.Relaxation(400, RATE / 3, temperature=1.0)


def accuracies(method: str, sim: pcsim.Simulator, data: ImageData, seed: int, black: Tensor | None) -> list[float]:
    """Accuracy at every share of missing pixels, inferred or filled with ``black``, (64,), or the mean image (None)."""
    generator, found = torch.Generator().manual_seed(seed), []
    seeing = pcsim.Simulator(sim.network, SEEING)
    for share in SHARES:
        given = gaps((len(data), 64), share, generator)
        filled = data.images.where(given, torch.zeros(64) if black is None else black)
        # Where every pixel is given, the label is one forward pass away.
        clamps = {"image": (data.images, given) if method == METHODS[0] and share else filled}
        found.append(float((seeing.predict(clamps)["label"].argmax(1) == data.labels).float().mean()))
    return found


def sampled(sim: pcsim.Simulator, images: Tensor, given: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every pixel, both (N, 64), over samples of what is missing."""
    sampler = pcsim.Simulator(sim.network, SAMPLING)
    sampler.infer({"image": (images.repeat_interleave(samples, 0), given.repeat_interleave(samples, 0))})
    values = sim.network["image"].value.reshape(len(images), samples, -1)
    return values.mean(1), values.std(1)


def draw(rows: dict[str, list[list[float]]], pictures: dict[str, Tensor], options: argparse.Namespace) -> None:
    """Accuracy against the share of missing pixels; images with half of their pixels, completed, with error bars."""
    figure = plots.new_figure(9, 3.4)
    left, right = figure.subfigures(1, 2)  # type: ignore[misc]
    axes = left.subplots()
    for (title, own), (colour, marker, dashes) in zip(rows.items(), STYLES, strict=False):
        means, spreads = zip(*((statistics.mean(v), statistics.pstdev(v)) for v in zip(*own, strict=True)), strict=True)
        axes.errorbar(SHARES, means, spreads, label=title, color=colour, marker=marker, linestyle=dashes, capsize=3)
    axes.set(xlabel="share of missing pixels", ylabel="test accuracy", ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    for row, (title, images) in zip(right.subplots(len(pictures), 6), pictures.items(), strict=True):
        for place, image in zip(row, images[:6].view(-1, 8, 8), strict=True):
            place.imshow(image.numpy(), cmap="magma" if title == "error bar" else "gray")
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=8)
    save(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, measure, tell, and draw."""
    parser = command_line(__doc__)
    parser.add_argument("--epochs", type=number(int, 1), default=15)
    options = parsed(parser, arguments)
    digits = pcsim.data.digits()
    centred = (attrs.evolve(each, images=each.images - digits[0].images.mean(0)) for each in digits)
    whole, test = pcsim.data.standardise(*centred)
    black = whole.images.min(0).values
    held_out, part = whole.split(len(whole) // 5)

    def score(method: str, lr: float, seed: int) -> float:
        return statistics.mean(accuracies(method, train(method, lr, seed, part, options.epochs), held_out, seed, None))

    lrs = {method: search(LRS, partial(score, method)) for method in METHODS}
    rows: dict[str, list[list[float]]] = {title: [] for title in ROWS}
    for seed in options.seeds:
        sims = {method: train(method, lrs[method], seed, part, options.epochs) for method in METHODS}
        for title, (method, blackened) in ROWS.items():
            rows[title].append(accuracies(method, sims[method], test, seed, black if blackened else None))
    by_share = {title: [list(values) for values in zip(*own, strict=True)] for title, own in rows.items()}
    ours = by_share.pop(METHODS[0])
    compared = [
        Comparison(f"{share:.1%} missing", title, ours[k], own[k])
        for title, own in by_share.items()
        for k, share in enumerate(SHARES)
    ]
    report(compared, lrs, options)
    torch.manual_seed(options.seeds[-1])
    images, given = test.images[:40], gaps((40, 64), 0.5, torch.Generator().manual_seed(0))
    means, bars = sampled(sims[METHODS[0]], images, given, samples=50)
    inside = ((images - means).abs() < 2 * bars)[~given].float().mean()
    print(f"half missing, sampled: {inside:.0%} of inferred pixels are within two of their standard deviations")
    if options.plot is not None:
        seen = (images - black).where(given, torch.zeros(()))
        draw(rows, {"given": seen, "completed": means - black, "error bar": bars, "truth": images - black}, options)


if __name__ == "__main__":
    main()

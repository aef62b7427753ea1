"""One sample at a time, each seen once: how often is the next one guessed wrong? Also where the world changes.

A network of two hidden layers of 32 units learns from a stream of images at batch size 1, as animals must (Song et
al., Nature Neuroscience 2024). Each image is guessed before it is learned from; the error is the share of wrong guesses
over the stream. With drift, five of the ten classes change their labels among each other every so often. Learning rates
are those of one grid with the least error on streams of another part of the training images, for each task and method.

    python examples/why/online_learning.py --json online_learning.json --plot online_learning.png
    python examples/why/online_learning.py --data mnist --root DATA
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from comparing import Comparison, command_line, number, parsed, report, search
from panels import draw_panels
from torch import Tensor, nn
from torch.optim import SGD

import pcsim
from pcsim.data import ImageData

METHODS = {"predictive coding": pcsim.SettledUpdate(), "backprop": pcsim.Backprop()}
TASKS: dict[str, tuple[type[nn.Module], int]] = {
    "sigmoid": (nn.Sigmoid, 0),
    "sigmoid, drift": (nn.Sigmoid, 150),
    "tanh": (nn.Tanh, 0),
    "tanh, drift": (nn.Tanh, 150),
}
"""The activation, and after how many samples the labels change, 0 for never."""
LRS = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
RELAXATION = pcsim.Relaxation(10, 0.3)


def labels_over_time(labels: Tensor, every: int, generator: torch.Generator) -> Tensor:
    """Labels (N,) of which five classes, drawn anew, are permuted after every so many samples."""
    names, found = torch.arange(10), []
    for part in torch.split(labels, every or len(labels)):
        found.append(names[part])
        some = torch.randperm(10, generator=generator)[:5]
        names = names.index_copy(0, some, names[some.roll(1)])
    return torch.cat(found)


def stream(task: str, method: str, data: ImageData, samples: int, lr: float, seed: int) -> list[float]:
    """Whether each guess was wrong, 1 or 0, over one pass."""
    torch.manual_seed(seed)
    net = pcsim.topologies.mlp([data.images.shape[1], 32, 32, 10], activation=TASKS[task][0])
    sim = pcsim.Simulator(net, RELAXATION, METHODS[method])
    optimizer = SGD(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[:samples]
    labels = labels_over_time(data.labels[order], TASKS[task][1], generator)
    targets, wrong = torch.eye(10)[labels], list[float]()
    for image, target in zip(data.images[order].unsqueeze(1), targets.unsqueeze(1), strict=True):
        try:
            sim.update({"input": image, "output": target}, optimizer)
        except pcsim.errors.DivergenceError:  # all that is to come counts as wrong
            return wrong + [1.0] * (len(order) - len(wrong))
        # The guess is the prediction of the forward pass, from before the update.
        wrong.append(float(net["output"].forward_prediction.argmax() != target.argmax()))
    return wrong


def load(options: argparse.Namespace) -> tuple[ImageData, ImageData]:
    """Standardised images (N, pixels), to search with and to report from: two parts of the training set."""
    train = (pcsim.data.digits() if options.data == "digits" else pcsim.data.mnist(options.root))[0].flatten()
    held_out, rest = train.split(len(train) // 3)
    rest, held_out = pcsim.data.standardise(rest, held_out)
    return held_out, rest


def smoothed(runs: list[list[float]]) -> tuple[range, list[float]]:
    """Samples seen, and the error over the last hundred guesses, the mean over the seeds."""
    means = torch.tensor(runs).mean(0)
    smooth: list[float] = means.unfold(0, min(100, len(means)), 1).mean(1).tolist()
    return range(len(means) - len(smooth), len(means)), smooth


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, measure, tell, and draw."""
    parser = command_line(__doc__)
    parser.add_argument("--samples", type=number(int, 1), default=600, help="of each stream")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds MNIST")
    options = parsed(parser, arguments)
    try:
        held_out, data = load(options)
    except pcsim.errors.DataError as problem:
        raise SystemExit(f"online_learning.py: {problem}") from problem

    def error(task: str, method: str, lr: float, seed: int) -> float:
        return statistics.mean(stream(task, method, held_out, options.samples, lr, seed))

    lrs: dict[str, float] = {}
    wrongs: dict[tuple[str, str], list[list[float]]] = {}
    for task in TASKS:
        for method in METHODS:
            lrs[f"{method}, {task}"] = lr = search(LRS, partial(error, task, method), less=True)
            wrongs[task, method] = [stream(task, method, data, options.samples, lr, seed) for seed in options.seeds]
    errors = {key: [statistics.mean(run) for run in runs] for key, runs in wrongs.items()}
    report(
        [
            Comparison(task, "backprop", errors[task, "predictive coding"], errors[task, "backprop"], less=True)
            for task in TASKS
        ],
        lrs,
        options,
    )
    if options.plot is not None:
        labels = "samples seen", "error of the last 100 guesses"
        draw_panels(list(TASKS), list(METHODS), lambda *key: smoothed(wrongs[key]), labels, 11, options.plot)


if __name__ == "__main__":
    main()

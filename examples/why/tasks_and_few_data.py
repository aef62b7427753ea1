"""Two tasks one after the other with the same outputs, and few data: does the way of learning matter?

A network of two sigmoid layers of 32 units learns, at batch size 32. Two tasks: first the digits 0 to 4, then 5 to 9,
which share five outputs; the error is the mean over both tasks in the end, so that what is forgotten counts (Song et
al., Nature Neuroscience 2024). Few data: all ten digits from 60 or 300 images, shown again and again; the error is that
in the end. Learning rates are those of one grid with the least error on a held-out part, for each setting and method.

    python examples/why/tasks_and_few_data.py --json tasks_and_few_data.json --plot tasks_and_few_data.png
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from comparing import Comparison, command_line, number, parsed, report, search
from panels import draw_panels
from torch import nn
from torch.optim import SGD

import pcsim
from pcsim.data import ImageData

METHODS = {"predictive coding": pcsim.SettledUpdate(), "backprop": pcsim.Backprop()}
LRS = (0.1, 0.2, 0.5, 1.0, 2.0)
BATCH, RELAXATION = 32, pcsim.Relaxation(10, 0.3)
SETTINGS = ("two tasks", "60 images", "300 images")


def tasks(data: ImageData) -> list[ImageData]:
    """The digits under 5, and the others, with five labels for both."""
    picked = [data.labels < 5, data.labels >= 5]
    return [ImageData(data.images[those], data.labels[those] % 5, 5) for those in picked]


def errors(
    method: str, parts: Sequence[ImageData], tests: Sequence[ImageData], updates: int, lr: float, seed: int
) -> list[float]:
    """The mean error on all tests, after every tenth update; the parts are learned one after the other."""
    torch.manual_seed(seed)
    net = pcsim.topologies.mlp([64, 32, 32, parts[0].classes], activation=nn.Sigmoid)
    sim = pcsim.Simulator(net, RELAXATION, METHODS[method])
    optimizer = SGD(net.parameters(), lr=lr)
    generator, found = torch.Generator().manual_seed(seed), list[float]()
    for part in parts:
        for update in range(updates):
            batch = torch.randint(len(part), (BATCH,), generator=generator)
            try:
                sim.update({"input": part.images[batch], "output": part.one_hot()[batch]}, optimizer)
            except pcsim.errors.DivergenceError:
                return [1.0]
            if (update + 1) % 10 == 0 or update + 1 == updates:
                guesses = [sim.predict({"input": test.images})["output"].argmax(1) for test in tests]
                wrong = [float((g != test.labels).float().mean()) for g, test in zip(guesses, tests, strict=True)]
                found.append(statistics.mean(wrong))
    return found


def run(setting: str, data: ImageData, test: ImageData, updates: int, method: str, lr: float, seed: int) -> list[float]:
    """The errors of one run of a setting; which few images it has is the seed's."""
    if setting == "two tasks":
        return errors(method, tasks(data), tasks(test), updates, lr, seed)
    return errors(method, [data.split(int(setting.split()[0]), seed=seed)[0]], [test], updates, lr, seed)


def averaged(curves: list[list[float]]) -> tuple[range, list[float]]:
    """Updates, and the test error after them, the mean over the seeds."""
    means = [statistics.mean(values) for values in zip(*curves, strict=False)]
    return range(10, 10 * len(means) + 1, 10), means


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, measure, tell, and draw."""
    parser = command_line(__doc__)
    parser.add_argument("--updates", type=number(int, 1), default=250, help="of each task")
    options = parsed(parser, arguments)
    whole, test = pcsim.data.standardise(*pcsim.data.digits())
    held_out, part = whole.split(len(whole) // 5)

    def last(setting: str, method: str, lr: float, seed: int) -> float:
        return run(setting, part, held_out, options.updates, method, lr, seed)[-1]

    chosen: dict[str, float] = {}
    curves: dict[tuple[str, str], list[list[float]]] = {}
    for setting in SETTINGS:
        for method in METHODS:
            lr = search(LRS, partial(last, setting, method), less=True, seeds=4)
            chosen[f"{method}, {setting}"] = lr
            curves[setting, method] = [
                run(setting, part, test, options.updates, method, lr, seed) for seed in options.seeds
            ]
    ends = {key: [curve[-1] for curve in own] for key, own in curves.items()}
    compared = []
    for setting in SETTINGS:
        ours, theirs = (ends[setting, method] for method in METHODS)
        compared.append(Comparison(setting, "backprop", ours, theirs, less=True))
    report(compared, chosen, options)
    if options.plot is not None:
        labels = "updates", "test error"
        draw_panels(SETTINGS, list(METHODS), lambda *key: averaged(curves[key]), labels, 9, options.plot)


if __name__ == "__main__":
    main()

"""Predictive coding networks of 130 levels, and of 1,002, that learn by local updates in minutes on two CPU cores.

Residual networks of two-layer blocks, with auxiliary neurons on their skip connections, whose precision spikes as the
error arrives, are trained at several depths beside backprop and plain predictive coding on the same graph: by forward
updates (arXiv 2506.23800), and by updates at the arrival of an error that nothing attenuates, which are backprop's at
any depth (SPEC §10). The picture shows accuracy and time against depth. Without MNIST, scikit-learn's digits stand in
for it.

    python examples/hundred_layers.py --data mnist --root DATA --plot hundred_layers.png
    python examples/hundred_layers.py --data mnist --root DATA --blocks 500 --methods backprop arrival --seeds 0 1 2
    python examples/hundred_layers.py --data digits --blocks 4 --epochs 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import add_seeds, file, number, told_in_a_line
from torch.optim import AdamW
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import pcsim
from pcsim import data, plots
from pcsim.data import ImageData
from pcsim.metrics import Accuracy

WIDTH = 128
METHODS: dict[str, pcsim.LearningRule] = {
    "backprop": pcsim.Backprop(),
    "arrival": pcsim.ArrivalUpdate(),
    "spiking + FU": pcsim.ForwardUpdate(),
    "plain PC": pcsim.SettledUpdate(),
}


def load(options: argparse.Namespace) -> tuple[ImageData, ImageData]:
    """Training and test images as standardised vectors."""
    parts = data.digits() if options.data == "digits" else data.mnist(options.root)
    train, test = data.standardise(*parts)
    return train.flatten(), test.flatten()


def simulator(method: str, blocks: int, features: int, options: argparse.Namespace) -> pcsim.Simulator:
    """Auxiliary neurons for spiking alone: under constant precision chains of them diverge, and backprop needs none."""
    rule = METHODS[method]
    net = pcsim.topologies.residual_mlp(features, WIDTH, 10, blocks=blocks, gain=1 / math.sqrt(blocks))
    precision: pcsim.PrecisionSchedule = pcsim.Constant()
    rate = options.plain_rate
    if method in ("arrival", "spiking + FU"):
        rate = options.rate
        precision = spiking = pcsim.Spiking.for_rate(rate) if method == "arrival" else pcsim.Spiking(alpha=0.0)
        net = pcsim.balance_paths(net, rate, peak=spiking.peak)
    return pcsim.Simulator(net, pcsim.Relaxation(levels(blocks), rate, precision=precision), rule)


def levels(blocks: int) -> int:
    """Of a residual network: stem, two a block, and the output."""
    return 2 * blocks + 2


def train(
    method: str, blocks: int, seed: int, parts: tuple[ImageData, ImageData], options: argparse.Namespace
) -> dict[str, Any]:
    """One run from fresh weights."""
    torch.manual_seed(seed)
    sim = simulator(method, blocks, parts[0].images.shape[1], options)
    optimizer = AdamW(sim.network.parameters(), lr=options.lr, fused=True)
    trainer = pcsim.Trainer(sim, optimizer, metrics=[Accuracy()], progress=options.progress, seed=seed)
    pairs = TensorDataset(parts[0].images, parts[0].labels)
    loader = DataLoader(
        pairs, sampler=BatchSampler(RandomSampler(pairs), options.batch, drop_last=False), batch_size=None
    )
    try:
        trainer.fit(loader, epochs=options.epochs)
    except pcsim.errors.DivergenceError as error:
        print(f"{method}, {levels(blocks)} levels: {error}", file=sys.stderr)
    # In parts, since the values of all nodes are held at once.
    test = list(zip(parts[1].images.split(500), parts[1].labels.split(500), strict=True))
    seconds = [record.seconds for record in trainer.history.records]
    return {
        "method": method,
        "levels": levels(blocks),
        "seed": seed,
        "test": trainer.evaluate(test)["accuracy"],
        "seconds_per_epoch": sum(seconds) / len(seconds) if seconds else None,
    }


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy and time against depth."""
    figure = plots.new_figure(10, 3.8)
    left, right = figure.subfigures(1, 2, width_ratios=[1.35, 1])
    accuracies: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        accuracies.setdefault(run["method"], {}).setdefault(run["levels"], []).append(run["test"])
    plots.accuracy_by_depth(accuracies, chance=0.1, figure=left)
    left.axes[0].set_xlabel("levels")
    axes = right.subplots()
    for method, (colour, marker, dashes) in zip(accuracies, plots.LINES, strict=False):
        own = [run for run in runs if run["method"] == method and run["seconds_per_epoch"]]
        axes.plot([run["levels"] for run in own], [run["seconds_per_epoch"] for run in own],
                  color=colour, marker=marker, linestyle=dashes, label=method)  # fmt: skip
    axes.set(xlabel="levels", ylabel="seconds per epoch", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=("digits", "mnist"), default="digits")
    add("--root", type=Path, default=Path("data"), help="folder that holds MNIST")
    add(
        "--blocks",
        type=number(int, 1),
        nargs="+",
        default=[4, 16, 32, 64],
        help="of two layers each; levels are 2 blocks + 2",
    )
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add(
        "--images", type=number(int, 1), help="of the training set; all by default (plain PC takes hours at 130 levels)"
    )
    add("--epochs", type=number(int, 1), default=2)
    add("--rate", type=number(float, 0, but=0), default=0.8, help="of the latents")
    add("--plain-rate", type=number(float, 0, but=0), default=0.1, help="of the latents of plain PC")
    add("--lr", type=number(float, 0, but=0), default=1e-3, help="of AdamW")
    add("--batch", type=number(int, 1), default=128)
    add_seeds(parser, (0,))
    add("--threads", type=number(int, 1), help="of torch")
    add("--progress", action=argparse.BooleanOptionalAction, default=sys.stderr.isatty())
    add("--json", type=file, metavar="PATH", help="write one object per run")
    add("--plot", type=file, metavar="PATH", help="draw accuracy and time against depth")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train everything that is asked for, and show it as it comes."""
    options = parsed(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with told_in_a_line("hundred_layers.py"):
        training, test = load(options)
    parts = training.take(min(options.images or len(training), len(training))), test
    print(f"{len(parts[0])} training and {len(parts[1])} test images of {options.data}, {options.epochs} epochs")
    print("levels  method          test accuracy  seconds per epoch")
    runs = []
    for blocks in options.blocks:
        for method, seed in itertools.product(options.methods, options.seeds):
            run = train(method, blocks, seed, parts, options)
            seconds = "-" if run["seconds_per_epoch"] is None else f"{run['seconds_per_epoch']:.1f}"
            print(f"{run['levels']:6}  {method:14}  {run['test']:13.4f}  {seconds:>17}", flush=True)
            runs.append(run)
            if options.json is not None:
                options.json.write_text(json.dumps(runs, indent=2) + "\n")
    if options.plot is not None:
        draw(runs, options.plot)


if __name__ == "__main__":
    main()

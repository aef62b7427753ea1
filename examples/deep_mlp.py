"""Which ways of training a predictive coding network survive depth?

Trains chains of linear layers of several depths on the 8x8 digits that come with scikit-learn, by backprop and by
predictive coding with and without the remedies of arXiv 2506.23800: precision that spikes or decays as the error
arrives at a layer, and forward updates (FU) of the weights. The test set is looked at once, after training. Runs are
of one thread each, as many at a time as there are cores: plain predictive coding at depth 20 hangs on its start so much
that one run says nothing, and the bars go from the worst seed to the best.

    python examples/deep_mlp.py
    python examples/deep_mlp.py --methods bp pc spiking+fu --depths 5 10 20 --seeds 0 1 2 --plot deep_mlp.png
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from command_line import add_seeds, device, file, number
from torch.optim import AdamW
from torch.utils.data import DataLoader

import pcsim
from pcsim import plots
from pcsim.data import ImageData
from pcsim.metrics import Accuracy
from pcsim.simulator import ENGINES

METHODS: dict[str, tuple[pcsim.PrecisionSchedule, pcsim.LearningRule]] = {
    "bp": (pcsim.Constant(), pcsim.Backprop()),
    "pc": (pcsim.Constant(), pcsim.SettledUpdate()),
    "pc+fu": (pcsim.Constant(), pcsim.ForwardUpdate()),
    "spiking": (pcsim.Spiking(), pcsim.SettledUpdate()),
    "spiking+fu": (pcsim.Spiking(), pcsim.ForwardUpdate()),
    "decaying+fu": (pcsim.Decaying(), pcsim.ForwardUpdate()),
    "ipc+spiking": (pcsim.Spiking(), pcsim.IncrementalUpdate()),
}
DEPTHS = (5, 10, 20)
DEFAULT_METHODS = tuple(METHODS)
DEFAULT_EPOCHS = 8
DEFAULT_SEEDS = (0, 1, 2)

RATE, LEARNING_RATE, WEIGHT_DECAY, BATCH = 0.5, 1e-3, 1e-4, 64
CELL = 15


def simulator(method: str, depth: int, options: argparse.Namespace) -> pcsim.Simulator:
    """A fresh chain of ``depth`` edges with the rules of a method."""
    precision, rule = METHODS[method]
    net = pcsim.topologies.mlp([64, *[options.width] * (depth - 1), 10]).to(options.device)
    chosen = {} if options.engine is None else {"engine": options.engine}
    return pcsim.Simulator(net, pcsim.Relaxation(steps=depth, rate=RATE, precision=precision), rule, **chosen)


def train(
    method: str, depth: int, seed: int, data: tuple[ImageData, ImageData], options: argparse.Namespace
) -> dict[str, object]:
    """One run, from fresh weights to the test accuracy."""
    torch.manual_seed(seed)
    sim = simulator(method, depth, options)
    optimizer = AdamW(sim.network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    trainer = pcsim.Trainer(sim, optimizer, metrics=[Accuracy()], progress=False, seed=seed)
    batches = DataLoader(data[0].dataset(), BATCH, shuffle=True)
    try:
        trainer.fit(batches, epochs=options.epochs)
        diverged = False
    except pcsim.errors.DivergenceError:
        diverged = True  # the weights of the last good batch are tested
    return {
        "method": method,
        "depth": depth,
        "seed": seed,
        "test_accuracy": trainer.evaluate(DataLoader(data[1].dataset(), 360))["accuracy"],
        "seconds": sum(record.seconds for record in trainer.history.records),
        "diverged": diverged,
        "settings": {
            "epochs": options.epochs,
            "width": options.width,
            "steps": depth,
            "rate": RATE,
            "precision": repr(METHODS[method][0]),
            "rule": repr(METHODS[method][1]),
            "optimizer": f"AdamW(lr={LEARNING_RATE:g}, weight_decay={WEIGHT_DECAY:g})",
            "batch": BATCH,
            "engine": sim.engine.name,
            "device": options.device,
        },
    }


def one(
    wanted: tuple[str, int, int], data: tuple[ImageData, ImageData], options: argparse.Namespace
) -> dict[str, object]:
    """One run, in a process that may have been started for it."""
    torch.set_num_threads(options.threads)
    return train(*wanted, data, options)


@contextmanager
def at_a_time(options: argparse.Namespace) -> Iterator[Callable[..., Iterator[dict[str, object]]]]:
    """What maps runs to their results, in order, as many at a time as asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = options.processes or (cores if options.device == "cpu" else 1)
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def cell(runs: Sequence[dict[str, object]]) -> str:
    """Mean accuracy of some runs; its spread where there are several, and a mark where one diverged."""
    accuracies = torch.tensor([run["test_accuracy"] for run in runs])
    spread = f" ±{accuracies.std():.3f}" if len(runs) > 1 else ""
    return f"{accuracies.mean():.3f}{spread}{'*' if any(run['diverged'] for run in runs) else ''}".rjust(CELL)


def energies(method: str, depth: int, images: ImageData, options: argparse.Namespace) -> pcsim.Trace:
    """One recorded relaxation of a fresh network, the same for every method."""
    torch.manual_seed(options.seeds[0])
    sim = simulator(method, depth, options)
    batch = images.take(min(256, len(images)))
    clamps = {"input": batch.images, "output": batch.one_hot()}
    return sim.infer({name: tensor.to(options.device) for name, tensor in clamps.items()}, record=True)


def draw(runs: Sequence[dict[str, object]], images: ImageData, options: argparse.Namespace) -> None:
    """Accuracy against depth, and the energy of every level over time without and with spiking precision."""
    accuracies: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        accuracies.setdefault(run["method"], {}).setdefault(run["depth"], []).append(run["test_accuracy"])
    depth = sorted(options.depths)[len(options.depths) // 2]
    traces = {
        f"{title}, depth {depth}, untrained": energies(method, depth, images, options)
        for title, method in (("PC", "pc"), ("spiking", "spiking"))
    }
    figure = plots.new_figure(8, 7.2)
    above, below = figure.subfigures(2, height_ratios=[1.1, 1])
    plots.accuracy_by_depth(accuracies, chance=0.1, figure=above)
    plots.energy_by_level(traces, figure=below)
    figure.savefig(options.plot, dpi=150)
    print(f"drawn: {options.plot}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT_METHODS), metavar="METHOD",
                        help=f"some of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument(
        "--depths", nargs="+", type=number(int, 2), default=list(DEPTHS), help="numbers of edges, at least 2"
    )
    parser.add_argument("--epochs", type=number(int, 1), default=DEFAULT_EPOCHS)
    add_seeds(parser, DEFAULT_SEEDS)
    parser.add_argument("--width", type=number(int, 1), default=128, help="units of each hidden layer")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--engine", choices=ENGINES, help="how it is computed; the library's own choice by default")
    parser.add_argument("--threads", type=number(int, 1), default=1, help="of torch, for each process on a CPU")
    parser.add_argument("--processes", type=number(int, 1), help="runs at a time; one for each core by default")
    parser.add_argument("--json", type=file, metavar="PATH", help="write one object per run")
    parser.add_argument("--plot", type=file, metavar="PATH", help="draw accuracies and energies, as PNG or SVG say")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train everything that is asked for, and show it as it comes."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    data = pcsim.data.standardise(*pcsim.data.digits())
    print(f"Test accuracy on {len(data[1])} digits after {options.epochs} epochs on {len(data[0])}; "
          f"seeds {', '.join(map(str, options.seeds))}; depth in edges, width {options.width}")  # fmt: skip
    print("method".ljust(12) + "".join(str(depth).rjust(CELL) for depth in options.depths), flush=True)
    runs: list[dict[str, object]] = []
    with at_a_time(options) as each:
        wanted = list(itertools.product(options.methods, options.depths, options.seeds))
        done = each(partial(one, data=data, options=options), wanted)
        for method in options.methods:
            print(method.ljust(12), end="", flush=True)
            for _ in options.depths:
                own = list(itertools.islice(done, len(options.seeds)))
                print(cell(own), end="", flush=True)
                runs += own
            print(flush=True)
    if any(run["diverged"] for run in runs):
        print("* latents or gradients overflowed; the weights from before it were tested")
    left_out = [method for method in METHODS if method not in options.methods]
    if left_out:
        print(f"left out: {', '.join(left_out)}; ask for them with --methods")
    if len(options.seeds) == 1:
        print(
            "one seed: where a method hangs on its start, as PC and iPC at depth 20 do, it says nothing; give several"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=2) + "\n")
    if options.plot is not None:
        draw(runs, data[0], options)


if __name__ == "__main__":
    main()

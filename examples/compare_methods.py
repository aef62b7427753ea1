"""The methods of the field on one graph, side by side: accuracy, time, memory, agreement with backprop, imbalance.

Each method gets the same small search, over learning rates and rates of the latents, on a held-out part of the training
set; the best pair trains with every seed, and the test set is looked at once per seed. Time is that of a training step
over backprop's, the two taken in turn; memory what all tensors hold after a step; the cosine the least over all edges,
of an untrained network's update with backprop's; products those of a step, counted by PyTorch.

    python examples/compare_methods.py --json methods.json --plot methods.png
    python examples/compare_methods.py --graphs residual4 --methods backprop "spiking + FU" arrival ePC
    python examples/compare_methods.py --graphs mlp10 --parametrisations standard mupc
    python examples/compare_methods.py --graphs vgg5 resnet10 --root DATA --width 0.125 --train-size 2000
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from command_line import add_seeds, file, number, told_in_a_line
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import pcsim
from pcsim import data, diagnosis, plots
from pcsim.data import ImageData
from pcsim.metrics import Accuracy
from pcsim.tables import markdown
from pcsim.verify import RecordingOptimizer

CHANCE = 0.1
ROUNDS = 15
ERROR_STEPS = 5
"""T of ePC, each of whose steps reaches every layer."""


@attrs.frozen
class Method:
    """A way to train.

    Args:
        relaxation: from the depth and the rate of the latents; None where nothing is relaxed.
        rule: how the weights learn.
        nudging: of the target.
        delayed: auxiliary neurons go on skip paths, since errors have to arrive together.
        slower: factor on the rates of the latents that are searched among.
    """

    relaxation: Callable[[int, float], pcsim.Relaxation] | None
    rule: pcsim.LearningRule = attrs.field(factory=pcsim.SettledUpdate)
    nudging: pcsim.Nudge | None = None
    delayed: bool = False
    slower: float = 1.0


def _plain(depth: int, rate: float) -> pcsim.Relaxation:
    return pcsim.Relaxation(depth, rate)


def _spiking(depth: int, rate: float) -> pcsim.Relaxation:
    return pcsim.Relaxation(depth, rate, precision=pcsim.Spiking(alpha=0.0))


def _arriving(depth: int, rate: float) -> pcsim.Relaxation:
    return pcsim.Relaxation(depth, rate, precision=pcsim.Spiking.for_rate(rate))


METHODS: dict[str, Method] = {
    "backprop": Method(None, pcsim.Backprop()),
    "PC": Method(_plain),
    "iPC": Method(_plain, pcsim.IncrementalUpdate()),
    "spiking + FU": Method(_spiking, pcsim.ForwardUpdate(), delayed=True),
    "decaying + FU": Method(
        lambda depth, rate: pcsim.Relaxation(depth, rate, precision=pcsim.Decaying()),
        pcsim.ForwardUpdate(),
        delayed=True,
    ),
    "arrival": Method(_arriving, pcsim.ArrivalUpdate(), delayed=True),
    "held": Method(lambda depth, rate: pcsim.Relaxation(depth, rate, hold_predictions=True)),
    # The errors of all layers move the output at once, so that the energy curves the more the deeper the network.
    "ePC": Method(lambda depth, rate: pcsim.ErrorRelaxation(ERROR_STEPS, rate), slower=0.1),
    "PC-ALM": Method(lambda depth, rate: pcsim.Relaxation(2 * depth, rate, multipliers=rate)),
    "soft nudging": Method(_plain, nudging=pcsim.SoftNudging(0.1, centred=True)),
    "hard nudging": Method(_plain, nudging=pcsim.Nudging(0.1, centred=True)),
}


@attrs.frozen
class Setting:
    """A method on a graph with the rates that were found for it.

    Args:
        graph: its name.
        method: its name.
        parametrisation: of the weights.
        rate: of the latents.
        lr: of AdamW.
    """

    graph: str
    method: str
    parametrisation: str
    rate: float = 0.5
    lr: float = 1e-3

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.method + (", muPC" if self.parametrisation == "mupc" else "")


class Products(TorchDispatchMode):
    """Counts the operations of products; PyTorch's own counter hooks modules, which are then computed otherwise."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and count it."""
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__.rstrip("_")
        count = flop_registry.get(getattr(torch.ops.aten, name, None))
        if name == "linear":
            self.total += 2 * args[0].numel() * len(args[1])
        elif count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def load(graph: str, options: argparse.Namespace) -> tuple[ImageData, ImageData, ImageData]:
    """Training, validation and test images: the digits, or CIFAR-10 where the graph takes large images."""
    if graph.startswith(("mlp", "residual")):
        train, test = data.standardise(*data.digits())
    else:
        scale = data.CIFAR10_MEAN, data.CIFAR10_STD
        train, test = (
            attrs.evolve(part, images=data.normalise(part.images, *scale)) for part in data.cifar10(options.root)
        )
    held_out, train = train.split(max(1, len(train) // 5), seed=0)
    size = options.train_size or len(train)
    return train.take(min(size, len(train))), held_out.take(min(size, len(held_out))), test


def build(setting: Setting, options: argparse.Namespace) -> pcsim.Simulator:
    """A fresh network with the rules of the method."""
    kind, size = re.fullmatch(r"([a-z]+)(\d+)", setting.graph).groups()  # type: ignore[union-attr]
    width = max(1, round(64 * options.width))
    method = METHODS[setting.method]
    if kind == "mlp":
        net = pcsim.topologies.mlp([64, *[width] * (int(size) - 1), 10], parametrisation=setting.parametrisation)
    elif kind == "residual":
        gain = 1.0 if setting.parametrisation == "mupc" else 1 / math.sqrt(int(size))
        net = pcsim.topologies.residual_mlp(
            64, width, 10, blocks=int(size), gain=gain, parametrisation=setting.parametrisation
        )
    elif kind == "vgg":
        net = pcsim.topologies.vgg(f"VGG{size}", image=(3, 32, 32), classes=10, width=options.width)
    else:
        net = pcsim.topologies.resnet(f"ResNet{size}", image=(3, 32, 32), classes=10, width=options.width)
    levels = net.levels()
    depth = max(levels[name] for name, node in net.nodes.items() if node.predicted) + 1
    relaxation = None if method.relaxation is None else method.relaxation(depth, setting.rate)
    if method.delayed and relaxation is not None and kind in ("residual", "resnet"):
        peak = relaxation.precision.peak if isinstance(relaxation.precision, pcsim.Spiking) else 1.0
        net = pcsim.balance_paths(net, setting.rate, peak=peak)
    return pcsim.Simulator(net, relaxation, method.rule, nudging=method.nudging)


def fit(setting: Setting, seed: int, epochs: int, parts: Sequence[ImageData], options: argparse.Namespace) -> float:
    """Accuracy on the second part after training on the first; that of a guess where it diverges."""
    torch.manual_seed(seed)
    sim = build(setting, options)
    optimizer = AdamW(sim.network.parameters(), lr=setting.lr, weight_decay=1e-4, fused=True)
    trainer = pcsim.Trainer(sim, optimizer, metrics=[Accuracy()], progress=False, seed=seed)
    try:
        trainer.fit(DataLoader(parts[0].dataset(), options.batch, shuffle=True), epochs=epochs)
    except pcsim.errors.DivergenceError:
        return CHANCE
    return trainer.evaluate(DataLoader(parts[1].dataset(), 500))["accuracy"]


def searched(setting: Setting, parts: Sequence[ImageData], options: argparse.Namespace) -> Setting:
    """The setting with the rates that do best on the held-out part, the first of equals."""
    method = METHODS[setting.method]
    rates = [method.slower * rate for rate in options.rates[: None if method.relaxation is not None else 1]]
    grid = [attrs.evolve(setting, rate=rate, lr=lr) for rate, lr in itertools.product(rates, options.lrs)]
    return max(grid, key=lambda each: fit(each, 0, options.search_epochs, parts[:2], options))


def clamps_of(sim: pcsim.Simulator, images: ImageData, size: int) -> dict[str, Tensor]:
    """A batch as clamps."""
    some = images.take(size)
    return {"input": some.images, "output": some.one_hot()}


def cosine(setting: Setting, images: ImageData, options: argparse.Namespace) -> float:
    """The least over the edges of the cosine between an untrained network's update and backprop's."""
    own, exact = (update(each, images, options) for each in (setting, attrs.evolve(setting, method="backprop")))
    return min(_cosine(own.get(name), gradient) for name, gradient in exact.items() if "weight" in name)


def update(setting: Setting, images: ImageData, options: argparse.Namespace) -> dict[str, Tensor | None]:
    """What an untrained network learns from a batch, by parameter: gradients, summed where there are several steps."""
    torch.manual_seed(options.seeds[0])
    sim = build(setting, options)
    recorder = RecordingOptimizer(sim.network, learning_rate=0.0)
    sim.update(clamps_of(sim, images, options.batch), recorder)
    total: dict[str, Tensor | None] = dict.fromkeys(recorder.named)
    for gradients in recorder.gradients:
        for name, gradient in gradients.items():
            if gradient is not None:
                before = total[name]
                total[name] = gradient.double() if before is None else before + gradient.double()
    return total


def _cosine(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None or not float(one.norm() * other.norm()):
        return 0.0
    return float((one * other).sum() / (one.norm() * other.norm()))


def stepper(setting: Setting, images: ImageData, options: argparse.Namespace) -> Callable[[], object]:
    """A training step."""
    torch.manual_seed(0)
    sim = build(setting, options)
    optimizer = AdamW(sim.network.parameters(), lr=1e-6, fused=True)
    clamps = clamps_of(sim, images, options.batch)
    return lambda: sim.update(clamps, optimizer)


def timed(settings: Sequence[Setting], images: ImageData, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Median seconds of a step of each, all in turn, and its products over those of the first."""
    steps = [stepper(setting, images, options) for setting in settings]
    counts, seconds = [], [list[float]() for _ in steps]
    for step in steps:
        step()
        with Products() as counter:
            step()
        counts.append(counter.total)
    for _ in range(ROUNDS):
        for step, own in zip(steps, seconds, strict=True):
            before = time.perf_counter()
            step()
            own.append(time.perf_counter() - before)
    return [(statistics.median(own), count / counts[0]) for own, count in zip(seconds, counts, strict=True)]


def memory(setting: Setting, images: ImageData, options: argparse.Namespace) -> float:
    """Megabytes that tensors hold after three steps: weights, moments, gradients, and all that the method keeps."""
    before = held()
    step = stepper(setting, images, options)
    for _ in range(3):
        step()
    return (held() - before) / 1e6


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


def imbalance(setting: Setting, images: ImageData, options: argparse.Namespace) -> list[float]:
    """log₁₀ of each level's energy over the target's, from the target down, after an untrained relaxation."""
    torch.manual_seed(options.seeds[0])
    sim = build(setting, options)
    energies = diagnosis.level_energies(sim.infer(clamps_of(sim, images, options.batch), record=True))[-1]
    return [math.log10(float(energy / energies[0])) if energy > 0 else -math.inf for energy in energies]


def compared(graph: str, options: argparse.Namespace, progress: tqdm[Any]) -> Iterator[dict[str, Any]]:
    """All methods on one graph, one row each."""
    parts = load(graph, options)
    chosen = [
        Setting(graph, method, parametrisation) for parametrisation in options.parametrisations
        for method in options.methods
    ]  # fmt: skip
    found = []
    for setting in chosen:
        progress.set_description(f"{graph}, {setting.title}")
        found.append(searched(setting, parts, options))
        progress.update()
    measured = timed([Setting(graph, "backprop", "standard"), *found], parts[0], options)
    for setting, (seconds, products) in zip(found, measured[1:], strict=True):
        progress.set_description(f"{graph}, {setting.title}")
        accuracies = [fit(setting, s, options.epochs, (parts[0], parts[2]), options) for s in options.seeds]
        relaxed = METHODS[setting.method].relaxation is not None
        yield {
            **attrs.asdict(setting),
            "title": setting.title,
            "rate": setting.rate if relaxed else None,
            "steps": build(setting, options).relaxation.steps if relaxed else None,
            "accuracies": accuracies,
            "time": seconds / measured[0][0],
            "products": products,
            "memory": memory(setting, parts[0], options),
            "cosine": cosine(setting, parts[0], options),
            "imbalance": imbalance(setting, parts[0], options) if relaxed else None,
        }
        progress.update()


def accuracy(values: Sequence[float]) -> str:
    """Mean and spread."""
    spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def show(graph: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of one graph, and the imbalance by level."""
    print(f"\n{graph}\n")
    head = ["method", "test accuracy", "rate", "lr", "T", "time", "products", "tensors, MB", "least cosine"]
    lines = [
        [
            row["title"],
            accuracy(row["accuracies"]),
            "" if row["rate"] is None else f"{row['rate']:g}",
            f"{row['lr']:g}",
            "" if row["steps"] is None else str(row["steps"]),
            f"{row['time']:.2f}",
            f"{row['products']:.2f}",
            f"{row['memory']:.2f}",
            f"{row['cosine']:.4f}",
        ]
        for row in rows
    ]
    print(markdown(head, lines))
    balanced = [row for row in rows if row["imbalance"]]
    if balanced:
        levels = range(max(len(row["imbalance"]) for row in balanced))
        print("\nlog10 of the energy of each level over the target's, untrained, after the last step\n")
        shown = [[row["title"], *(_power(row["imbalance"], level) for level in levels)] for row in balanced]
        print(markdown(["method", *map(str, levels)], shown))


def _power(powers: Sequence[float], level: int) -> str:
    if level >= len(powers):
        return ""
    return "none" if math.isinf(powers[level]) else f"{powers[level]:.1f}"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against graph, and against the time of a step."""
    figure = plots.new_figure(11, 4.2)
    left, right = figure.subfigures(1, 2, width_ratios=[1.3, 1])
    graphs = list(dict.fromkeys(row["graph"] for row in rows))
    accuracies: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        depth = int(re.sub(r"\D", "", row["graph"]))
        accuracies.setdefault(row["title"], {}).setdefault(depth, []).extend(row["accuracies"])
    plots.accuracy_by_depth(accuracies, chance=CHANCE, figure=left)
    left.axes[0].set_xlabel(f"size ({', '.join(graphs)})")
    axes = right.subplots()
    for place, title in enumerate(accuracies):
        colour, marker, dashes = plots.LINES[place % len(plots.LINES)]
        own = [row for row in rows if row["title"] == title]
        axes.plot([row["time"] for row in own], [statistics.mean(row["accuracies"]) for row in own],
                  color=colour, marker=marker, linestyle=dashes)  # fmt: skip
    axes.set(xlabel="time of a step over backprop's", ylabel="test accuracy", xscale="log", ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


def graph_name(text: str) -> str:
    """A graph that can be built."""
    if not re.fullmatch(r"mlp([2-9]|[1-9]\d+)|residual[1-9]\d*|vgg(5|7|9|10|11|13|15|19)|resnet(10|18)", text):
        raise argparse.ArgumentTypeError(
            f"{text} given, expected mlpN (N edges, at least 2), residualN (N blocks), vgg5 ... vgg19, resnet10 or "
            "resnet18"
        )
    return text


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--graphs", nargs="+", type=graph_name, default=["mlp5", "mlp10", "mlp20"], metavar="GRAPH",
        help="mlpN (N edges) or residualN (N blocks) on the digits, vgg5 or resnet10 on CIFAR-10")  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"some of {', '.join(METHODS)}")  # fmt: skip
    add("--parametrisations", nargs="+", choices=("standard", "mupc"), default=["standard"])
    add_seeds(parser, (0, 1, 2))
    add("--epochs", type=number(int, 1), default=8)
    add("--search-epochs", type=number(int, 1), default=2)
    add("--lrs", nargs="+", type=number(float, 0, but=0), default=[1e-3, 3e-3], help="of AdamW, to search among")
    add("--rates", nargs="+", type=number(float, 0, but=0), default=[0.5, 0.1], help="of latents, to search among")
    add("--width", type=number(float, 0, 1000, but=0), default=1.0, help="factor on 64 units, or on channels")
    add("--batch", type=number(int, 1), default=64)
    add("--train-size", type=number(int, 1), help="training images; four fifths of all by default")
    add("--root", type=Path, default=Path("data"), help="folder that holds CIFAR-10")
    add("--progress", action=on_off, default=sys.stderr.isatty())
    add("--threads", type=number(int, 1), help="of torch, on a CPU")
    add("--json", type=file, metavar="PATH", help="write one object per row")
    add("--plot", type=file, metavar="PATH", help="draw accuracy against size and time, as PNG or SVG say")
    options = parser.parse_args(arguments)
    if "mupc" in options.parametrisations:
        for graph in options.graphs:
            if not graph.startswith(("mlp", "residual")):
                parser.error(f"--parametrisations mupc: {graph} has none; use mlpN or residualN")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and show each graph as it comes."""
    options = parsed(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    count = 2 * len(options.graphs) * len(options.methods) * len(options.parametrisations)
    with tqdm(total=count, disable=not options.progress, unit="part") as progress:
        for graph in options.graphs:
            with told_in_a_line("compare_methods.py"):
                own = list(compared(graph, options, progress))
            show(graph, own)
            rows += own
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.plot is not None:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()

"""Train a network on images, by backprop or by predictive coding in any of its variants, resumably.

    python examples/train_images.py --data digits --topology mlp5 --epochs 3
    torchrun --nproc-per-node 2 examples/train_images.py --data digits --topology mlp5 --epochs 3
    python examples/train_images.py --data cifar10 --root DATA --topology vgg10 --width 0.25 --train-size 10000 \
        --settings examples/settings/pc-spiking-forward-bn.json --json vgg10.json --resume runs/vgg10

A part of the training set is held out for early stopping and for the choice of the best epoch; the test set is looked
at once per seed, at the end. With --resume, a run that was stopped, in whatever way, goes on where it was, and ends
with the numbers that it would have ended with. Processes that torchrun starts share every batch, which changes no
number. The defaults are the paper's settings (arXiv 2506.23800; SPEC §9).
Several seeds give a mean and its spread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import attrs
import torch
from command_line import add_seeds, device, file, number, of_the_first, own_device, processes, told_in_a_line
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import pcsim
from pcsim import data
from pcsim.callbacks import Checkpoint, EarlyStopping
from pcsim.data import ImageData
from pcsim.metrics import Accuracy
from pcsim.training import warmup_cosine

MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
PRECISIONS: dict[str, Callable[[argparse.Namespace], pcsim.PrecisionSchedule]] = {
    "none": lambda options: pcsim.Constant(),
    "spiking": lambda options: pcsim.Spiking(alpha=options.alpha, peak=peak(options)),
    "decaying": lambda options: pcsim.Decaying(),
}
RULES: dict[str, Callable[[], pcsim.LearningRule]] = {
    "settled": pcsim.SettledUpdate,
    "forward": pcsim.ForwardUpdate,
    "arrival": pcsim.ArrivalUpdate,
}
LEAST_STEPS = 5


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Images by lists of their numbers: randomly flipped and cropped, by torch's own generator; flat for a chain."""

    def __init__(self, images: ImageData, *, augmented: bool, flat: bool) -> None:
        self.images, self.augmented, self.flat = images, augmented, flat

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images.images[index]
        if self.augmented:
            images = data.augment(images, generator=torch.default_generator)
        return images.flatten(1) if self.flat else images, self.images.labels[index]


class Own(pcsim.Callback):
    """Keeps the settings of the run in its checkpoint, and refuses to go on with others."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return self.settings

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare them."""
        changed = [f"{name}: {state.get(name)} -> {self.settings.get(name)}" for name in {**state, **self.settings}
                   if state.get(name) != self.settings.get(name)]  # fmt: skip
        if changed:
            raise SystemExit(f"--resume: the run there has other settings ({'; '.join(changed)}); give the same, or "
                             "another folder")  # fmt: skip


def load(options: argparse.Namespace) -> tuple[ImageData, ImageData, ImageData]:
    """Training, validation and test images, scaled by the mean and deviation of each channel."""
    if options.data == "digits":
        train, test = (
            attrs.evolve(part, images=part.images.view(-1, 1, 8, 8)) for part in data.standardise(*data.digits())
        )
    else:
        read = {"mnist": data.mnist, "cifar10": data.cifar10, "cifar100": data.cifar100}[options.data]
        scale = {
            "mnist": (MNIST_MEAN, MNIST_STD),
            "cifar10": (data.CIFAR10_MEAN, data.CIFAR10_STD),
            "cifar100": (data.CIFAR100_MEAN, data.CIFAR100_STD),
        }[options.data]
        train, test = (
            attrs.evolve(part, images=data.normalise(part.images, *scale))
            for part in read(options.root, download=options.download)
        )
    if options.validation + (options.train_size or 1) > len(train):
        raise pcsim.errors.DataError(
            f"--validation {options.validation}, --train-size {options.train_size or 'all others'}: {options.data} has "
            f"{len(train)} images for both together; ask for fewer"
        )
    validation, train = train.split(options.validation, seed=0)
    return train.take(options.train_size or len(train)), validation, test


def peak(options: argparse.Namespace) -> float:
    """Precision at the arrival: with the arrival rule 1/rate, so that no error is attenuated (SPEC §10)."""
    return 1 / options.rate if (options.method, options.rule) == ("pc", "arrival") else 1.0


def network(options: argparse.Namespace, image: tuple[int, ...], classes: int) -> pcsim.Network:
    """The topology by name, with auxiliary neurons where asked for."""
    name = options.topology
    if name.startswith("mlp"):
        width = max(1, round(128 * options.width))
        return pcsim.topologies.mlp([math.prod(image), *[width] * (int(name[3:]) - 1), classes])
    if name.startswith("residual"):
        blocks, width = int(name[8:]), max(1, round(128 * options.width))
        net = pcsim.topologies.residual_mlp(math.prod(image), width, classes, blocks=blocks, gain=1 / math.sqrt(blocks))
    else:
        make: Callable[..., pcsim.Network] = pcsim.topologies.vgg if name.startswith("vgg") else pcsim.topologies.resnet
        design = {known.lower(): known for known in (*pcsim.topologies.VGG_DESIGNS, *pcsim.topologies.RESNET_DESIGNS)}
        net = make(design[name], image=image, classes=classes, width=options.width, batch_norm=options.batchnorm)
    if options.method == "bp" or not options.auxiliary:
        return net
    return pcsim.balance_paths(net, options.rate, peak=peak(options) if options.precision == "spiking" else 1.0)


def start_by_kaiming(net: pcsim.Network) -> None:
    """Weights N(0, 2/fan_in) and zero biases (He et al., arXiv 1502.01852): activity keeps its scale with depth."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def simulator(options: argparse.Namespace, net: pcsim.Network) -> pcsim.Simulator:
    """The network with the rules that were asked for; T is its depth unless given, and at least 5."""
    rule = {"bp": pcsim.Backprop, "ipc": pcsim.IncrementalUpdate, "pc": RULES[options.rule]}[options.method]()
    levels = net.levels()
    deepest = max(levels[name] for name, node in net.nodes.items() if node.predicted)
    steps = options.steps or max(LEAST_STEPS, deepest + 1)
    relaxation = pcsim.Relaxation(
        steps, options.rate, precision=PRECISIONS[options.precision](options), momentum=options.momentum
    )
    nudging = None if options.nudge is None else pcsim.Nudging(options.nudge, centred=options.centred)
    return pcsim.Simulator(net, relaxation, rule, nudging=nudging)


def batches(images: ImageData, size: int, *, augmented: bool, flat: bool) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled training batches."""
    dataset = Batches(images, augmented=augmented, flat=flat)
    return DataLoader(dataset, sampler=BatchSampler(RandomSampler(dataset), size, drop_last=False), batch_size=None)


def train(seed: int, parts: tuple[ImageData, ImageData, ImageData], options: argparse.Namespace) -> dict[str, Any]:
    """One run: from fresh weights, or from its checkpoint, to the accuracy on the test set."""
    training, validation, test = parts
    torch.manual_seed(seed)
    net = network(options, tuple(training.images.shape[1:]), training.classes).to(options.device)
    if options.init == "kaiming":
        start_by_kaiming(net)
    flat = len(net["input"].shape) == 1
    if flat:
        validation, test = validation.flatten(), test.flatten()
    sim = simulator(options, net)
    loader = batches(training, options.batch, augmented=options.augment, flat=flat)
    optimizer = AdamW(net.parameters(), lr=options.lr, weight_decay=options.weight_decay, eps=options.eps, fused=True)
    # With iPC the optimizer takes T steps a batch; its rate still changes once a batch.
    schedule = warmup_cosine(optimizer, options.epochs * len(loader))
    best = EarlyStopping("accuracy", patience=options.patience)
    callbacks: list[pcsim.Callback] = [best]
    checkpoint = None if options.resume is None else options.resume / f"seed{seed}.safetensors"
    if checkpoint is not None:
        callbacks += [Own({"seed": seed, **settings_of(options)}), Checkpoint(checkpoint)]
    trainer = pcsim.Trainer(
        sim,
        optimizer,
        scheduler=schedule,
        schedule_per="batch",
        metrics=[Accuracy()],
        callbacks=callbacks,
        progress=options.progress,
        seed=seed,
    )
    if checkpoint is not None and of_the_first(checkpoint.exists()):
        trainer.load_checkpoint(checkpoint)
    remaining = options.epochs - len(trainer.history.records)
    diverged = None
    try:
        if remaining:
            trainer.fit(loader, epochs=remaining, validation=whole(validation, options.batch))
        else:
            best.on_fit_end(trainer, trainer.history)
    except pcsim.errors.DivergenceError as error:
        diverged = str(error)
        if trainer.is_first_process:
            print(f"seed {seed}: {error}", file=sys.stderr)
    records = trainer.history.records
    return {
        "seed": seed,
        "test": trainer.evaluate(whole(test, options.batch))["accuracy"],
        "validation": best.best,
        "best_epoch": best.best_epoch,
        "epochs": len(records),
        "train": records[-1].train["accuracy"] if records else None,
        "validations": [record.validation["accuracy"] for record in records],
        "seconds": sum(record.seconds for record in records),
        "steps": sim.relaxation.steps,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "diverged": diverged,
    }


def whole(images: ImageData, size: int) -> list[tuple[Tensor, Tensor]]:
    """All images in order, in batches."""
    return list(zip(images.images.split(size), images.labels.split(size), strict=True))


def describe(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and spread of the test accuracies."""
    accuracies = torch.tensor([run["test"] for run in runs], dtype=torch.float64)
    spread = f" ±{accuracies.std():.4f} over {len(runs)} seeds" if len(runs) > 1 else " (one seed)"
    return f"test accuracy {accuracies.mean():.4f}{spread}"


def write(path: Path, content: object) -> None:
    """Write JSON that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(scratch, path)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    irrelevant = {"json", "resume", "progress", "root", "threads", "seeds", "settings", "device", "download"}
    return {name: value for name, value in sorted(vars(options).items()) if name not in irrelevant}


def from_file(parser: argparse.ArgumentParser, path: Path, known: Container[str]) -> list[str]:
    """A settings file as the options that it stands for."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--settings {path}: cannot be read ({error})")
    if not isinstance(given, dict):
        parser.error(f'--settings {path}: expected options and their values, as {{"lr": 0.001}}')
    words = []
    for name, value in given.items():
        if name.replace("-", "_") not in known or name == "settings":
            parser.error(f"--settings {path}: unknown option {name}")
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, on top of the settings file that it names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    known = [name.lower() for name in (*pcsim.topologies.VGG_DESIGNS, *pcsim.topologies.RESNET_DESIGNS)]
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--settings", type=Path, help="JSON with options, which those of the command line replace")
    add("--data", choices=("digits", "mnist", "cifar10", "cifar100"), default="digits")
    add("--root", type=Path, default=Path("data"), help="folder that holds MNIST or CIFAR")
    add("--download", action=on_off, default=False, help="fetch images that are missing there")
    add("--topology", default="mlp5", help=f"{', '.join(known)}, mlpN (N edges) or residualN (N blocks)")
    add("--width", type=number(float, 0, 1000, but=0), default=1.0, help="factor on the channels, or on 128 units")
    add("--batchnorm", action=on_off, default=False, help="normalise, with frozen batch statistics in the relaxation")
    add("--auxiliary", action=on_off, default=True, help="auxiliary neurons on skip connections; backprop needs none")
    add(
        "--init",
        choices=("default", "kaiming"),
        default="default",
        help="weights: as the paper's start, or by He et al.",
    )
    add("--method", choices=("bp", "pc", "ipc"), default="pc", help="backprop, predictive coding, incremental")
    add("--precision", choices=PRECISIONS, default="spiking")
    add("--alpha", type=number(float, 0), default=1e-3, help="spiking precision away from the arrival")
    add("--rule", choices=RULES, default="forward", help="of predictive coding; iPC and backprop have their own")
    add(
        "--nudge",
        type=number(float, -1, 1, but=0),
        metavar="BETA",
        help="clamp the target only so far; negative pushes away",
    )
    add("--centred", action=on_off, default=False, help="average over both signs of the nudge")
    add("--rate", type=number(float, 0, but=0), default=0.5, help="of the latents")
    add("--momentum", type=number(float, 0, 1, but=1), default=0.0, help="of the latents")
    add("--steps", type=number(int, 1), help="T; the depth by default, at least 5")
    add(
        "--lr",
        type=number(float, 0, but=0),
        default=7e-4,
        help="of AdamW; warms up to 1.1 times it, then falls to a tenth",
    )
    add("--eps", type=number(float, 0, but=0), default=1e-8, help="of AdamW; much smaller gradients hardly count")
    add("--weight-decay", type=number(float, 0), default=3e-5)
    add("--batch", type=number(int, 1), default=128)
    add("--epochs", type=number(int, 1), default=25)
    add("--patience", type=number(int, 1), help="epochs without a better validation before stopping")
    add("--train-size", type=number(int, 1), help="training images; all that are not for validation by default")
    add("--validation", type=number(int, 1), help="images held out; a tenth of the training set by default")
    add("--augment", action=on_off, help="random flips and crops; of CIFAR by default")
    add_seeds(parser, (0,))
    add("--json", type=file, metavar="PATH", help="write settings and results here after each seed")
    add("--resume", type=Path, metavar="PATH", help="folder of checkpoints: written, and gone on from")
    add("--progress", action=on_off, default=sys.stderr.isatty(), help="bars with time left and accuracy")
    add("--device", type=device, default="cpu")
    add("--threads", type=number(int, 1), help="of torch, on a CPU")
    first, _ = parser.parse_known_args(arguments)
    settings = [] if first.settings is None else from_file(parser, first.settings, vars(first))
    options = parser.parse_args([*settings, *arguments])
    name = options.topology
    if name not in known and not re.fullmatch(r"(mlp|residual)[1-9]\d*", name):
        parser.error(f"--topology {name}: expected {', '.join(known)}, mlpN or residualN")
    if options.batchnorm and name not in known:
        parser.error(f"--batchnorm: {name} has no normalisation; use {', '.join(known)}")
    if options.centred and options.nudge is None:
        parser.error("--centred: nothing is nudged; give --nudge as well")
    if options.resume is not None and options.resume.exists() and not options.resume.is_dir():
        parser.error(f"--resume {options.resume}: a file, expected a folder")
    if options.augment is None:
        options.augment = options.data.startswith("cifar")
    if options.validation is None:
        options.validation = {"digits": 144, "mnist": 6000}.get(options.data, 5000)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every seed, and tell."""
    options = parsed(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.device = own_device(options.device)
    with told_in_a_line("train_images.py"), processes() as first, redirect_stdout(sys.stdout if first else None):
        run(options, first)


def run(options: argparse.Namespace, first: bool) -> None:
    """All seeds; the first process alone downloads and writes."""
    parts = load(options) if first or not options.download else None
    of_the_first(None)  # the others wait until the images are there
    parts = load(options) if parts is None else parts
    print(f"{options.topology} on {options.data}: {', '.join(str(len(part)) for part in parts)} images for training, "
          "validation and test", flush=True)  # fmt: skip
    runs = []
    for seed in options.seeds:
        runs.append(train(seed, parts, options))
        print(f"seed {seed}: validation {runs[-1]['validation'] or math.nan:.4f}, test {runs[-1]['test']:.4f} "
              f"after {runs[-1]['epochs']} epochs, {runs[-1]['seconds']:.0f} s", flush=True)  # fmt: skip
        if options.json is not None and first:
            write(options.json, {"settings": settings_of(options), "runs": runs})
    print(describe(runs))


if __name__ == "__main__":
    main()

"""A transformer learns to write Python, character by character, from the source of Python's own standard library.

The text is on every machine that runs this. A decoder (``pcsim.topologies.transformer``) predicts each character from
those before it, and learns by backprop, and by local updates: at the arrival of errors that nothing attenuates, which
are backprop's (SPEC §10), by forward updates with spiking precision (arXiv 2506.23800), and by plain predictive coding
on the same graph. The first two local methods have auxiliary neurons on the skips. All methods take the same batches in
turn, so that whatever else the machine does meets all alike; one that is slower than the time given stops early. Bits
per character are those of files that are held out, which choose nothing.

    python examples/characters.py --plot characters.png --json characters.json
    python examples/characters.py --steps 3000 --seconds 3600 --methods backprop arrival --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import add_seeds, file, number, told_in_a_line
from torch import Tensor
from torch.nn.functional import one_hot
from torch.optim import AdamW

import pcsim
from pcsim import plots

METHODS: dict[str, pcsim.LearningRule] = {
    "backprop": pcsim.Backprop(),
    "arrival": pcsim.ArrivalUpdate(),
    "spiking + FU": pcsim.ForwardUpdate(),
    "plain PC": pcsim.SettledUpdate(),
}
RATE, PLAIN_RATE = 0.8, 0.05
HELD_OUT = 10
"""Every so-many-th file is held out."""
WINDOWS = 64
"""Of the files that are held out, on which bits are measured."""
PROMPT = "def "


def read_text(folder: Path) -> tuple[str, str]:
    """The text of the modules in a folder, to learn from and to measure with; what is not ASCII is a question mark."""
    found = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    texts = [text.encode("ascii", "replace").decode() for text in found]
    held_out = texts[::HELD_OUT]
    return "".join(text for place, text in enumerate(texts) if place % HELD_OUT), "".join(held_out)


def numbered(text: str, characters: str) -> Tensor:
    """Numbers of the characters, (length,); those that are not known are question marks."""
    number = {character: place for place, character in enumerate(characters)}
    return torch.tensor([number.get(character, number["?"]) for character in text])


def windows(text: Tensor, count: int, length: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Clamps of windows drawn from a text: characters, (count, length), and those that follow, one-hot."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    chosen = text[starts + torch.arange(length + 1)]
    return {"input": chosen[:, :-1], "output": one_hot(chosen[:, 1:], classes).float()}


class Run:
    """One method in training, from fresh weights."""

    def __init__(self, method: str, seed: int, classes: int, options: argparse.Namespace) -> None:
        self.method, self.seed = method, seed
        torch.manual_seed(seed)
        shape = {"length": options.length, "width": options.width, "heads": options.heads, "blocks": options.blocks}
        net = pcsim.topologies.transformer(vocabulary=classes, **shape)
        levels = max(net.levels().values())
        rule, rate, precision = METHODS[method], PLAIN_RATE, pcsim.Constant()
        if method in ("arrival", "spiking + FU"):
            rate = RATE
            precision = spiking = pcsim.Spiking.for_rate(rate) if method == "arrival" else pcsim.Spiking(alpha=0.0)
            net = pcsim.balance_paths(net, rate, peak=spiking.peak)
        self.simulator = pcsim.Simulator(net, pcsim.Relaxation(levels, rate, precision=precision), rule)
        self.optimizer = AdamW(net.parameters(), lr=options.lr, fused=True)
        self.scheduler = pcsim.warmup_cosine(self.optimizer, options.steps)
        self.bits: list[float] = []
        self.seconds: list[float] = []
        self.times: list[float] = []
        """Of each step; bits, steps and seconds are of each measurement."""
        self.steps: list[int] = []
        self.diverged = False

    def learn(self, clamps: dict[str, Tensor]) -> None:
        """One step, timed; a method that diverges stops with the weights that it had."""
        start = time.perf_counter()
        try:
            self.simulator.update(clamps, self.optimizer)
        except pcsim.errors.DivergenceError:
            self.diverged = True
            return
        self.times.append(time.perf_counter() - start)
        self.scheduler.step()

    def measure(self, clamps: dict[str, Tensor]) -> None:
        """Bits per character of windows that are held out."""
        logits = self.simulator.predict({"input": clamps["input"]})["output"]
        bits = -(clamps["output"] * logits.log_softmax(-1)).sum(-1).mean() / math.log(2)
        self.bits.append(float(bits))
        self.steps.append(len(self.times))
        self.seconds.append(sum(self.times))

    @property
    def seconds_per_step(self) -> float:
        """The median; NaN where no step was taken."""
        return statistics.median(self.times) if self.times else math.nan

    def sample(self, characters: str, length: int, temperature: float = 0.7) -> str:
        """Text that the network goes on writing after the prompt."""
        generator, text = torch.Generator().manual_seed(self.seed), PROMPT
        places = self.simulator.network["input"].shape[0]
        while len(text) < length:
            read = numbered(text[-places:], characters)
            padded = torch.nn.functional.pad(read, (0, places - len(read)))  # what comes later is not attended to
            logits = self.simulator.predict({"input": padded[None]})["output"][0, len(read) - 1]
            text += characters[int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))]
        return text

    def report(self) -> dict[str, Any]:
        """What is written of it."""
        measured = {"steps": self.steps, "seconds": self.seconds, "bits_per_character": self.bits}
        told = {"method": self.method, "seed": self.seed, "diverged": self.diverged}
        return {**told, "seconds_per_step": self.seconds_per_step, **measured}


def train(seed: int, texts: tuple[Tensor, Tensor], classes: int, options: argparse.Namespace) -> list[Run]:
    """All methods in turn on the same batches."""
    runs = [Run(method, seed, classes, options) for method in options.methods]
    batches, held_out = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    shown = windows(texts[1], WINDOWS, options.length, classes, held_out)
    for step in range(1, options.steps + 1):
        clamps = windows(texts[0], options.batch, options.length, classes, batches)
        able = [run for run in runs if not run.diverged and sum(run.times) < options.seconds]
        going = [run for run in able if len(run.times) == step - 1]
        for run in going:
            run.learn(clamps)
            if run.diverged:
                print(f"{step:6}  {run.method} has diverged, and stops", flush=True)
            elif step % options.every == 0 or step == options.steps:
                run.measure(shown)
        there = [run for run in going if not run.diverged]
        if there and step % options.every == 0:
            print(f"{step:6}  " + "  ".join(f"{run.method} {run.bits[-1]:.3f}" for run in there), flush=True)
    return runs


def verdict(runs: Sequence[Run]) -> None:
    """What the methods came to, and how they stand to backprop at the last step that both have measured."""
    print("method          steps  bits per character  seconds per step")
    for run in runs:
        bits = f"{run.bits[-1]:.3f}" if run.bits else "-"
        print(f"{run.method:14}  {len(run.times):5}  {bits:>18}  {run.seconds_per_step:16.3f}")
    backprop = next((run for run in runs if run.method == "backprop"), None)
    for run in runs:
        both = sorted(set(run.steps) & set(backprop.steps)) if backprop not in (None, run) else []
        if both and backprop is not None:
            apart = run.bits[run.steps.index(both[-1])] - backprop.bits[backprop.steps.index(both[-1])]
            longer = statistics.median(one / other for one, other in zip(run.times, backprop.times, strict=False))
            print(f"{run.method}: {apart:+.3f} bits from backprop at step {both[-1]}, {longer:.2f} times its time")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Bits per character against steps and against time."""
    figure = plots.new_figure(10, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    styles = dict(zip(METHODS, plots.LINES, strict=False))
    for run in runs:
        colour, marker, dashes = styles[run.method]
        for axes, along in ((left, run.steps), (right, run.seconds)):
            axes.plot(along, run.bits, color=colour, marker=marker, linestyle=dashes,
                      label=run.method if run.seed == 0 else None)  # fmt: skip
    left.set(xlabel="steps", ylabel="bits per character")
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of Python modules")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--steps", type=number(int, 1), default=500, help="of learning, one batch each")
    add("--seconds", type=number(float, 0), default=180.0, help="after which a method stops")
    add("--every", type=number(int, 1), default=50, help="steps from one measurement to the next")
    add("--blocks", type=number(int, 1), default=3)
    add("--width", type=number(int, 1), default=96)
    add("--heads", type=number(int, 1), default=4)
    add("--length", type=number(int, 1), default=64, help="characters that are seen at once")
    add("--batch", type=number(int, 2), default=32)
    add("--lr", type=number(float, 0, but=0), default=5e-3, help="of AdamW")
    add_seeds(parser, (0,))
    add("--characters", type=number(int, 0), default=300, help="that each method writes at the end")
    add("--threads", type=number(int, 1), help="of torch")
    add("--json", type=file, metavar="PATH", help="write one object per run")
    add("--plot", type=file, metavar="PATH", help="draw bits per character against steps and time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every method, tell, write and draw."""
    options = parsed(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text, held_out = read_text(options.text)
    if min(len(text), len(held_out)) <= options.length + 1:
        raise SystemExit(f"characters.py: {options.text} given, expected a folder with more text in Python modules")
    characters = "".join(sorted({*text, *PROMPT, "?"}))
    texts = numbered(text, characters), numbered(held_out, characters)
    print(f"{len(text)} characters to learn from, {len(characters)} different ones, {len(held_out)} held out")
    runs: list[Run] = []
    with told_in_a_line("characters.py"):
        for seed in options.seeds:
            runs += train(seed, texts, len(characters), options)
    verdict(runs)
    if options.json is not None:
        options.json.write_text(json.dumps([run.report() for run in runs], indent=2) + "\n")
    if options.plot is not None:
        draw(runs, options.plot)
    for run in runs if options.characters else ():
        print(f"\n{run.method}, seed {run.seed}:\n{run.sample(characters, options.characters)}")


if __name__ == "__main__":
    main()

"""How two ways of learning are compared: the same search for both, the same seeds, a paired test, and a verdict."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from matplotlib.figure import Figure
from scipy.stats import t as student

sys.path.append(str(Path(__file__).parents[1]))
from command_line import add_seeds, file
from command_line import number as number  # for the scripts, too

from pcsim import plots
from pcsim.tables import markdown

Chosen = TypeVar("Chosen")

FIRST_SEARCH_SEED = 1000
"""Of the search: none of its seeds is among those that are reported."""
CLEAR = 3.0
"""Standard errors from which a difference counts; what is less is called noise."""
STYLES = [plots.LINES[place] for place in (3, 1, 5, 6)]
"""Colour, marker and dashes in figures, predictive coding's first."""
HEAD = ["setting", "compared with", "predictive coding", "the other", "standard errors ahead", "p", "verdict"]


@attrs.frozen
class Comparison:
    """Predictive coding and another method over the same seeds.

    Args:
        setting: what was done.
        against: the other method.
        ours: a result of predictive coding for each seed.
        theirs: the other's, for the same seeds.
        less: whether less is better.
    """

    setting: str
    against: str
    ours: list[float]
    theirs: list[float]
    less: bool = False

    @property
    def ahead(self) -> float:
        """The mean of the differences over its standard error, positive where predictive coding is better."""
        signed = [(b - a) if self.less else (a - b) for a, b in zip(self.ours, self.theirs, strict=True)]
        if len(signed) < 2:
            return 0.0
        mean, error = statistics.mean(signed), statistics.stdev(signed) / len(signed) ** 0.5
        return mean / error if error else (float("inf") * mean if mean else 0.0)

    @property
    def p(self) -> float:
        """Of a paired t-test over the seeds, two-sided; 1 where nothing can be tested."""
        count = len(self.ours)
        return 1.0 if count < 2 else 2 * float(student.sf(abs(self.ahead), count - 1))

    @property
    def verdict(self) -> str:
        """Ahead, behind, or within the noise."""
        if abs(self.ahead) < CLEAR:
            return "within the noise"
        return "ahead" if self.ahead > 0 else "behind"

    def row(self) -> list[str]:
        """What the table says of it."""
        shown = "<1e-9" if self.p < 1e-9 else f"{self.p:.1g}"
        numbers = [mean_and_spread(self.ours), mean_and_spread(self.theirs), f"{self.ahead:+.1f}", shown]
        return [self.setting, self.against, *numbers, self.verdict]


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    digits = 0 if statistics.mean(values) > 20 else 3
    spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(comparisons: Sequence[Comparison]) -> str:
    """A row each, in Markdown."""
    return markdown(HEAD, [comparison.row() for comparison in comparisons])


def search(
    grid: Sequence[Chosen], score: Callable[[Chosen, int], float], *, less: bool = False, seeds: int = 3
) -> Chosen:
    """The member of a grid with the best mean score over the seeds of the search, the first of equals.

    Args:
        grid: what to choose among.
        score: of a member with a seed, from data that are not reported.
        less: whether less is better.
        seeds: of the search, how many.
    """
    own = range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + seeds)
    means = [statistics.mean(score(each, seed) for seed in own) for each in grid]
    return grid[means.index(min(means) if less else max(means))]


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A reader of the options that every comparison has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_seeds(parser, range(10), FIRST_SEARCH_SEED - 1)
    parser.add_argument("--threads", type=number(int, 1), default=1, help="of torch; networks this small need one")
    parser.add_argument("--json", type=file, metavar="PATH", help="write settings and results of every seed")
    parser.add_argument("--plot", type=file, metavar="PATH", help="draw the figure, as PNG or SVG say")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with its threads set."""
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return options


def report(comparisons: Sequence[Comparison], chosen: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table and the verdict; write both sides of every seed, and what the search has chosen, if asked to."""
    print(f"\n{table(comparisons)}\n")
    verdicts = [comparison.verdict for comparison in comparisons]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in ("ahead", "within the noise", "behind"))
    print(f"{len(verdicts)} comparisons over {len(options.seeds)} seeds: {counts} (3 standard errors)")
    if options.json is not None:
        kept = {name: value for name, value in vars(options).items() if name not in ("json", "plot", "root")}
        content = {"settings": kept, "chosen": chosen, "comparisons": [attrs.asdict(each) for each in comparisons]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> list[Comparison]:
    """The comparisons that a script has written."""
    return [Comparison(**each) for each in json.loads(path.read_text())["comparisons"]]


def save(figure: Figure, path: Path) -> None:
    """Write a figure and tell where."""
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")

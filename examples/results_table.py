"""Assemble the runs of ``train_images.py --json`` into one Markdown table; a cell is filled as soon as its run is done.

    python examples/results_table.py results/*.json
    python examples/results_table.py --commands results/*.json
    python examples/results_table.py --of validation results/search/*.json

With --commands, the command that repeats each row follows the table.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import train_images

from pcsim.tables import markdown

HEAD = ["data", "network", "width", "BF", "auxiliary", "method", "{of} accuracy", "seeds", "best epoch", "epochs",
        "images", "rate", "α", "T", "lr", "hours"]  # fmt: skip
METHODS = ("backprop", "PC", "iPC")


def method(settings: dict[str, Any]) -> str:
    """In the paper's words."""
    if settings["method"] == "bp":
        return "backprop"
    name = "iPC" if settings["method"] == "ipc" else "PC"
    precision = "" if settings["precision"] == "none" else f" + {settings['precision']}"
    rules = {"forward": " + FU", "arrival": " + arrival"} if settings["method"] == "pc" else {}
    rule = rules.get(settings["rule"], "")
    nudge = "" if settings["nudge"] is None else f", nudged {settings['nudge']}{' centred' * settings['centred']}"
    return name + precision + rule + nudge


def line(content: dict[str, Any], of: str) -> list[str]:
    """One file as a row."""
    settings, runs = content["settings"], content["runs"]
    accuracies = torch.tensor([run[of] for run in runs], dtype=torch.float64)
    spread = f" ±{accuracies.std():.4f}" if len(runs) > 1 else ""
    residual = settings["topology"].startswith("res") and settings["method"] != "bp"
    inferring = settings["method"] != "bp"
    spiking = inferring and settings["precision"] == "spiking"
    return [
        {"cifar10": "CIFAR-10"}.get(settings["data"], settings["data"]),
        settings["topology"].upper().replace("RESNET", "ResNet")
        + (", He start" if settings.get("init", "default") == "kaiming" else ""),
        f"{settings['width']:g}",
        "yes" if settings["batchnorm"] else "",
        ("yes" if settings["auxiliary"] else "no") if residual else "",
        method(settings),
        f"{accuracies.mean():.4f}{spread}{' (diverged)' if any(run['diverged'] for run in runs) else ''}",
        str(len(runs)),
        "/".join(str(run["best_epoch"]) for run in runs),
        str(settings["epochs"]),
        str(settings["train_size"] or "all"),
        f"{settings['rate']:g}" if inferring else "",
        f"{settings['alpha']:g}" if spiking else "",
        str(runs[0]["steps"]) if inferring else "",
        f"{settings['lr']:g}",
        f"{sum(run['seconds'] for run in runs) / 3600:.2f}",
    ]


def place(content: dict[str, Any]) -> tuple[object, ...]:
    """Where a row belongs: by network, then by method from backprop to the most elaborate, then by its settings."""
    settings = content["settings"]
    family, size = re.findall(r"[a-z]+|\d+", settings["topology"])
    name = method(settings)
    rank = METHODS.index(re.split(r"[ ,]", name)[0]), len(name), name
    rest = (settings[key] for key in ("rate", "alpha", "lr"))
    start = settings.get("init", "default")
    network = family == "resnet", family, int(size), settings["batchnorm"], start
    return settings["data"], *network, *rank, not settings["auxiliary"], settings["steps"] or 0, *rest


def command(content: dict[str, Any]) -> str:
    """What repeats a row: every option that is not at its default."""
    settings = content["settings"]
    defaults = train_images.settings_of(train_images.parsed(["--data", settings["data"]]))
    words = ["python examples/train_images.py --data", settings["data"]]
    if settings["data"] != "digits":
        words.append("--root DATA")
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if name == "data" or value == defaults[name]:
            continue
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    if len(content["runs"]) > 1:
        words.append(f"--seeds {' '.join(str(run['seed']) for run in content['runs'])}")
    return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--of", choices=("test", "validation"), default="test", help="whose accuracy to show")
    parser.add_argument("--commands", action="store_true", help="print what repeats each row as well")
    options = parser.parse_args(arguments)
    contents = sorted((json.loads(path.read_text()) for path in options.files), key=place)
    head = [title.format(of=options.of) for title in HEAD]
    print(markdown(head, [line(content, options.of) for content in contents]))
    if options.commands:
        print()
        for content in contents:
            print(f"    {command(content)}")


if __name__ == "__main__":
    main()

"""Assemble the runs of ``train_images.py --json`` into one Markdown table; a cell is filled as soon as its run is done.

python examples/results_table.py results/*.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HEAD = ["data", "network", "width", "BF", "auxiliary", "method", "test accuracy", "seeds", "best epoch", "epochs",
        "images", "rate", "α", "T", "lr", "hours"]  # fmt: skip


def method(settings: dict[str, Any]) -> str:
    """In the paper's words."""
    if settings["method"] == "bp":
        return "backprop"
    name = "iPC" if settings["method"] == "ipc" else "PC"
    precision = "" if settings["precision"] == "none" else f" + {settings['precision']}"
    rule = " + FU" if settings["method"] == "pc" and settings["rule"] == "forward" else ""
    nudge = "" if settings["nudge"] is None else f", nudged {settings['nudge']}{' centred' * settings['centred']}"
    return name + precision + rule + nudge


def line(content: dict[str, Any]) -> list[str]:
    """One file as a row."""
    settings, runs = content["settings"], content["runs"]
    accuracies = torch.tensor([run["test"] for run in runs], dtype=torch.float64)
    spread = f" ±{accuracies.std():.4f}" if len(runs) > 1 else ""
    residual = settings["topology"].startswith("res") and settings["method"] != "bp"
    inferring = settings["method"] != "bp"
    spiking = inferring and settings["precision"] == "spiking"
    return [
        {"cifar10": "CIFAR-10"}.get(settings["data"], settings["data"]),
        settings["topology"].upper().replace("RESNET", "ResNet"),
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    rows = [line(json.loads(path.read_text())) for path in parser.parse_args(arguments).files]
    for row in (HEAD, ["---"] * len(HEAD), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

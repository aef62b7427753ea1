"""How a step's time grows with depth and with the number of nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.contender import BATCHED, CPU, Contender
from benchmarks.rounds import measure
from benchmarks.rows import Row
from benchmarks.simulated import simulated
from benchmarks.variants import CONSTANT, SILENT, Variant
from benchmarks.workloads import (
    DEPTHS,
    NODES,
    SMALL_DEPTHS,
    SMALL_NODES,
    SMALL_WORKLOADS,
    Graph,
    deep_chain,
    random_graph,
)

DEPTH, NODE_COUNT = "depth", "nodes"
WARM_UP = 3


def grow(axis: str, variants: Sequence[Variant], rounds: int, small: bool, device: torch.device = CPU) -> list[Row]:
    """Rows of all sizes along "depth" (T = depth) or "nodes", which take turns."""
    contenders: list[Contender] = []
    if axis == DEPTH:
        for depth in SMALL_DEPTHS if small else DEPTHS:
            for variant in (v for v in (SILENT, CONSTANT) if v in variants):
                contenders.append(simulated(deep_chain(depth, 4 if small else 64), variant, device=device))
                contenders[-1].size = depth
    elif CONSTANT in variants:
        stand_in = SMALL_WORKLOADS["W4"]
        assert isinstance(stand_in, Graph)
        for nodes in SMALL_NODES if small else NODES:
            graph = random_graph(nodes, *([stand_in.width] if small else []))
            contenders.append(simulated(graph, CONSTANT, device=device))
            contenders[-1].size = nodes
    return measure(contenders, axis, rounds, WARM_UP) if contenders else []


def curve(rows: Sequence[Row], axis: str, variant: str) -> tuple[list[int], list[float]]:
    """Sizes and milliseconds."""
    found = [row for row in rows if (row.workload, row.variant, row.implementation) == (axis, variant, BATCHED)]
    found.sort(key=lambda row: row.size or 0)
    return [row.size or 0 for row in found], [row.median_ms for row in found]


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The slope of the straight line through log size and log time, by least squares; NaN for fewer than two sizes."""
    if len(sizes) < 2:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def curves(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Axes and variants that were measured."""
    return list(dict.fromkeys((row.workload, row.variant) for row in rows if row.size is not None))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the curves, one panel for each axis, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for panel, axis in zip(panels, (DEPTH, NODE_COUNT), strict=True):
        for named, variant in curves(rows):
            if named == axis:
                sizes, times = curve(rows, axis, variant)
                label = f"{variant}: exponent {exponent(sizes, times):.2f}"
                panel.loglog(sizes, times, "o-", label=label)
                panel.legend(frameon=False)
        panel.set_xlabel({DEPTH: "layers", NODE_COUNT: "nodes (5 edges each)"}[axis])
        panel.set_ylabel("training step, ms")
        panel.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    plt.close(figure)

"""What pcsim's batched engine must reach, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contender import BACKPROP_LOOP, BATCHED, COMPILED_STEPS, FLOOR, LOOP, PEERS
from benchmarks.growth import DEPTH, NODE_COUNT, curve, exponent
from benchmarks.rows import Row, find
from benchmarks.variants import ARRIVAL, BACKPROP, CONSTANT, CONSTANT_INPUTS, SILENT

SILENT_TO_BACKPROP = {"W1": 1.05, "W2": 0.9, "W3": 1.0, "W5": 0.55}
CONSTANT_TO_LOOP = {"W1": 0.33, "W2": 0.17, "W3": 0.62}
CONSTANT_TO_FLOOR = {"W1": 1.6, "W2": 1.4, "W3": 1.8}
CONSTANT_TO_PYDEEPITY = {"W1": 0.8, "W1r": 1.0, "W2": 0.4, "W6": 1.0, "W7": 2.5}
COMPILED_TO_PYDEEPITY = {"W7": 1.3}
CONSTANT_TO_PEER = {"W1": 0.75, "W2": 0.75, "W3": 0.28}
ARRIVAL_TO_BACKPROP = {"W1": 1.15, "W2": 1.15, "W3": 1.15, "W5": 0.65}
ARRIVAL_TO_SILENT = dict.fromkeys(("W1", "W2", "W3", "W5"), 1.05)
SILENT_TO_PEER = {"W1": 0.25, "W2": 0.25, "W3": 0.25}
PLANNING_SECONDS = {("W4", CONSTANT.name): 3.0, ("W5", SILENT.name): 2.0}
EXPONENTS = {(NODE_COUNT, CONSTANT.name): 1.1, (DEPTH, SILENT.name): 1.1, (DEPTH, CONSTANT.name): 2.1}
MEMORY, MEMORY_OF = 1.5, {"W3": 3.5, "W4": 2.2}


@dataclass(frozen=True)
class Limit:
    """One limit.

    Args:
        what: is measured.
        most: it may be.
        measured: None if it was not.
    """

    what: str
    most: float
    measured: float | None

    @property
    def verdict(self) -> str:
        """Whether it is kept."""
        if self.measured is None:
            return "not measured"
        return "pass" if self.measured <= self.most else "over"


def ratio(above: Row | None, below: Row | None) -> float | None:
    """Of median times."""
    return None if above is None or below is None else above.median_ms / below.median_ms


def fastest_peer(rows: Sequence[Row], workload: str) -> Row | None:
    """The peer with the shortest training step."""
    found = [row for name in PEERS if (row := find(rows, workload, CONSTANT.name, name)) is not None]
    return min(found, key=lambda row: row.median_ms, default=None)


def limits(rows: Sequence[Row]) -> list[Limit]:
    """All limits, in order."""

    def batched(workload: str, variant: str) -> Row | None:
        return find(rows, workload, variant, BATCHED)

    def compare(
        name: str, most: Mapping[str, float], variant: str, other: tuple[str, str] | None, own: str = BATCHED
    ) -> list[Limit]:
        return [
            Limit(
                f"{name}, {workload}",
                bound,
                ratio(
                    find(rows, workload, variant, own),
                    find(rows, workload, *other) if other else fastest_peer(rows, workload),
                ),
            )
            for workload, bound in most.items()
        ]

    found = compare("spiking-0 / backprop step", SILENT_TO_BACKPROP, SILENT.name, (BACKPROP.name, BACKPROP_LOOP))
    found += compare("arrival / backprop step", ARRIVAL_TO_BACKPROP, ARRIVAL.name, (BACKPROP.name, BACKPROP_LOOP))
    found += compare("arrival / spiking-0", ARRIVAL_TO_SILENT, ARRIVAL.name, (SILENT.name, BATCHED))
    found += compare("constant / plain PyTorch loop", CONSTANT_TO_LOOP, CONSTANT.name, (CONSTANT.name, LOOP))
    found += compare("constant / floor", CONSTANT_TO_FLOOR, CONSTANT.name, (CONSTANT.name, FLOOR))
    found += compare("constant / fastest peer", CONSTANT_TO_PEER, CONSTANT.name, None)
    inputs = CONSTANT_INPUTS.name
    found += compare("constant, inputs / pydeepity", CONSTANT_TO_PYDEEPITY, inputs, (inputs, "pydeepity"))
    found += compare(
        "compiled, constant, inputs / pydeepity", COMPILED_TO_PYDEEPITY, inputs, (inputs, "pydeepity"), COMPILED_STEPS
    )
    found += compare("spiking-0 / fastest peer's constant", SILENT_TO_PEER, SILENT.name, None)
    for (workload, variant), seconds in PLANNING_SECONDS.items():
        row = batched(workload, variant)
        found.append(
            Limit(f"planning and stacking, s, {workload}", seconds, None if row is None else row.planning_ms / 1e3)
        )
    for (axis, variant), most in EXPONENTS.items():
        slope = exponent(*curve(rows, axis, variant))
        found.append(Limit(f"growth with {axis}, {variant}", most, None if math.isnan(slope) else slope))
    for row in rows:
        if row.implementation == BATCHED and row.peak_mb is not None and row.budget_mb:
            share = row.peak_mb / row.budget_mb
            found.append(
                Limit(f"peak memory / budget, {row.workload} {row.variant}", MEMORY_OF.get(row.workload, MEMORY), share)
            )
    return found

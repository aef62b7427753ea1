"""The rows of a result: what was measured of one implementation of one variant on one workload."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

AGREEMENT = {"W1": 1e-3, "W2": 5e-3, "W3": 2e-3}
"""How far apart half squared errors may be, relatively, between implementations of the same computation: float32 sums
in another order, through as many layers and steps, and through Adam, which divides by gradients that may be tiny."""


@dataclass
class Row:
    """One row.

    Args:
        workload: W1 to W5; "depth" and "nodes" for the growth with either; a topology of full width, or its epoch.
        variant: how it was trained.
        implementation: by whom.
        median_ms: of the timed training steps.
        min_ms: of the same.
        first_ms: the first step, with planning, stacking or compiling.
        planning_ms: how much longer than a median step the first two took together; the batched engine makes the
            second of its two programs at the second step.
        peak_mb: most memory that a training step holds, in 10⁶ bytes.
        tensors_mb: what all tensors that are alive after a step hold of it.
        budget_mb: what latents, predictions, errors, weights, their gradients and the optimizer's state take.
        rounds: timed steps.
        trained: training steps behind ``half_squared_error``.
        half_squared_error: of a forward pass after so many training steps, a mean over samples.
        agrees: whether that of the batched engine is the same.
        size: layers or nodes, in rows of growth.
        layout: memory format, where several were tried and this was the fastest.
        threads: that each implementation may use.
        device: that computed, and the PyTorch it was used by; empty for a CPU that nobody asked about.
        accuracy: share of test images named rightly, of an epoch.
        note: anything else.
    """

    workload: str
    variant: str
    implementation: str
    median_ms: float
    min_ms: float
    first_ms: float
    planning_ms: float
    peak_mb: float | None = None
    tensors_mb: float | None = None
    budget_mb: float | None = None
    rounds: int = 0
    trained: int = 0
    half_squared_error: float | None = None
    agrees: bool | None = None
    size: int | None = None
    layout: str = ""
    threads: int = 0
    device: str = ""
    accuracy: float | None = None
    note: str = ""


def save(rows: Iterable[Row], path: Path) -> None:
    """Write rows as a JSON list of one object each."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def load(path: Path) -> list[Row]:
    """Read what :func:`save` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())]


def find(rows: Sequence[Row], workload: str, variant: str, implementation: str) -> Row | None:
    """The row of that name, if it was measured."""
    key = (workload, variant, implementation)
    return next((row for row in rows if (row.workload, row.variant, row.implementation) == key), None)


def check_agreement(rows: Sequence[Row], reference: str) -> None:
    """Note in each row whether its half squared error is that of the same variant by the named implementation."""
    for row in rows:
        other = find(rows, row.workload, row.variant, reference)
        if other is None or None in (row.half_squared_error, other.half_squared_error) or row is other:
            continue
        assert row.half_squared_error is not None
        assert other.half_squared_error is not None
        if row.trained == other.trained:
            gap = abs(row.half_squared_error - other.half_squared_error)
            row.agrees = gap <= AGREEMENT.get(row.workload, 1e-3) * abs(other.half_squared_error)

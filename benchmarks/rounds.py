"""Timing in turn: one step of each contender per round, so that a machine's drift hits all alike."""

from __future__ import annotations

import gc
import random
import statistics
import sys
from collections.abc import Sequence

from benchmarks.contender import REFERENCE, Contender
from benchmarks.rows import Row
from benchmarks.variants import VARIANTS

FEWEST = 3
PATIENCE, PATIENCE_WITH_REFERENCE = 30.0, 5.0
"""Seconds. A contender whose steps would take longer in all takes part in fewer rounds, but at least in three."""


def measure(contenders: Sequence[Contender], workload: str, rounds: int, warm_up: int) -> list[Row]:
    """Warm every contender up, then let them take turns; a row of each that was not outrun by another layout of it."""
    early: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    judged: dict[Contender, tuple[int, float | None]] = {}
    wanted: dict[Contender, int] = {}
    for contender in contenders:
        announce(f"{workload} {contender.variant}, {contender.implementation} {contender.layout}: warming up")
        judged_after = min(warm_up, VARIANTS[contender.variant].judged_after)
        for number in range(1, warm_up + 1):
            early[contender].append(contender.step())
            if number == judged_after:
                judged[contender] = number, contender.half_squared_error()
        usual = statistics.median(early[contender][1:])
        patience = PATIENCE_WITH_REFERENCE if contender.implementation == REFERENCE else PATIENCE
        wanted[contender] = min(rounds, max(FEWEST, int(patience / usual)))
    times = _take_turns(contenders, wanted, rounds)
    rows: dict[tuple[str, str, int | None], Row] = {}
    for contender in contenders:
        median = statistics.median(times[contender])
        first = early[contender]
        fewer = wanted[contender] < rounds
        row = Row(
            workload,
            contender.variant,
            contender.implementation,
            1e3 * median,
            1e3 * min(times[contender]),
            1e3 * first[0],
            1e3 * max(0.0, sum(first[:2]) - 2 * median),
            rounds=wanted[contender],
            trained=judged[contender][0],
            half_squared_error=judged[contender][1],
            size=contender.size,
            layout=contender.layout,
            note=f"slow: {wanted[contender]} of {rounds} rounds" if fewer else "",
        )
        bytes_held = contender.peak()
        row.peak_mb = None if bytes_held is None else bytes_held / 1e6
        key = (contender.variant, contender.implementation, contender.size)
        if key not in rows or row.median_ms < rows[key].median_ms:
            rows[key] = row
    return list(rows.values())


def _take_turns(
    contenders: Sequence[Contender], wanted: dict[Contender, int], rounds: int
) -> dict[Contender, list[float]]:
    """Seconds of each step. Everyone's order is another in every round: nobody always follows the same one."""
    times: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # what is there stays: collecting would walk it all, in whoever's turn it happens to be
    try:
        for number in range(rounds):
            shuffle(order)
            for contender in order:
                # Rounds of those that take part in few are spread evenly.
                if (number * wanted[contender]) // rounds != ((number - 1) * wanted[contender]) // rounds:
                    times[contender].append(contender.step())
            announce(f"round {number + 1} of {rounds}")
    finally:
        gc.unfreeze()
    return times


def announce(text: str) -> None:
    """Tell how far things are, on standard error, one line that replaces itself on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

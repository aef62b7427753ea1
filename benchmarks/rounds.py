"""Timing in turn: one step of each contender per round, so that a machine's drift hits all alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence

from benchmarks.contender import REFERENCE, Contender, UnavailableError
from benchmarks.rows import Row
from benchmarks.variants import VARIANTS

FEWEST = 3
KEPT_FOR_ROUNDS = 0.4
"""Of the time that a workload is given."""
PATIENCE, PATIENCE_WITH_REFERENCE = 30.0, 5.0
"""Seconds. A contender whose steps would take longer in all takes part in fewer rounds, but at least in three."""


def measure(
    contenders: Sequence[Contender], workload: str, rounds: int, warm_up: int, seconds: float = math.inf
) -> list[Row]:
    """Warm every contender up, then let them take turns; a row of each that was not outrun by another layout of it.

    What cannot run here, and what the seconds do not suffice to warm up, is left out, and standard error says so. After
    so many seconds no further round starts.
    """
    until = time.monotonic() + seconds
    early: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    judged: dict[Contender, tuple[int, float | None]] = {}
    wanted: dict[Contender, int] = {}
    for contender in contenders:
        name = f"{workload} {contender.variant}, {contender.implementation} {contender.layout}"
        announce(f"{name}: warming up")
        judged_after = min(warm_up, VARIANTS[contender.variant].judged_after)
        try:
            for number in range(1, warm_up + 1):
                if time.monotonic() > until - seconds * KEPT_FOR_ROUNDS:
                    raise UnavailableError("no time is left to warm it up")
                early[contender].append(contender.step())
                if number == judged_after:
                    judged[contender] = number, contender.half_squared_error()
        except UnavailableError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        usual = statistics.median(early[contender][1:])
        patience = PATIENCE_WITH_REFERENCE if contender.implementation == REFERENCE else PATIENCE
        wanted[contender] = min(rounds, max(FEWEST, int(patience / usual)))
    contenders = list(wanted)
    times = _take_turns(contenders, wanted, rounds, until)
    rows: dict[tuple[str, str, int | None], Row] = {}
    for contender in contenders:
        median = statistics.median(times[contender])
        first = early[contender]
        taken = len(times[contender])
        row = Row(
            workload,
            contender.variant,
            contender.implementation,
            1e3 * median,
            1e3 * min(times[contender]),
            1e3 * first[0],
            1e3 * max(0.0, sum(first[:2]) - 2 * median),
            rounds=taken,
            trained=judged[contender][0],
            half_squared_error=judged[contender][1],
            size=contender.size,
            layout=contender.layout,
            note=f"slow: {taken} of {rounds} rounds" if taken < rounds else "",
        )
        bytes_held = contender.peak()
        row.peak_mb = None if bytes_held is None else bytes_held / 1e6
        key = (contender.variant, contender.implementation, contender.size)
        if key not in rows or row.median_ms < rows[key].median_ms:
            rows[key] = row
    return list(rows.values())


def _take_turns(
    contenders: Sequence[Contender], wanted: dict[Contender, int], rounds: int, until: float
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
            if time.monotonic() > until:
                break
    finally:
        gc.unfreeze()
    return times


def announce(text: str) -> None:
    """Tell how far things are, on standard error, one line that replaces itself on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

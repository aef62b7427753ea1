"""Rows as tables; ``python -m benchmarks.table FILE`` turns the JSON of a run into Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contender import BACKPROP_LOOP, FLOOR, LOOP
from benchmarks.growth import curve, curves, exponent
from benchmarks.limits import fastest_peer, limits, ratio
from benchmarks.rows import Row, find, load
from benchmarks.variants import BACKPROP

Table = list[list[str]]
WORDS = {"workload", "variant", "implementation", "agrees", "note", "limit on", "verdict"}
"""Columns of text, which are set flush left."""


def time_table(rows: Sequence[Row]) -> Table:
    """Every row with its ratios; the first line names the columns."""
    head = ["workload", "variant", "implementation", "median ms", "min ms", "first ms", "/ backprop", "/ loop"]
    head += ["/ floor", "/ peer", "peak MB", "/ budget", "tensors MB", "½ error", "agrees", "rounds", "note"]
    table = [head]
    for row in rows:
        if row.size is not None:
            continue
        others = [
            find(rows, row.workload, BACKPROP.name, BACKPROP_LOOP),
            find(rows, row.workload, row.variant, LOOP),
            find(rows, row.workload, row.variant, FLOOR),
            fastest_peer(rows, row.workload),
        ]
        share = row.peak_mb / row.budget_mb if row.peak_mb and row.budget_mb else None
        error = "" if row.half_squared_error is None else f"{row.half_squared_error:.5g}"
        accuracy = "" if row.accuracy is None else f"accuracy {row.accuracy:.4f}"
        table.append(
            [
                *(row.workload, row.variant, row.implementation),
                *(_digits(time) for time in (row.median_ms, row.min_ms, row.first_ms)),
                *(_digits(ratio(row, other)) for other in others),
                *(_digits(row.peak_mb), _digits(share), _digits(row.tensors_mb), error),
                {None: "", True: "yes", False: "NO"}[row.agrees],
                *(str(row.rounds), "; ".join(text for text in (row.layout, accuracy, row.note) if text)),
            ]
        )
    return table


def growth_table(rows: Sequence[Row]) -> Table:
    """Sizes, times and the fitted exponent of each curve."""
    table = [["workload", "variant", "size", "median ms", "exponent"]]
    for axis, variant in curves(rows):
        sizes, times = curve(rows, axis, variant)
        slope = f"{exponent(sizes, times):.2f}"
        pairs = enumerate(zip(sizes, times, strict=True))
        table += [[axis, variant, str(size), _digits(time), "" if place else slope] for place, (size, time) in pairs]
    return table


def limit_table(rows: Sequence[Row]) -> Table:
    """Every limit, what was measured, and whether it is kept."""
    lines = [[one.what, f"{one.most:g}", _digits(one.measured), one.verdict] for one in limits(rows)]
    return [["limit on", "at most", "measured", "verdict"], *lines]


def tables(rows: Sequence[Row]) -> list[Table]:
    """The three, without those that have no line."""
    return [table for table in (time_table(rows), growth_table(rows), limit_table(rows)) if len(table) > 1]


def aligned(table: Table) -> str:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for line in table:
        cells = zip(table[0], line, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if name in WORDS else c.rjust(w) for name, c, w in cells).rstrip())
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """For a README."""
    rule = ["---" if name in WORDS else "---:" for name in table[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in (table[0], rule, *table[1:]))


def _digits(number: float | None) -> str:
    """Three significant digits or all whole ones."""
    if number is None:
        return ""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    print("\n\n".join(markdown(table) for table in tables(load(parser.parse_args(given).file))))


if __name__ == "__main__":
    main()

"""The command: measures what it is asked for, prints tables, writes JSON and a plot."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contender import (
    BACKPROP_LOOP,
    BATCHED,
    COMPILED,
    COMPILED_STEPS,
    CPU,
    FLOOR,
    GRAPHS,
    IMPLEMENTATIONS,
    LOOP,
    PEERS,
    PEERS_OF_INPUTS,
    PROCESS_COUNTED,
    REFERENCE,
    Contender,
)
from benchmarks.floor import floor
from benchmarks.growth import DEPTH, NODE_COUNT, grow, plot
from benchmarks.memory import budget, measure_apart
from benchmarks.peers import start_peer
from benchmarks.plain import backprop, layouts, loop
from benchmarks.rounds import announce, measure
from benchmarks.rows import Row, check_agreement, save
from benchmarks.simulated import simulated
from benchmarks.table import aligned, tables
from benchmarks.variants import ARRIVAL, BACKPROP, CONSTANT, CONSTANT_INPUTS, SILENT, VARIANTS, Variant
from benchmarks.workloads import FULL_WIDTH, WORKLOADS, Chain, Graph, Workload, workloads

TOO_LARGE = {
    "W4": ((CONSTANT,), (BATCHED, GRAPHS)),
    "W5": ((CONSTANT, SILENT, ARRIVAL, BACKPROP), (BATCHED, GRAPHS, FLOOR, BACKPROP_LOOP)),
    **dict.fromkeys(FULL_WIDTH, ((CONSTANT, SILENT, ARRIVAL, BACKPROP), (BATCHED, GRAPHS, BACKPROP_LOOP, COMPILED))),
}
"""Variants and implementations that are run on workloads on which the others would take minutes a step."""


LEFT_OUT = (COMPILED, COMPILED_STEPS, GRAPHS)
"""Unless they are asked for: compiling takes longer than all the rest, and graphs are for CUDA devices."""


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    groups = (*WORKLOADS, DEPTH, NODE_COUNT)
    parser.add_argument(
        "--workloads", nargs="+", choices=groups, default=groups, metavar="NAME", help=", ".join(groups)
    )
    for option, names in (("--variants", tuple(VARIANTS)), ("--implementations", IMPLEMENTATIONS)):
        default = [name for name in names if name not in LEFT_OUT]
        parser.add_argument(option, nargs="+", choices=names, default=default, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, help="timed steps of each; 20 by default")
    parser.add_argument("--threads", type=int, default=2, help="that each may use; 2 by default")
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu, cuda, ...; peers choose their own")
    parser.add_argument("--quick", action="store_true", help="tiny stand-ins: shows that all runs, measures nothing")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter that has the peers; this one by default")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw growth with depth and nodes here, as a PNG")
    options = parser.parse_args(given)
    options.rounds = options.rounds or (3 if options.quick else 20)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def contenders(workload: Workload, options: argparse.Namespace) -> list[Contender]:
    """Everything that takes turns on one workload."""
    variants, wanted = chosen(workload, options)
    found: list[Contender] = []
    for variant in variants:
        engines = [name for name in (BATCHED, GRAPHS, COMPILED_STEPS, REFERENCE) if name in wanted]
        found += [simulated(workload, variant, name, options.device) for name in engines]
        for layout in () if isinstance(workload, Graph) else layouts(workload, options.device):
            assert not isinstance(workload, Graph)
            if variant is BACKPROP and BACKPROP_LOOP in wanted:
                found.append(backprop(workload, layout, options.device))
            if not isinstance(workload, Chain):
                continue
            if variant is not BACKPROP and LOOP in wanted:
                found.append(loop(workload, variant, layout, options.device))
            if FLOOR in wanted:
                found.append(floor(workload, variant, layout, options.device))
        if variant is BACKPROP and COMPILED in wanted and not isinstance(workload, Graph):
            # A compiler chooses memory formats itself. For the stand-ins what it has traced is run as it is.
            by = "eager" if options.quick else "inductor"
            found.append(backprop(workload, layouts(workload, options.device)[0], options.device, compiled_by=by))
        if variant in (CONSTANT, CONSTANT_INPUTS) and isinstance(workload, Chain):
            own = [name for name in PEERS if (name in PEERS_OF_INPUTS) == (variant is CONSTANT_INPUTS)]
            for name in (name for name in own if name in wanted):
                announce(f"{workload.name}: starting {name}")
                peer = start_peer(
                    name, variant.name, workload.name, options.peers_python, options.threads, options.quick
                )
                found += [] if peer is None else [peer]
    return found


def chosen(workload: Workload, options: argparse.Namespace) -> tuple[list[Variant], list[str]]:
    """The variants and implementations asked for that the workload is not too large for."""
    variants = [VARIANTS[name] for name in options.variants if VARIANTS[name].fits(workload)]
    possible, able = TOO_LARGE.get(workload.name, (variants, options.implementations))
    return [v for v in variants if v in possible], [name for name in options.implementations if name in able]


def timed_rows(workload: Workload, options: argparse.Namespace, seconds: float = math.inf) -> list[Row]:
    """Times and agreement on one workload."""
    start = time.monotonic()
    present = contenders(workload, options)
    if not present:
        return []
    try:
        left = seconds - (time.monotonic() - start)
        rows = measure(present, workload.name, options.rounds, workload.warm_up, left)
    finally:
        for contender in present:
            contender.close()
    check_agreement(rows, BATCHED)
    return rows


def run(workload: Workload, options: argparse.Namespace) -> list[Row]:
    """Times, agreement and memory on one workload."""
    rows = timed_rows(workload, options)
    for row in rows:
        row.budget_mb = budget(workload) / 1e6
        if row.implementation in PROCESS_COUNTED and not options.no_memory and options.device == CPU:
            announce(f"{row.workload} {row.variant}, {row.implementation}: memory")
            held = measure_apart(
                row.workload, row.variant, row.implementation, row.layout, options.threads, options.quick
            )
            if held is not None:
                row.peak_mb, row.tensors_mb = held.peak / 1e6, held.tensors / 1e6
    return rows


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    options = parsed(given)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # of W5, whose errors vanish as it learns, a step would take four times as long
    rows: list[Row] = []
    for name in options.workloads:
        if name in WORKLOADS:
            [workload] = workloads(options.quick, [name])
            found = run(workload, options)
        else:
            found = grow(name, [VARIANTS[v] for v in options.variants], options.rounds, options.quick, options.device)
        for row in found:
            row.threads = options.threads
        rows += found
        if options.json:  # after every workload, so that a run that is stopped has not been for nothing
            save(rows, options.json)
    announce("")
    print("\n\n".join(aligned(table) for table in tables(rows)))
    if options.quick:
        print("\nquick: tiny stand-ins, so these numbers say nothing")
    if any(row.agrees is False for row in rows):
        print("\nsome implementations do not compute the same: see the column 'agrees'", file=sys.stderr)
    if options.plot:
        plot(rows, options.plot)

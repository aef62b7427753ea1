"""Tests and times pcsim on a device, in at most eight minutes; ``benchmarks/device.sh`` starts it."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import command, parts
from benchmarks.contender import BACKPROP_LOOP, BATCHED, COMPILED, GRAPHS, LOOP
from benchmarks.peers import ROOT
from benchmarks.rows import Row, save
from benchmarks.table import aligned, time_table
from benchmarks.variants import ARRIVAL, BACKPROP, CONSTANT, INCREMENTAL, SILENT

TESTS = "tests"
SECONDS = {
    "versions": 20.0,
    TESTS: 80.0,
    "W1": 30.0,
    "W2": 45.0,
    "W3": 40.0,
    "W4": 45.0,
    "W5": 40.0,
    "W6 to W8": 50.0,
    "VGG10": 40.0,
    "ResNet18": 40.0,
    "epoch": 50.0,
}
"""Shares of the eight minutes, in order; what one leaves over goes to the next."""
KEPT_FOR_STARTING = 0.25
"""Of a part's time: for its process to start, to make what it measures, and to finish what it has begun."""
SECONDS_TO_END = 3.0
"""Of a process that sends no more rows, before it is stopped."""
NEEDED_BY_TESTS = ("pytest", "hypothesis", "sklearn")
TEST_FILES = ("tests/test_devices.py", "tests/test_playback.py")
QUICK_TESTS = "chain or vgg-forward or names or reads or goes_on or failures"
FAILED, LATE = "failed", "stopped for want of time"


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The options, and the fixed ones of the benchmark that it shares with ``python -m benchmarks``."""
    parser = argparse.ArgumentParser(prog="benchmarks/device.sh", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda by default; cpu, cuda:1, mps, ...")
    parser.add_argument("--quick", action="store_true", help="all in tiny: shows that all runs, measures nothing")
    parser.add_argument("--threads", type=int, help="that the CPU may use; 2 by default, 1 with --quick")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    own = parser.parse_args(given)
    try:
        torch.device(own.device)
    except RuntimeError as error:
        parser.error(f"--device {own.device}: {str(error).splitlines()[0]}")
    threads = own.threads or (1 if own.quick else 2)
    shared = ["--device", own.device, "--threads", str(threads), "--no-memory", *(["--quick"] if own.quick else [])]
    shared += ["--variants", *(variant.name for variant in (CONSTANT, SILENT, ARRIVAL, INCREMENTAL, BACKPROP))]
    graphs = [GRAPHS] if torch.device(own.device).type == "cuda" else []
    options = command.parsed([*shared, "--implementations", BATCHED, *graphs, LOOP, BACKPROP_LOOP, COMPILED])
    options.json = own.json
    return options


def tested(options: argparse.Namespace, seconds: float) -> str:
    """Run the tests that are marked ``device`` there; what became of them, "" if they passed."""
    missing = [name for name in NEEDED_BY_TESTS if importlib.util.find_spec(name) is None]
    if missing:
        return f"not run: {', '.join(missing)} missing; pip install -e '.[test]'"
    arguments = ["-q", "-m", "device", "--device", str(options.device), *TEST_FILES, "-o", "addopts="]
    arguments += ["-p", "no:cacheprovider", *(["-k", QUICK_TESTS] if options.quick else [])]
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return LATE
    return FAILED if done.returncode else ""


def measured(name: str, options: argparse.Namespace, seconds: float) -> tuple[list[Row], str]:
    """A part in a process of its own: its rows, and what became of it, "" if all went well.

    So a part that hangs can be stopped, and one that leaves the device in error takes nothing along.
    """
    start, rows = time.monotonic(), list[Row]()
    context = multiprocessing.get_context("forkserver")
    # A compiler that is there before processes divide saves each seconds; it might touch a GPU, which must not be then.
    context.set_forkserver_preload(["benchmarks.parts", *(["torch._dynamo"] if options.device.type == "cpu" else [])])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(name, options, seconds * (1 - KEPT_FOR_STARTING), sending))
    process.start()
    sending.close()
    try:
        while receiving.poll(max(0.0, seconds - (time.monotonic() - start))):
            rows += receiving.recv()
        return rows, LATE
    except EOFError:  # it has ended; if in error, standard error says why
        process.join(SECONDS_TO_END)
        return rows, FAILED if process.exitcode else ""
    finally:
        process.kill()
        process.join()


def _send_rows(name: str, options: argparse.Namespace, seconds: float, sending: Connection) -> None:
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # of W5, whose errors vanish as it learns, a step would take four times as long
    for rows in parts.PARTS[name](options, seconds):
        for row in rows:
            row.threads = options.threads
            row.device = f"{parts.device_name(options.device)}, torch {torch.__version__}"
        sending.send(rows)


def main(given: Sequence[str] | None = None) -> int:
    """Test, measure, print and write; 1 if anything failed."""
    options = parsed(given)
    start, until = time.monotonic(), 0.0
    rows: list[Row] = []
    told: dict[str, str] = {}
    for name, share in SECONDS.items():
        until += share
        left = until - (time.monotonic() - start)
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name == TESTS:
            told[name] = tested(options, left)
        else:
            found, told[name] = measured(name, options, left)
            rows += found
        if told[name]:
            print(f"{name}: {told[name]}", file=sys.stderr, flush=True)
        if name == "versions" and told[name]:
            return 1
        if options.json:  # after every part, so that a run that is stopped has not been for nothing
            save(rows, options.json)
    print(aligned(time_table(rows)))
    if options.quick:
        print("\nquick: tiny stand-ins, so these numbers say nothing")
    if any(row.agrees is False for row in rows):
        print("\nsome implementations do not compute the same: see the column 'agrees'", file=sys.stderr)
    print(f"\n{time.monotonic() - start:.0f} s; " + "; ".join(f"{name} {text}" for name, text in told.items() if text))
    return 1 if FAILED in told.values() else 0


if __name__ == "__main__":
    sys.exit(main())

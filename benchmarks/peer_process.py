"""The process of one peer: it takes a training step whenever a line on its standard input asks for one.

Commands are "step", "error" and "memory"; each is answered by one line of JSON on standard output. A peer runs in a
process of its own so that it may have its own interpreter, and so that the threads that its library keeps do not live
among those of the others. It measures itself: what the pipe costs does not count.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from benchmarks import resident
from benchmarks.workloads import Chain, make_problem, workloads


def serve(commands: TextIO, answers: TextIO, chain: Chain, module: str) -> None:
    """Build the peer, then answer commands until there are no more."""
    problem = make_problem(chain)
    peer = importlib.import_module(module)
    before = resident.present() if resident.measurable() else 0.0
    step, forward = peer.build(chain, problem)

    def timed() -> dict[str, float]:
        start = time.perf_counter()
        step()
        return {"seconds": time.perf_counter() - start}

    def memory() -> dict[str, float | None]:
        if not resident.measurable():
            return {"bytes": None}
        resident.forget_peak()
        step()
        return {"bytes": resident.peak() - before}

    known: dict[str, Callable[[], object]] = {
        "step": timed,
        "error": lambda: {"half_squared_error": problem.half_squared_error(forward())},
        "memory": memory,
    }
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        print(json.dumps(known[line.strip()]()), file=answers, flush=True)


def main(given: Sequence[str] | None = None) -> None:
    """Keep the library to as many cores as the others have threads, and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(given)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    [chain] = workloads(options.small, [options.workload])
    try:
        if not isinstance(chain, Chain):
            raise TypeError(f"{options.workload} is not a chain")
        serve(sys.stdin, answers, chain, options.module)
    except Exception as error:
        print(json.dumps({"failure": f"{type(error).__name__}: {error}"[:300]}), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""Peak memory of a training step, in a process of its own; run as ``python -m benchmarks.memory`` by the parent.

What counts is what the kernel counts: resident bytes of the process (VmHWM), which hold everything, the convolutions'
scratch, the allocator's waste, and the plan's Python objects included. ``tracemalloc`` sees no tensor, and PyTorch's
own count sees nothing else. Three things make the number one of a training step:

- a small training of the same kind and the bare products of the workload run first, so that libraries, their threads,
  their compiled code and what they keep as scratch for products of these sizes are there;
- the measured difference starts when network, data and optimizer are there but no step has been taken, after unused
  memory has been handed back; the weights, which are there already, are added by their bytes;
- the peak is reset after a few steps, so that planning and stacking do not count, and read after a few more.

``MALLOC_`` settings make the allocator hand freed tensors back, or what one step leaves would hide in the next.
Beside it stands what all tensors that are alive after a step hold: the difference to the peak are temporaries, and the
objects that Python and PyTorch keep, which in a graph of many small weights outweigh the numbers in them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import resident
from benchmarks.contender import BATCHED, LOOP, Local
from benchmarks.peers import ROOT
from benchmarks.variants import BACKPROP, VARIANTS, Variant
from benchmarks.workloads import SMALL_WORKLOADS, Chain, Graph, Topology, Workload, workloads

if TYPE_CHECKING:
    from pcsim import Network

STEPS = 3
PAGES_HANDED_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def weight_bytes(workload: Workload) -> int:
    """Of weights and biases in float32."""
    if isinstance(workload, Chain):
        return 4 * sum(int(np.prod(shape)) + shape[0] for shape in workload.weight_shapes())
    if isinstance(workload, Topology):
        return 4 * sum(parameter.numel() for parameter in _network(workload).parameters())
    return 4 * workload.edges * (workload.width + 1) * workload.width


@lru_cache
def _network(topology: Topology) -> Network:
    from benchmarks.contender import CPU  # here, since the parent asks for other budgets without PyTorch
    from benchmarks.full_width import topology_and_data

    return topology_and_data(topology, CPU)[0]


def budget(workload: Workload) -> int:
    """Bytes of latents, predictions, errors, weights, their gradients and Adam's two moments.

    Clamped values are the user's and do not count as latents, so a chain has one less than predictions. In a graph
    only roots are not predicted; free nodes are neither roots nor sinks.
    """
    if isinstance(workload, Chain):
        units = [int(np.prod(shape)) for shape in workload.latent_shapes()]
        states = sum(units[:-1]) + 2 * sum(units)
    elif isinstance(workload, Topology):
        made = [node for node in _network(workload).nodes.values() if node.incoming]
        kept = [node for node in made if not node.deterministic]
        free = [node for node in kept if node.outgoing]
        states = sum(int(np.prod(node.shape)) for part in (made, kept, free) for node in part)
    else:
        ends = np.array(workload.ends())
        sources, targets = set(ends[:, 0].tolist()), set(ends[:, 1].tolist())
        states = (len(sources & targets) + 2 * len(targets)) * workload.width
    return 4 * states * workload.batch + 4 * weight_bytes(workload)


def build(workload: Workload, variant: Variant, implementation: str, layout: str) -> Local:
    """The contender to measure."""
    # Here, since the parent asks for budgets alone.
    from benchmarks.plain import backprop, loop
    from benchmarks.simulated import simulated

    if implementation == BATCHED:
        return simulated(workload, variant, implementation)
    assert not isinstance(workload, Graph)
    if implementation != LOOP:
        return backprop(workload, layout)
    assert isinstance(workload, Chain)
    return loop(workload, variant, layout)


@dataclass(frozen=True)
class Held:
    """Memory of a training step, in bytes.

    Args:
        peak: the most that it holds at any time.
        tensors: what all tensors hold that are alive after it.
    """

    peak: float
    tensors: float


def held_by_a_step(workload: Workload, variant: Variant, implementation: str, layout: str) -> Held:
    """Measure it in this process, which should have done nothing else."""
    _warm_libraries(workload, variant, implementation, layout)
    contender = build(workload, variant, implementation, layout)
    before = resident.present()
    for _ in range(STEPS):
        contender.step()
    resident.forget_peak()
    for _ in range(STEPS):
        contender.step()
    return Held(resident.peak() - before + weight_bytes(workload), _tensor_bytes())


def _warm_libraries(workload: Workload, variant: Variant, implementation: str, layout: str) -> None:
    from benchmarks.floor import floor

    small = build(SMALL_WORKLOADS[workload.name], variant, implementation, layout)
    bare = floor(workload, BACKPROP, layout) if isinstance(workload, Chain) else small
    for _ in range(STEPS):
        small.step()
        bare.step()


def _tensor_bytes() -> float:
    """Of every storage that some tensor uses, once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return float(sum(storages.values()))


def measure_apart(
    workload: str, variant: str, implementation: str, layout: str, threads: int, small: bool
) -> Held | None:
    """What a training step holds, measured in a fresh process; None where the system does not tell."""
    if not resident.measurable():
        return None
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", workload, variant, implementation, layout]
    command += ["--threads", str(threads), *(["--small"] if small else [])]
    environment = {**os.environ, **PAGES_HANDED_BACK}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"memory of {implementation}, {workload} {variant}: {done.stderr[-500:]}", file=sys.stderr)
        return None
    return Held(**json.loads(done.stdout))


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("workload", "variant", "implementation", "layout"):
        parser.add_argument(name)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(given)
    import torch

    torch.set_num_threads(options.threads)
    [workload] = workloads(options.small, [options.workload])
    held = held_by_a_step(workload, VARIANTS[options.variant], options.implementation, options.layout)
    print(json.dumps(asdict(held)))


if __name__ == "__main__":
    main()

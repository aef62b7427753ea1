"""An epoch on synthetic images: what rounding messages saves, and what accuracy it costs."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, optim

import pcsim
from benchmarks.contender import BACKPROP_LOOP, BATCHED, timed
from benchmarks.full_width import start_by_kaiming, synthetic_images, topology_and_data
from benchmarks.plain import backprop_step
from benchmarks.rounds import announce
from benchmarks.rows import Row
from benchmarks.simulated import simulator
from benchmarks.variants import ARRIVAL, BACKPROP
from benchmarks.workloads import WEIGHT_RATE, Topology

IMAGES, TEST_IMAGES = 50_000, 10_000
KEPT_FOR_TESTS = 0.2
"""Of the time that the epoch is given."""


class Learner:
    """One that takes its turn at every batch.

    Args:
        variant: what is trained how.
        implementation: by whom.
        learn: from inputs and one-hot targets.
        outputs: for inputs.
    """

    def __init__(
        self,
        variant: str,
        implementation: str,
        learn: Callable[[Tensor, Tensor], object],
        outputs: Callable[[Tensor], Tensor],
    ) -> None:
        self.variant, self.implementation, self.learn, self.outputs = variant, implementation, learn, outputs
        self.times: list[float] = []

    def accuracy(self, images: Tensor, classes: Tensor, batch: int) -> float:
        """Share of images whose largest output is their class's."""
        pairs = zip(images.split(batch), classes.split(batch), strict=True)
        with torch.no_grad():
            right = sum(int((self.outputs(some).argmax(1) == named).sum()) for some, named in pairs)
        return right / len(images)


def by_arrival(topology: Topology, device: torch.device, message_dtype: torch.dtype | None = None) -> Learner:
    """The arrival rule in the batched engine, with messages of that precision."""
    network, _, _ = topology_and_data(topology, device)
    start_by_kaiming(network)
    sim = simulator(network, topology, ARRIVAL, partial(pcsim.BatchedEngine, message_dtype=message_dtype))
    adam = optim.Adam(sim.network.parameters(), lr=WEIGHT_RATE, fused=True)
    rounded = "" if message_dtype is None else f"-{str(message_dtype).removeprefix('torch.')}"
    return Learner(
        ARRIVAL.name,
        BATCHED + rounded,
        lambda inputs, targets: sim.update({"input": inputs, "output": targets}, adam),
        lambda inputs: sim.predict({"input": inputs})["output"],
    )


def by_backprop(topology: Topology, device: torch.device) -> Learner:
    """Backprop in plain PyTorch, from the same weights."""
    network, _, _ = topology_and_data(topology, device)
    start_by_kaiming(network)
    module = pcsim.to_module(network)
    adam = optim.Adam(module.parameters(), lr=WEIGHT_RATE, fused=True)
    return Learner(
        BACKPROP.name, BACKPROP_LOOP, lambda inputs, targets: backprop_step(module, adam, inputs, targets), module
    )


def train_an_epoch(
    topology: Topology,
    device: torch.device,
    message_dtypes: Sequence[torch.dtype | None],
    seconds: float,
    images: int = IMAGES,
    test_images: int = TEST_IMAGES,
) -> list[Row]:
    """A row of each learner, that take turns at the same batches; all stop together when the time is over."""
    until = time.monotonic() + seconds * (1 - KEPT_FOR_TESTS)
    learners = [by_arrival(topology, device, dtype) for dtype in message_dtypes]
    learners.append(by_backprop(topology, device))
    inputs, classes = synthetic_images(topology, images, device, seed=1)
    targets = torch.eye(topology.classes, device=device)
    whole = images // topology.batch  # every batch of one size: another would be another program
    done = 0
    while done < whole and (not done or time.monotonic() < until):
        batch = slice(done * topology.batch, (done + 1) * topology.batch)
        for learner in learners:
            step = partial(learner.learn, inputs[batch], targets[classes[batch]])
            learner.times.append(timed(step, device))
        done += 1
        announce(f"{topology.name} epoch: batch {done} of {whole}")
    if done < whole:
        print(f"{topology.name} epoch: stopped after {done} of {whole} batches, for want of time", file=sys.stderr)
    seen, test = done * topology.batch, synthetic_images(topology, test_images, device, seed=2)
    rows = []
    for learner in learners:
        median = statistics.median(learner.times)
        early = learner.times[:2]
        row = Row(
            f"{topology.name} epoch",
            learner.variant,
            learner.implementation,
            1e3 * median,
            1e3 * min(learner.times),
            1e3 * early[0],
            1e3 * max(0.0, sum(early) - len(early) * median),
            rounds=done,
            trained=done,
            accuracy=learner.accuracy(*test, topology.batch),
            note=f"{seen} of {images} images, {sum(learner.times):.3g} s; tested on {test_images}",
        )
        rows.append(row)
    return rows

"""What takes turns: one implementation of one variant on one workload."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

BATCHED, REFERENCE = "pcsim-batched", "pcsim-reference"
GRAPHS, COMPILED_STEPS = "pcsim-graphs", "pcsim-compiled"
"""The batched engine with CUDA graphs, or with compiled steps."""
LOOP, BACKPROP_LOOP, COMPILED, FLOOR = "torch-loop", "torch-backprop", "torch-compile", "floor"
PEERS = {
    "pcx": "benchmarks.peer_pcx",
    "fabricpc": "benchmarks.peer_fabricpc",
    "pydeepity": "benchmarks.peer_pydeepity",
}
"""Module that builds each peer's training step, by its name."""
PEERS_OF_INPUTS = ("pydeepity",)
"""Peers whose latents are the inputs of activations."""
IMPLEMENTATIONS = (BATCHED, REFERENCE, GRAPHS, COMPILED_STEPS, LOOP, BACKPROP_LOOP, COMPILED, FLOOR, *PEERS)
CPU = torch.device("cpu")
PROCESS_COUNTED = (BATCHED, LOOP, BACKPROP_LOOP)
"""Implementations whose memory is measured in a process of their own."""


class UnavailableError(RuntimeError):
    """A contender cannot run here; the others can."""


class Contender(ABC):
    """Base class of contenders.

    Args:
        variant: what is trained how.
        implementation: by whom.
        layout: memory format, where several are tried.
    """

    size: int | None = None
    """Layers or nodes, where several sizes take turns."""

    def __init__(self, variant: str, implementation: str, layout: str = "") -> None:
        self.variant, self.implementation, self.layout = variant, implementation, layout

    @abstractmethod
    def step(self) -> float:
        """Take one training step; the seconds it took."""

    @abstractmethod
    def half_squared_error(self) -> float | None:
        """Of a forward pass on the training batch, a mean over samples; None if nothing is trained."""

    def peak(self) -> float | None:
        """Bytes that a training step holds at most, if this contender can tell by itself."""
        return None

    def close(self) -> None:  # noqa: B027 - most contenders have nothing to close
        """Let go of what outlives the process's own memory."""


class Local(Contender):
    """A contender of this process.

    Args:
        variant: as above.
        implementation: as above.
        train: one training step.
        error: the half squared error.
        layout: as above.
        device: that computes, and is waited for before a step is timed and at its end.
    """

    def __init__(
        self,
        variant: str,
        implementation: str,
        train: Callable[[], object],
        error: Callable[[], float] | None = None,
        layout: str = "",
        device: torch.device = CPU,
    ) -> None:
        super().__init__(variant, implementation, layout)
        self._train, self._error, self._device = train, error, device

    def step(self) -> float:
        """Take one training step; the seconds it took."""
        return timed(self._train, self._device)

    def half_squared_error(self) -> float | None:
        """Of a forward pass."""
        return None if self._error is None else self._error()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work took, until the device has done all of it."""
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

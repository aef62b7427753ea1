"""Running a module without side effects: once to learn its shapes, and many times within one batch.

A relaxation evaluates the same modules again and again on one batch. What a module keeps or draws while it does so
must stay put: batch statistics are frozen (arXiv 2506.23800, Eq. 6), and random draws are made once per batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tensor_options(*modules: nn.Module, otherwise: Tensor | None = None) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the first floating parameter or buffer, else of ``otherwise``, else the default ones."""
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype, tensor.device
    if otherwise is not None:
        return otherwise.dtype, otherwise.device
    return torch.get_default_dtype(), torch.get_default_device()


def probe(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Run a module once, leaving its buffers, its mode and the random state as they were.

    Returns:
        Its output, and whether it draws random numbers, now or in training mode.
    """
    output, draws = _run_once(module, inputs)
    modes = {part: part.training for part in module.modules()}
    if draws or all(modes.values()):
        return output, draws
    try:
        module.train()
        return output, _run_once(module, inputs)[1]
    except Exception:  # what cannot run in training mode is not meant to
        return output, draws
    finally:
        for part, mode in modes.items():
            part.training = mode


def _run_once(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, bool]:
    device = inputs[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        before = _random_state(device)
        copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
        output = functional_call(module, copies, tuple(inputs)) if copies else module(*inputs)
        return output, not torch.equal(before, _random_state(device))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def held_draw(seed: int, owner: str, device: torch.device) -> Iterator[None]:
    """Make every random draw inside start from ``seed``, otherwise for each owner; leave the random state as it was."""
    own = seed ^ zlib.crc32(owner.encode())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(own)
        if device.type == "cuda":
            torch.cuda.manual_seed(own)
        yield


class Snapshot:
    """What a module consisted of when it was looked at; walking a large one at every batch would cost more than it."""

    def __init__(self, module: nn.Module) -> None:
        children = list(module.modules())
        self.parameters = list(module.parameters())
        """All parameters, each once."""
        self.normalising = [child for child in children if child._buffers.get("running_mean") is not None]
        """Modules with running statistics."""
        self.standard = all(type(child).__module__.partition(".")[0] in ("torch", "pcsim") for child in children)
        """Whether all modules are of torch or pcsim, which take tensors of any layout in memory."""
        self._owners: list[dict[str, Any]] = [o for c in children for o in (c._parameters, c._modules)]
        self._held = self._members()
        self._identities = [*map(id, self._held)]

    @property
    def tensor_options(self) -> tuple[torch.dtype, torch.device] | None:
        """Dtype and device of the first floating parameter; None if there is none."""
        return next(((p.dtype, p.device) for p in self.parameters if p.is_floating_point()), None)

    def _members(self) -> list[object]:
        return [*chain.from_iterable(map(dict.values, self._owners))]

    def holds(self) -> bool:
        """Whether the module still consists of the same modules and parameters."""
        return [*map(id, self._members())] == self._identities


@contextmanager
def frozen_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Normalise with the statistics of the batch at hand without touching the running ones (BF, Eq. 6).

    Only modules in training mode are concerned; in evaluation mode they use the running statistics as always.

    Args:
        modules: those with running statistics.
    """
    with ExitStack() as stack:
        for module in modules:
            if module.training:
                stack.enter_context(_set_aside(module))
        yield


@contextmanager
def _set_aside(module: nn.Module) -> Iterator[None]:
    aside = {name: module._buffers[name] for name in RUNNING_STATISTICS if name in module._buffers}
    try:
        for name in aside:
            module._buffers[name] = None
        yield
    finally:
        module._buffers.update(aside)

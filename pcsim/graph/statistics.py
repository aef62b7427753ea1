"""Batch statistics that stay put while a batch is relaxed (arXiv 2506.23800, Eq. 6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def normalises(module: nn.Module) -> bool:
    """Whether a module is one of torch's that keeps running statistics of what it normalises."""
    return isinstance(module, _NormBase) and module._buffers.get("running_mean") is not None


@contextmanager
def buffers_put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave the buffers of these modules as they were where what is done within fails."""
    held = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for module, name, buffer, before in held:
                module._buffers[name] = buffer.copy_(before)
        raise


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

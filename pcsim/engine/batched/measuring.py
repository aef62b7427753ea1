"""What each operation of a program costs: time, products and bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pcsim.engine.batched.places import Operation
from pcsim.engine.batched.program import Program

Stage = Literal["start", "predictions", "messages", "learning"]


@attrs.define(eq=False)
class Measurement:
    """One operation, over all the calls of a run.

    Args:
        stage: the forward pass; predictions, or errors, messages and moves of the steps; or what is learned.
        operation: its name, as ``print(sim.program)`` shows it.
        members: names of the nodes or edges concerned.
        calls: how often it was called.
        seconds: that it took.
        products: multiplications of numbers in matrix products and convolutions.
        bytes: of the tensors that were read and written.
    """

    stage: Stage
    operation: str
    members: tuple[str, ...]
    calls: int = 0
    seconds: float = 0.0
    products: int = 0
    bytes: int = 0


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products and bytes of what is called within it."""

    def __init__(self, into: Measurement) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__.rstrip("_")
        count = flop_registry.get(getattr(torch.ops.aten, name, None))
        if name in ("linear", "_linear_pointwise"):  # the second is oneDNN's
            self._into.products += args[0].numel() * len(args[1])
        elif count is not None:
            self._into.products += count(*args, **kwargs, out_val=result) // 2
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self._into.bytes += sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
        return result


Measure = Callable[[Measurement, Operation], object]


def count(into: Measurement, operation: Operation) -> None:
    """Call an operation, and count its products and bytes."""
    with _Counter(into):
        operation.call()


def clock(devices: Iterable[torch.device]) -> Measure:
    """What calls an operation and takes its time, once the devices have done what came before."""
    waits = [partial(torch.cuda.synchronize, device) for device in set(devices) if device.type == "cuda"]

    def measure(into: Measurement, operation: Operation) -> None:
        for wait in waits:
            wait()
        begin = time.perf_counter()
        operation.call()
        for wait in waits:
            wait()
        into.seconds += time.perf_counter() - begin
        into.calls += 1

    return measure


@contextmanager
def measured(programs: Sequence[Program], steps: int, measure: Measure) -> Iterator[list[Measurement]]:
    """Programs whose operations are measured, for as long as it lasts; measurements come in the order of a run.

    Args:
        programs: of one plan.
        steps: after which is learned.
        measure: what calls an operation, and keeps what it costs.
    """
    found: dict[tuple[Stage, str, tuple[str, ...]], Measurement] = {}

    def watched(stage: Stage, operation: Operation) -> Operation:
        key = stage, operation.name, tuple(operation.members)
        into = found.setdefault(key, Measurement(*key))
        return operation._replace(call=partial(measure, into, operation))

    def stage_of(operation: Operation) -> Stage:
        return "learning" if operation.name.startswith("gradient") else "messages"

    before = [(program.start, program.calls, program.end, program.learning(steps)[:]) for program in programs]
    refused = [program.playback.refused for program in programs]
    try:
        for program in programs:
            program.playback.refused = "each operation is measured by itself"
            program.start = [watched("start", operation) for operation in program.start]
            program.calls = [
                (
                    [watched("predictions", operation).call for operation in predictions],
                    [watched(stage_of(operation), operation).call for operation in update],
                )
                for predictions, update in program.steps
            ]
            program.end = [watched("messages", operation) for operation in program.end]
            program.learning(steps)[:] = [watched("learning", operation) for operation in program.learning(steps)]
        yield (result := [])
        result += [each for each in found.values() if each.calls or each.bytes]
    finally:
        for program, (start, calls, end, learning), why in zip(programs, before, refused, strict=True):
            program.playback.refused = why
            program.start, program.calls, program.end = start, calls, end
            program.learning(steps)[:] = learning

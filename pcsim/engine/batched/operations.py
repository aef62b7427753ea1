"""The operations of a program: named, bound once to where their tensors lie, and then called at every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pcsim.engine.kernels.kernel import Call, Kernel
from pcsim.engine.planning.wiring import Positions


class Operation(NamedTuple):
    """What a run calls, and how it is printed."""

    name: str
    call: Callable[[], object]
    members: Sequence[str] = ()
    """Names of the nodes or edges concerned."""

    def __str__(self) -> str:
        more = f" and {len(self.members) - 3} more" if len(self.members) > 3 else ""
        return f"{self.name} {', '.join(self.members[:3])}{more}".rstrip()


class Cell:
    """Where operations find and leave a tensor: a fixed one, or whatever was left there last."""

    __slots__ = ("fixed", "tensor")

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.tensor: Tensor | None = tensor
        self.fixed = tensor is not None
        """Whether it is the same tensor at every run, to be written into."""

    def read(self) -> Tensor:
        """What was left here last."""
        assert self.tensor is not None
        return self.tensor

    def write(self, tensor: Tensor) -> None:
        """Leave a tensor here."""
        if not self.fixed:
            self.tensor = tensor
        elif tensor is not self.tensor:
            self.read().copy_(tensor)


class Part:
    """Rows of a stacked tensor (k, ...), a single one without the stack axis: a view where they follow each other.

    Others are gathered into scratch before an operation that reads them, and scattered from scratch after one that
    writes them, by operations of their own.
    """

    __slots__ = ("cell", "index", "scratch", "stack")

    def __init__(self, stack: Tensor, rows: Positions, scratch: Callable[[int], Tensor]) -> None:
        self.stack, self.scratch = stack, scratch
        self.index: Tensor | None = None
        run = run_of(rows)
        if run is None:
            self.index = torch.as_tensor(rows, device=stack.device)
            self.cell = Cell(scratch(len(rows)))
        else:
            first, after = run
            self.cell = Cell(stack[first] if after - first == 1 else stack[first:after])

    def gathered(self, operations: list[Operation], members: Sequence[str]) -> Cell:
        """The part's content as a cell, with the operation that brings it there."""
        if self.index is not None:
            call = partial(torch.index_select, self.stack, 0, self.index, out=self.cell.read())
            operations.append(Operation("gather", call, members))
        return self.cell

    def scatter(self, operations: list[Operation], members: Sequence[str]) -> None:
        """Bring what has been left in the part's cell to where it belongs."""
        if self.index is not None:
            call = partial(self.stack.index_copy_, 0, self.index, self.cell.read())
            operations.append(Operation("scatter", call, members))

    def add(self, operations: list[Operation], name: str, addend: Cell, factor: float, members: Sequence[str]) -> None:
        """Add factor · addend; rows that occur twice are added to twice."""
        if self.index is not None:
            call: Callable[[], object] = partial(_scatter_add, self.stack, self.index, addend, factor)
        elif addend.fixed:
            call = partial(self.cell.read().add_, addend.read(), alpha=factor)
        else:
            call = partial(_add, self.cell.read(), addend, factor)
        operations.append(Operation(name, call, members))


def read(place: Part | Cell, operations: list[Operation], members: Sequence[str]) -> Cell:
    """What lies at a place, as a cell; with the operation that gathers it where it is scattered."""
    return place.gathered(operations, members) if isinstance(place, Part) else place


def written(place: Part | Cell) -> Cell:
    """Where to leave what belongs at a place; :func:`finish` then brings it there."""
    return place.cell if isinstance(place, Part) else place


def finish(place: Part | Cell, operations: list[Operation], members: Sequence[str]) -> None:
    """The operation that scatters what was left, where that is needed."""
    if isinstance(place, Part):
        place.scatter(operations, members)


def run_of(positions: Positions) -> tuple[int, int] | None:
    """First row and the one after the last, if the rows follow each other; else None."""
    first, count = int(positions[0]), len(positions)
    if count == 1 or (int(positions[-1]) - first == count - 1 and bool((np.diff(positions) > 0).all())):
        return first, first + count
    return None


def _scatter_add(goal: Tensor, index: Tensor, addend: Cell, factor: float) -> None:
    tensor = addend.read()
    if tensor.untyped_storage().data_ptr() == goal.untyped_storage().data_ptr():
        tensor = tensor.clone()  # what an identity contributes may be other rows of this very stack
    goal.index_add_(0, index, tensor, alpha=factor)


def _add(goal: Tensor, addend: Cell, factor: float) -> None:
    goal.add_(addend.read(), alpha=factor)


def forward(kernel: Kernel[Any], call: Call, value: Cell, output: Cell) -> Callable[[], object]:
    """Runs a kernel forward."""
    if value.fixed and output.fixed and kernel.fills_out:
        return partial(kernel.forward, call, value.read(), output.read())
    return partial(_forward, kernel, call, value, output)


def _forward(kernel: Kernel[Any], call: Call, value: Cell, output: Cell) -> None:
    output.write(kernel.forward(call, value.read(), output.tensor))


def message(
    kernel: Kernel[Any], call: Call, delta: Cell, value: Cell, output: Cell, goal: Cell
) -> Callable[[], object]:
    """Runs a kernel backward, from delta to the message to its input."""
    if kernel.fills_out and all(cell.fixed for cell in (delta, value, output, goal)):
        return partial(kernel.message, call, delta.read(), value.read(), output.read(), goal.read())
    return partial(_message, kernel, call, delta, value, output, goal)


def _message(kernel: Kernel[Any], call: Call, delta: Cell, value: Cell, output: Cell, goal: Cell) -> None:
    goal.write(kernel.message(call, delta.read(), value.read(), output.read(), goal.tensor))


def rounded_message(
    kernel: Kernel[Any], call: Call, delta: Cell, value: Cell, output: Cell, goal: Cell, dtype: torch.dtype
) -> None:
    """Run a kernel backward with its products in a lower precision."""
    lower = call._replace(weights={name: weight.to(dtype) for name, weight in call.weights.items()})
    given, before = delta.read().to(dtype), value.read()
    goal.write(kernel.message(lower, given, before.to(dtype), output.read(), None).to(before.dtype))


def add_message(kernel: Kernel[Any], call: Call, delta: Cell, goal: Tensor, factor: float) -> Callable[[], object]:
    """Adds a kernel's message straight to where it goes."""
    if delta.fixed:
        return partial(kernel.add_message, call, delta.read(), goal, factor)
    return lambda: kernel.add_message(call, delta.read(), goal, factor)


def take(goal: Cell, original: Cell) -> None:
    """Leave a copy of one cell's tensor in another, even where the other would hold on to the tensor itself."""
    goal.write(original.read() if goal.fixed else original.read().clone())


def add_up(goal: Cell, terms: Sequence[Cell]) -> None:
    """Leave the sum of some cells in another."""
    if len(terms) == 1:
        goal.write(terms[0].read())
        return
    total = torch.add(terms[0].read(), terms[1].read(), out=goal.tensor)
    for term in terms[2:]:
        total.add_(term.read())
    goal.write(total)

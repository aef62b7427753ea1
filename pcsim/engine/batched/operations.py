"""The operations of a program that run kernels: bound once to where their tensors lie, and called at every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcsim.engine.batched.places import Cell
from pcsim.engine.kernels.kernel import Call, Kernel


def forward(kernel: Kernel[Any], call: Call, value: Cell, output: Cell) -> Callable[[], object]:
    """Runs a kernel forward."""
    if value.fixed and output.fixed and kernel.fills_out:
        return kernel.predicting(call, value.read(), output.read())
    return partial(_forward, kernel, call, value, output)


def _forward(kernel: Kernel[Any], call: Call, value: Cell, output: Cell) -> None:
    output.write(kernel.forward(call, value.read(), output.tensor))


def message(
    kernel: Kernel[Any], call: Call, delta: Cell, value: Cell, output: Cell, goal: Cell
) -> Callable[[], object]:
    """Runs a kernel backward, from delta to the message to its input."""
    value, output = _needed(kernel, delta, value, output)
    if kernel.fills_out and all(cell.fixed for cell in (delta, value, output, goal)):
        return kernel.messaging(call, delta.read(), value.read(), output.read(), goal.read())
    return partial(_message, kernel, call, delta, value, output, goal)


def _needed(kernel: Kernel[Any], delta: Cell, value: Cell, output: Cell) -> tuple[Cell, Cell]:
    """Value and output, or delta in their places where a kernel asks nothing of them, and they may have been let go.

    Of an output that is not read only the shape counts, which is delta's.
    """
    return delta if kernel.forgets else value, output if kernel.reads == "output" else delta


def _message(kernel: Kernel[Any], call: Call, delta: Cell, value: Cell, output: Cell, goal: Cell) -> None:
    goal.write(kernel.message(call, delta.read(), value.read(), output.read(), goal.tensor))


def rounded_message(
    kernel: Kernel[Any], call: Call, delta: Cell, value: Cell, output: Cell, goal: Cell, dtype: torch.dtype
) -> None:
    """Run a kernel backward with its products in a lower precision."""
    lower = call._replace(weights={name: weight.to(dtype) for name, weight in call.weights.items()})
    given = delta.read()
    value, output = _needed(kernel, delta, value, output)
    sent = kernel.message(lower, given.to(dtype), value.read().to(dtype), output.read(), None)
    goal.write(sent.to(given.dtype))


def add_message(
    kernel: Kernel[Any], call: Call, delta: Cell, goal: Tensor, factor: float, *, over: bool
) -> Callable[[], object]:
    """Adds a kernel's message straight to where it goes, or writes it over what is there."""
    if delta.fixed:
        return kernel.adding(call, delta.read(), goal, factor, over=over)
    return lambda: kernel.adding(call, delta.read(), goal, factor, over=over)()


def take(goal: Cell, original: Cell) -> None:
    """Leave a copy of one cell's tensor in another, even where the other would hold on to the tensor itself."""
    goal.write(original.read() if goal.fixed else original.read().clone())


def add_up(goal: Cell, terms: Sequence[Cell]) -> list[Callable[[], object]]:
    """What leaves the sum of some cells in another, call by call."""
    if len(terms) == 1 or not all(cell.fixed for cell in (goal, *terms)):
        return [partial(_add_up, goal, terms)]
    total = goal.read()
    first: Callable[[], object] = partial(torch.add, terms[0].read(), terms[1].read(), out=total)
    return [first, *(partial(total.add_, term.read()) for term in terms[2:])]


def _add_up(goal: Cell, terms: Sequence[Cell]) -> None:
    if len(terms) == 1:
        goal.write(terms[0].read())
        return
    total = torch.add(terms[0].read(), terms[1].read(), out=goal.tensor)
    for term in terms[2:]:
        total.add_(term.read())
    goal.write(total)

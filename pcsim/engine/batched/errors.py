"""Errors: of the nodes that are active, weighed, and pulled back through the nodes' transfers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pcsim.dynamics.learning import LearningRule
from pcsim.engine.batched import operations as do
from pcsim.engine.batched.memory import Memory
from pcsim.engine.batched.nodes import NodeMemory
from pcsim.engine.batched.places import Arena, Cell, Named, Operation, Part, finish, read, written
from pcsim.engine.kernels.autograd import Traced
from pcsim.engine.planning.liveness import Phase
from pcsim.engine.planning.wiring import Factors, Mask, Positions
from pcsim.graph.energy import Energy, Scale
from pcsim.graph.node import Node

Delta = Callable[[Energy, Tensor, Tensor, Scale], Tensor]


def compare(memory: Memory, operations: list[Operation], phase: Phase, *, learning: bool) -> None:
    """δ of the active nodes, with precision and weight; for learning, with weight alone."""
    rule = memory.task.rule
    usual = rule.usual or not learning
    for node, rows in memory.node_rows(phase.active & ~memory.sloped):
        names = Named(node.names, rows)
        scale = scale_of(memory, node, rows, phase, learning=learning)
        if node.keeps_error and usual:
            error, goal = read(node.part("error", rows), operations, names), node.part("delta", rows)
            _weigh(operations, error.read(), goal.cell.read(), scale, names)
            goal.scatter(operations, names)
        elif node.group.received and usual:
            _received(memory, operations, node, rows, scale)
        elif node.node.energy_function.gaussian and usual:
            value, prediction = (read(node.part(n, rows), operations, names) for n in ("value", "prediction"))
            goal = node.part("delta", rows)
            delta = goal.cell.read()
            operations.append(Operation("error", partial(torch.sub, value.read(), prediction.read(), out=delta), names))
            carried = memory.wiring.multiplied[node.group.positions[rows[0]]]
            if carried and not learning:
                multiplier = node.part("multiplier", rows)
                growing = partial(_multiply, memory, multiplier.gathered(operations, names), delta)
                operations.append(Operation("multiplier", growing, names))
                multiplier.scatter(operations, names)
            _weigh(operations, delta, delta, scale, names)
            if carried:
                multiplier = node.part("multiplier", rows)
                add = partial(delta.add_, read(multiplier, operations, names).read())
                operations.append(Operation("add multiplier", add, names))
            goal.scatter(operations, names)
        else:
            given: Delta = rule.delta if learning else LearningRule.descent
            call = partial(_by_energy, node, rows.tolist(), given, scale)
            operations.append(Operation("error", call, names))


def slope(memory: Memory, operations: list[Operation], nodes: Mask) -> None:
    """Precision and derivative of many nodes' transfers at once, where each of them will send one error only."""
    for node, rows in memory.node_rows(nodes):
        names, goal = Named(node.names, rows), node.part("delta", rows)
        delta = goal.cell.read()
        scale = _by_row(memory.plan.sent(node.group.positions[rows]), delta)
        operations.append(Operation("precision", partial(delta.copy_, scale.expand(delta.shape)), names))
        goal.scatter(operations, names)
    pull(memory, operations, nodes, np.zeros_like(nodes))


def fade(memory: Memory, operations: list[Operation], nodes: Mask, weights: Factors) -> None:
    """Move nodes by errors that are what they have received: of it 1 − rate · π w is left.

    Args:
        memory: the program's tensors.
        operations: to add to.
        nodes: to move.
        weights: π w of each node.
    """
    for node, rows in memory.node_rows(nodes):
        names, part = Named(node.names, rows), node.part("displacement", rows)
        moved = read(part, operations, names).read()
        left = 1 - memory.task.relaxation.rate * weights[node.group.positions[rows]]
        operations.append(Operation("own error", partial(moved.mul_, _by_row(left, moved)), names))
        part.scatter(operations, names)


def _by_row(factors: Factors, rows: Tensor) -> Tensor:
    """One factor for each row of a part, to be multiplied with it; 0-d where the part is a single row."""
    made = torch.as_tensor(factors.tolist(), dtype=rows.dtype, device=rows.device)
    return made[0] if len(factors) == 1 else made.view(-1, *[1] * (rows.dim() - 1))


def _multiply(memory: Memory, multiplier: Cell, error: Tensor) -> None:
    """λ + α ε, from the second step on: what it grows by is the error after a step."""
    if memory.step:
        multiplier.read().add_(error, alpha=memory.task.relaxation.multipliers)


def last_multipliers(memory: Memory) -> None:
    """The multipliers after the last step, once predictions are up to date."""
    for node, rows in memory.node_rows(memory.wiring.multiplied):
        for row in rows.tolist():
            error = node.tensor("value")[row] - node.tensor("prediction")[row]
            node.tensor("multiplier")[row].add_(error, alpha=memory.task.relaxation.multipliers)


def _received(
    memory: Memory, operations: list[Operation], node: NodeMemory, rows: Positions, scale: Scale | Callable[[], Scale]
) -> None:
    """δ of nodes that keep apart what they receive: that, less how their prediction has changed since the start."""
    names, goal = Named(node.names, rows), node.part("delta", rows)
    error, delta = read(node.part("displacement", rows), operations, names), goal.cell.read()
    if node.changes and not memory.task.learns_forward:
        before, prediction = (read(node.part(n, rows), operations, names) for n in ("forward_prediction", "prediction"))
        change = partial(torch.sub, before.read(), prediction.read(), out=delta)
        operations += [Operation("change", change, names), Operation("error", partial(delta.add_, error.read()), names)]
        error = Cell(delta)
    _weigh(operations, error.read(), delta, scale, names)
    goal.scatter(operations, names)


def _weigh(
    operations: list[Operation],
    error: Tensor,
    delta: Tensor,
    scale: Scale | Callable[[], Scale],
    names: Sequence[str],
) -> None:
    """δ = scale · error, where the error may be there already."""
    if callable(scale):
        operations.append(Operation("weigh", partial(_weigh_anew, error, delta, scale), names))
    elif isinstance(scale, Tensor) or scale != 1.0:
        # A number would be wrapped into a tensor at every call, which takes longer than a small product.
        factor = torch.as_tensor(scale, dtype=delta.dtype, device=delta.device)
        operations.append(Operation("weigh", partial(torch.mul, error, factor, out=delta), names))
    elif error is not delta:
        operations.append(Operation("error", partial(delta.copy_, error), names))


def _weigh_anew(error: Tensor, delta: Tensor, scale: Callable[[], Scale]) -> None:
    torch.mul(error, scale(), out=delta)


def scale_of(
    memory: Memory, node: NodeMemory, rows: Positions, phase: Phase, *, learning: bool
) -> Scale | Callable[[], Scale]:
    """π w of rows, or w to learn after the steps: a number where all are equal, (k, 1, ...), or what works it out."""
    scales = node.energy_weight[rows]
    if not learning or memory.task.learns_each_step:
        scales = scales * phase.schedule[node.group.positions[rows]]
        own = node.own_precision
        if np.isnan(own).any():
            members = [node.group.nodes[row] for row in rows]
            return partial(_own_scale, memory, node.arena, members, scales.tolist())
        scales = scales * own[rows]
    if (scales == scales[0]).all():
        return float(scales[0])
    shape = (len(scales),) + (1,) * (1 + len(node.node.shape))
    return torch.as_tensor(scales, dtype=node.arena.dtype, device=node.arena.device).view(shape)


def _own_scale(memory: Memory, arena: Arena, nodes: Sequence[Node], factors: Sequence[float]) -> Tensor:
    """π w of nodes whose own precision is a tensor, (k, 1 or batch, *shape) with axes of one where it is that of a
    whole node, which an energy that is not by unit counts once; without the first axis for a single one.
    """
    scales, given = [], memory.at_hand().precision
    for node, factor in zip(nodes, factors, strict=True):
        own = given.get(node.name, node.own_precision)
        if not isinstance(own, Tensor):  # made on the device, where a run that is captured brings nothing from the host
            own = torch.full((), own, dtype=arena.dtype, device=arena.device)
        scale = factor * own.to(arena.device, arena.dtype).detach()
        if node.name not in given:
            scale = scale.view(1, *(scale.shape or [1] * len(node.shape)))
        scales.append(scale)
    if len(scales) == 1:
        return scales[0]
    shape = torch.broadcast_shapes(*(scale.shape for scale in scales))  # type: ignore[no-untyped-call]
    return torch.stack([scale.expand(shape) for scale in scales])


def each(
    node: NodeMemory, rows: Sequence[int], scale: Scale | Callable[[], Scale]
) -> list[tuple[int, Tensor, Tensor, Scale]]:
    """Value, prediction and scale of each row, as an energy of a user's own takes them."""
    scales = scale() if callable(scale) and not isinstance(scale, Tensor) else scale
    stacked = isinstance(scales, Tensor) and len(rows) > 1
    found: list[tuple[int, Tensor, Tensor, Scale]] = []
    for index, row in enumerate(rows):
        value, prediction = (node.tensor(name)[row].contiguous() for name in ("value", "prediction"))
        found.append((row, value, prediction, scales[index] if stacked else scales))  # type: ignore[index]
    return found


def _by_energy(node: NodeMemory, rows: Sequence[int], rule: Delta, scale: Scale | Callable[[], Scale]) -> None:
    """δ of nodes whose energy or learning rule is not the usual one, node by node."""
    for row, value, prediction, own in each(node, rows, scale):
        node.tensor("delta")[row].copy_(rule(node.node.energy_function, value, prediction, own))


def pull(memory: Memory, operations: list[Operation], nodes: Mask, learn: Mask) -> None:
    """Errors pulled back through transfers, to what the edges contribute.

    Args:
        memory: the program's tensors.
        operations: to add to.
        nodes: nodes whose δ is there.
        learn: nodes whose own parameters learn from it, so that autograd may find their gradients on the same way.
    """
    for node, rows in memory.node_rows(nodes & memory.sloped):
        names, there = Named(node.names, rows), node.part("delta", rows)
        factor, error = (read(part, operations, names).read() for part in (there, node.part("displacement", rows)))
        operations.append(Operation("error", partial(factor.mul_, error), names))
        there.scatter(operations, names)
    for node, rows in memory.node_rows(nodes & ~memory.sloped):
        names = Named(node.names, rows)
        if node.trace is not None:
            incoming = np.flatnonzero(memory.wiring.target == node.group.positions[0])
            goals = [written(node.pulled(rows, int(position))) for position in incoming]
            delta = read(node.part("delta", rows), operations, names)
            learns = bool(learn[node.group.positions[0]])
            operations.append(Operation("vjp transfer", partial(vjp, node.trace, delta, goals, learns), names))
            continue
        for position in reversed(range(len(node.chain))):
            kernel, call = node.chain[position].kernel, node.calls[position]
            delta = read(node.delta(rows, position + 1), operations, names)
            goal = node.delta(rows, position)
            value, output = (
                content(place, operations, names, needed)
                for place, needed in (
                    (node.place(position, rows), kernel.reads == "input"),
                    (node.place(position + 1, rows), kernel.reads == "output"),
                )
            )
            back = do.message(kernel, call, delta, value, output, written(goal))
            operations.append(Operation(f"vjp {type(kernel).__name__}", back, names))
            finish(goal, operations, names)


def content(place: Part | Cell, operations: list[Operation], names: Sequence[str], needed: bool) -> Cell:
    """A place's cell, its content brought there only where it is needed."""
    return read(place, operations, names) if needed else written(place)


def vjp(trace: Traced, delta: Cell, goals: Sequence[Cell], learn: bool) -> None:
    """Pull an error back through what is computed by autograd."""
    for goal, message in zip(goals, trace.vjp(delta.read(), learn=learn), strict=True):
        goal.write(message)

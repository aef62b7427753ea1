"""Messages: what edges feed back to their sources, and how free nodes move by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from pcsim.dynamics.learning import LearningRule
from pcsim.engine.batched import operations as do
from pcsim.engine.batched.edges import EdgeMemory
from pcsim.engine.batched.errors import content, each, pull, scale_of, vjp
from pcsim.engine.batched.memory import Memory
from pcsim.engine.batched.nodes import NodeMemory
from pcsim.engine.batched.places import Cell, Named, Operation, Part, read
from pcsim.engine.batched.predict import zero
from pcsim.engine.kernels.kernel import Kernel
from pcsim.engine.planning.liveness import Phase
from pcsim.engine.planning.wiring import Mask, Positions, masked
from pcsim.graph.energy import Scale


def relay(
    memory: Memory,
    operations: list[Operation],
    phase: Phase,
    learn: Mask,
    dtype: torch.dtype | None,
    *,
    direct: bool = False,
) -> None:
    """Errors through deterministic nodes, and through those whose values follow from their errors, within the step."""
    wiring = memory.wiring
    for members, _ in reversed(wiring.generations):
        now = masked(members, len(phase.relay)) & phase.relay
        for node, rows in memory.node_rows(now):
            node.fresh["delta"][rows] = True
        for edge, rows in memory.edge_rows(phase.message & now[wiring.source]):
            _send(memory, operations, edge, rows, "delta", 1.0, learn, dtype)
        for node, rows in memory.node_rows(now):
            _zero_fresh(operations, node, rows, "delta")
        for node, rows in memory.node_rows(now & wiring.following):
            _pass_on(memory, operations, node, rows, phase, direct=direct)
        pull(memory, operations, now, learn)


def _pass_on(
    memory: Memory, operations: list[Operation], node: NodeMemory, rows: Positions, phase: Phase, *, direct: bool
) -> None:
    """Move errors, or add to their descent, by what has arrived and by themselves; what is handed on stays in δ."""
    names, scale = Named(node.names, rows), scale_of(memory, node, rows, phase, learning=False)
    if node.partial or not node.keeps_error:
        operations.append(Operation("pass on", partial(_pass_by_energy, memory, node, rows.tolist(), scale), names))
        return
    delta, error = (read(node.part(name, rows), operations, names) for name in ("delta", "error"))
    goal, rate = (
        (node.part("error", rows), memory.task.relaxation.rate) if direct else (node.part("descent", rows), 1.0)
    )
    moving = error if direct else read(goal, operations, names)
    if callable(scale):
        own: Callable[[], object] = partial(_own_pull_anew, moving.read(), error.read(), scale, -rate)
    else:
        factor = torch.as_tensor(scale, dtype=node.arena.dtype, device=node.arena.device)
        own = partial(moving.read().addcmul_, error.read(), factor, value=-rate)
    if callable(scale) or bool((factor != 0).any()):
        operations.append(Operation("own error", own, names))
    operations.append(Operation("arrived", partial(moving.read().add_, delta.read(), alpha=rate), names))
    goal.scatter(operations, names)


def _own_pull_anew(moving: torch.Tensor, error: torch.Tensor, scale: Callable[[], Scale], rate: float) -> None:
    moving.addcmul_(error, torch.as_tensor(scale(), dtype=error.dtype, device=error.device), value=rate)


def _pass_by_energy(memory: Memory, node: NodeMemory, rows: Sequence[int], scale: Any) -> None:
    """The same for other energies, and where some units are given, whose values do not follow."""
    own: Scale
    for row, value, prediction, own in each(node, rows, scale):
        energy, given = node.node.energy_function, memory.at_hand().given(node.names[row])
        moved = node.tensor("delta")[row] - energy.value_gradient(value, prediction, own)
        if given is not None:
            moved = torch.where(given, 0.0, moved)
        node.tensor("descent")[row].add_(moved)
        node.tensor("delta")[row].copy_(moved + LearningRule.descent(energy, value, prediction, own))


def send(
    memory: Memory, operations: list[Operation], message: Mask, learn: Mask, dtype: torch.dtype | None, *, direct: bool
) -> None:
    """Messages to free nodes: to what moves them, or straight to their values where they may move at once.

    Args:
        memory: the program's tensors.
        operations: to add to.
        message: edges that feed back.
        learn: nodes whose incoming edges learn, so that autograd may find their gradients on the same way.
        dtype: a lower precision for the products; None for that of the values.
        direct: add rate · message to the values.
    """
    for edge, rows in memory.edge_rows(message):
        goal, factor = (edge.source.moving, memory.task.relaxation.rate) if direct else ("descent", 1.0)
        _send(memory, operations, edge, rows, goal, factor, learn, dtype)


def _send(
    memory: Memory,
    operations: list[Operation],
    edge: EdgeMemory,
    rows: Positions,
    name: str,
    factor: float,
    learn: Mask,
    dtype: torch.dtype | None,
) -> None:
    names = Named(edge.names, rows)
    goal = edge.source.part(name, edge.group.source_rows[rows])
    over = _first_to_write(operations, edge.source, edge.group.source_rows[rows], name)
    if edge.trace is not None:
        delta, cell = delta_after(memory, operations, edge, rows, 0, dtype), edge.message_cell(0, rows)
        learns = bool(learn[memory.wiring.target[edge.group.positions[0]]])
        operations.append(Operation("message", partial(vjp, edge.trace, delta, [cell], learns), names))
        goal.add(operations, "add message", edge.sent(cell, operations, rows), factor, names, over=over)
        return
    delta = delta_after(memory, operations, edge, rows, 0, dtype)
    if not edge.chain:
        goal.add(operations, "add message", edge.sent(delta, operations, rows), factor, names, over=over)
        return
    kernel, call = edge.chain[0].kernel, edge.weights.call(0, rows, operations)
    title = f"message {type(kernel).__name__}"
    if kernel.adds and goal.index is None and dtype is None and not edge.crosses:
        add = do.add_message(kernel, call, delta, goal.cell.read(), factor, over=over)
        operations.append(Operation(title, add, names))
        return
    value = edge.reads(memory.activity, rows, operations, needed=kernel.reads == "input")
    output = content(edge.place(1, rows), operations, names, kernel.reads == "output")
    straight = over and factor == 1.0 and goal.index is None and not edge.crosses
    cell = goal.cell if straight else edge.message_cell(0, rows)
    operations.append(Operation(title, _back(kernel, call, delta, value, output, cell, dtype), names))
    if not straight:
        goal.add(operations, "add message", edge.sent(cell, operations, rows), factor, names, over=over)
        if not (cell.fixed or kernel.fills_out):
            operations.append(Operation("let go", cell.let_go, names))


def _first_to_write(operations: list[Operation], node: NodeMemory, rows: Positions, name: str) -> bool:
    """Whether nothing has been written into these rows of a tensor, so that the first message may be.

    Where that holds of some of them only, those are set to zero, to be added to like the others.
    """
    if name not in node.fresh:
        return False
    fresh = rows[node.fresh[name][rows]]
    if len(fresh) == len(rows) == len(np.unique(rows)):
        node.fresh[name][rows] = False
        return True
    _zero_fresh(operations, node, rows, name)
    return False


def _zero_fresh(operations: list[Operation], node: NodeMemory, rows: Positions, name: str) -> None:
    """Set to zero those of these rows into which nothing has been written."""
    empty = np.unique(rows[node.fresh[name][rows]])
    node.fresh[name][empty] = False
    if len(empty):
        zero(operations, node.part(name, empty), Named(node.names, empty))


def _back(
    kernel: Kernel[Any], call: Any, delta: Cell, value: Cell, output: Cell, goal: Cell, dtype: torch.dtype | None
) -> Any:
    if kernel.products and dtype is not None:
        return partial(do.rounded_message, kernel, call, delta, value, output, goal, dtype)
    return do.message(kernel, call, delta, value, output, goal)


def delta_after(
    memory: Memory,
    operations: list[Operation],
    edge: EdgeMemory,
    rows: Positions,
    link: int,
    dtype: torch.dtype | None,
) -> Cell:
    """The target's error pulled back to the output of link ``link`` of an edge's chain."""
    names = Named(edge.names, rows)
    position = int(edge.group.positions[rows[0]])
    place = edge.target.pulled(edge.group.target_rows[rows], position)
    if isinstance(place, Part) and place.index is not None:
        place = edge.target.part("delta", edge.group.target_rows[rows], reader=edge.names[0])
    delta = read(place, operations, names)
    for later in reversed(range(link + 1, len(edge.chain))):
        kernel, call = edge.chain[later].kernel, edge.weights.call(later, rows, operations)
        value = content(edge.place(later, rows), operations, names, kernel.reads == "input")
        output = content(edge.place(later + 1, rows), operations, names, kernel.reads == "output")
        cell = edge.message_cell(later, rows)
        back = _back(kernel, call, delta, value, output, cell, dtype)
        operations.append(Operation(f"vjp {type(kernel).__name__}", back, names))
        delta = cell
    return delta


def own_pull(memory: Memory, operations: list[Operation], phase: Phase, *, direct: bool) -> None:
    """What the active free nodes move by their own errors; straight in their values, or in their descent."""
    for node, rows in memory.node_rows(phase.active & memory.wiring.free & ~(memory.wiring.following | memory.waiting)):
        names = Named(node.names, rows)
        if node.node.energy_function.gaussian:
            delta = read(node.part("delta", rows), operations, names)
            name, factor = (node.moving, -memory.task.relaxation.rate) if direct else ("descent", -1.0)
            node.part(name, rows).add(operations, "own error", delta, factor, names)
        else:
            scale = scale_of(memory, node, rows, phase, learning=False)
            operations.append(Operation("own error", partial(_pull_by_energy, node, rows.tolist(), scale), names))


def _pull_by_energy(node: NodeMemory, rows: Sequence[int], scale: Any) -> None:
    """−∂(π w E)/∂v of nodes with another energy, added to their descent."""
    own: Scale
    for row, value, prediction, own in each(node, rows, scale):
        node.tensor("descent")[row].sub_(node.node.energy_function.value_gradient(value, prediction, own))


class Largest:
    """The largest update of the present step, where the relaxation may stop by it."""

    def __init__(self) -> None:
        self.update = 0.0


def displace(
    memory: Memory,
    node: NodeMemory,
    names: Sequence[str],
    part: Part,
    descent: Part,
    velocity: Part | None,
    largest: Largest,
) -> None:
    """Move nodes by their descent, as the relaxation says."""
    relaxation = memory.task.relaxation
    move, moved_on = relaxation.displacement(_rows(descent), None if velocity is None else _rows(velocity))
    if velocity is not None and moved_on is not None:
        _put(velocity, moved_on)
    if memory.rates is not None:
        move = memory.rates.scale(move, len(node.node.shape))
    if relaxation.temperature:
        alone, seed = len(names) == 1, memory.at_hand().seed
        drawn = [relaxation.noise(move if alone else move[0], seed, name, memory.step) for name in names]
        move = move + (drawn[0] if alone else torch.stack(drawn))
    before = _rows(part).clone() if relaxation.tolerance is not None else None
    if part.index is None:
        part.cell.read().add_(move)
    else:
        part.stack.index_add_(0, part.index, move)
    if node.partial and not node.group.following:
        node.clamp()
    if before is not None:
        largest.update = max(largest.update, (_rows(part) - before).abs().max().item())


def _rows(part: Part) -> torch.Tensor:
    return part.cell.read() if part.index is None else part.stack.index_select(0, part.index)


def _put(part: Part, tensor: torch.Tensor) -> None:
    if part.index is None:
        part.cell.read().copy_(tensor)
    else:
        part.stack.index_copy_(0, part.index, tensor)

"""Predictions: edges evaluated, what they contribute combined, and transfers applied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from pcsim.engine.batched import operations as do
from pcsim.engine.batched.edges import Activity, EdgeMemory
from pcsim.engine.batched.memory import Memory
from pcsim.engine.batched.nodes import NodeMemory
from pcsim.engine.batched.places import Cell, Named, Operation, Part, finish, read, written
from pcsim.engine.kernels.autograd import Traced
from pcsim.engine.planning.wiring import Mask, Positions, masked


def predict(
    memory: Memory,
    operations: list[Operation],
    refresh: Mask,
    nodes: Mask,
    activity: Activity,
    following: Mask | None = None,
) -> None:
    """Evaluate edges again, then the predictions that follow, passing nodes first.

    Args:
        memory: the program's tensors.
        operations: to add to.
        refresh: edges to evaluate.
        nodes: nodes to predict.
        activity: what the edges read.
        following: nodes to put where their errors put them.
    """
    wiring = memory.wiring
    following = np.zeros_like(nodes) if following is None else following & wiring.following
    for generation in np.unique(wiring.generation[nodes | wiring.any_of(refresh, wiring.target) | following]):
        members = wiring.generation == generation
        for node, rows in memory.node_rows(nodes & members):
            cells = _cells_to_take_over(memory, node, rows, activity)
            operations += [Operation("let go", cell.let_go, Named(node.names, rows)) for cell in cells]
        for edge, rows in memory.edge_rows(refresh & members[wiring.target]):
            _evaluate(operations, edge, rows, activity)
        for node, rows in memory.node_rows(nodes & members):
            _transfer(memory, operations, node, rows, activity)
        for node, rows in memory.node_rows(following & members):
            _follow(memory, operations, node, rows)


def _follow(memory: Memory, operations: list[Operation], node: NodeMemory, rows: Positions) -> None:
    """Values from predictions and errors, v = u + ε; where some units are given, their errors follow from them."""
    names, goal = Named(node.names, rows), node.part("value", rows)
    first, second = (read(node.part(name, rows), operations, names).read() for name in ("prediction", "error"))
    operations.append(Operation("follow", partial(torch.add, first, second, out=goal.cell.read()), names))
    goal.scatter(operations, names)
    if node.partial:
        operations.append(Operation("clamp", partial(_clamp_following, memory, node, rows.tolist()), names))


def _clamp_following(memory: Memory, node: NodeMemory, rows: Sequence[int]) -> None:
    batch = memory.at_hand()
    for row in rows:
        value, prediction, error = (node.tensor(name)[row] for name in ("value", "prediction", "error"))
        given = batch.given(node.names[row])
        assert given is not None
        value.copy_(batch.clamped(node.names[row], value))
        error.copy_(torch.where(given, value - prediction, error))


def _evaluate(operations: list[Operation], edge: EdgeMemory, rows: Positions, activity: Activity) -> None:
    names = Named(edge.names, rows)
    if edge.length == 0:
        if edge.direct:
            value, goal = edge.reads(activity, rows, operations), edge.place(0, rows)
            operations.append(Operation("copy", partial(do.take, written(goal), value), names))
            finish(goal, operations, names)
        return
    value = edge.reads(activity, rows, operations)
    if edge.trace is not None:
        goal = edge.place(1, rows)
        operations.append(Operation("predict", partial(_trace, edge.trace, [value], written(goal)), names))
        finish(goal, operations, names)
        return
    for position, link in enumerate(edge.chain):
        goal = edge.place(position + 1, rows)
        call = edge.weights.call(position, rows, operations)
        output = written(goal)
        operations.append(
            Operation(f"predict {_title(link.kernel)}", do.forward(link.kernel, call, value, output), names)
        )
        finish(goal, operations, names)
        value = output


def _title(kernel: object) -> str:
    return type(kernel).__name__


def _trace(trace: Traced, inputs: Sequence[Cell], output: Cell) -> None:
    output.write(trace.forward([cell.read() for cell in inputs]))


def _transfer(
    memory: Memory, operations: list[Operation], node: NodeMemory, rows: Positions, activity: Activity
) -> None:
    names = Named(node.names, rows)
    chosen = masked(node.group.positions[rows], len(memory.wiring.nodes))
    feeding = list(memory.edge_rows(chosen[memory.wiring.target]))
    goal: Part | Cell
    if node.trace is not None:
        # Edges into such a node are in groups of one, so that sorting them gives the order of its arguments.
        feeding.sort(key=lambda item: int(item[0].group.positions[0]))
        cells = [edge.contribution(some, activity, operations) for edge, some in feeding]
        goal = node.part("prediction", rows)
        operations.append(Operation("transfer", partial(_trace, node.trace, cells, written(goal)), names))
        finish(goal, operations, names)
        return
    _combine(operations, node, [item for item in feeding if not item[0].direct], activity)
    for position, link in enumerate(node.chain):
        value, goal = read(node.place(position, rows), operations, names), node.place(position + 1, rows)
        call = do.forward(link.kernel, node.calls[position], value, written(goal))
        operations.append(Operation(f"transfer {_title(link.kernel)}", call, names))
        finish(goal, operations, names)
        makers = [node.chain[position - 1]] if position else [edge.chain[-1] for edge, _ in feeding if edge.chain]
        if link.kernel.forgets and not value.fixed and all(maker.kernel.reads != "output" for maker in makers):
            pulled = node.delta(rows, position)
            if isinstance(pulled, Cell) and pulled in _cells_to_take_over(memory, node, rows, activity):
                operations.append(Operation("hand over", partial(_hand_over, value, pulled), names))
            else:
                operations.append(Operation("let go", value.let_go, names))


def _cells_to_take_over(memory: Memory, node: NodeMemory, rows: Positions, activity: Activity) -> list[Cell]:
    """Where errors pulled back will lie from a step to the learning, in the memory of what the transfer has forgotten.

    Anew, each would be had from the system, and cleared, at every run.
    """
    if activity != "start" or np.isnan(memory.plan.lasting_errors[node.group.positions[rows]]).any():
        return []
    return node.pulled_cells(rows)


def _hand_over(there: Cell, here: Cell) -> None:
    here.tensor = there.tensor
    there.let_go()


def _combine(
    operations: list[Operation], node: NodeMemory, feeding: list[tuple[EdgeMemory, Positions]], activity: Activity
) -> None:
    """Sum what several edges contribute."""
    if not feeding:
        return
    rows = np.unique(np.concatenate([edge.group.target_rows[some] for edge, some in feeding]))
    names = Named(node.names, rows)
    goal = node.place(0, rows)
    if all(np.array_equal(edge.group.target_rows[some], rows) for edge, some in feeding):
        terms = [edge.contribution(some, activity, operations) for edge, some in feeding]
        operations += [Operation("combine", call, names) for call in do.add_up(written(goal), terms)]
        finish(goal, operations, names)
        return
    zero(operations, goal, names)
    for edge, some in feeding:
        addend = edge.contribution(some, activity, operations)
        node.inlet(edge.group.target_rows[some]).add(operations, "combine", addend, 1.0, Named(edge.names, some))


def zero(operations: list[Operation], place: Part | Cell, names: Sequence[str]) -> None:
    """Set a part to zero."""
    assert isinstance(place, Part)
    operations.append(Operation("zero", place.cell.read().zero_, names))
    place.scatter(operations, names)


def form(memory: Memory, operations: list[Operation], nodes: Mask) -> None:
    """Values of nodes that have moved, put together from their forward prediction and what they have received."""
    for node, rows in memory.node_rows(nodes):
        if not node.group.received:
            continue
        names, goal = Named(node.names, rows), node.part("value", rows)
        parts = [node.part(name, rows) for name in ("forward_prediction", "displacement")]
        first, second = (read(part, operations, names).read() for part in parts)
        operations.append(Operation("form value", partial(torch.add, first, second, out=goal.cell.read()), names))
        goal.scatter(operations, names)


def nudge(memory: Memory, node: NodeMemory) -> None:
    """Put a target a part of the way from its forward prediction to what is given."""
    value = node.tensor("value")
    torch.lerp(
        node.tensor("forward_prediction" if memory.step else "prediction"), value, memory.at_hand().nudge, out=value
    )

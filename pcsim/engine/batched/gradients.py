"""Weight gradients: −(∂a/∂θ)ᵀ δ over the batch size, in tensors that are made anew at every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcsim.engine.batched.edges import Activity, EdgeMemory
from pcsim.engine.batched.memory import Memory
from pcsim.engine.batched.messages import delta_after
from pcsim.engine.batched.nodes import NodeMemory
from pcsim.engine.batched.places import Cell, Named, Operation, read
from pcsim.engine.kernels.kernel import Call, Kernel
from pcsim.engine.planning.liveness import Phase
from pcsim.engine.planning.wiring import Factors, Mask, Positions
from pcsim.engine.problem import precision_gradient


class Found(dict[nn.Parameter, Tensor]):
    """Gradients by parameter, added up where several parts share one."""

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Take in what one part contributes."""
        before = self.setdefault(parameter, gradient)
        if before is not gradient:
            self[parameter] = before + gradient

    def add_all(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], *, apart: bool) -> None:
        """The same for several parameters; ``apart`` says that none of them occurs twice."""
        if apart and self.keys().isdisjoint(parameters):
            self.update(zip(parameters, gradients, strict=True))
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            self.add(parameter, gradient)


def learn(
    memory: Memory,
    operations: list[Operation],
    found: Found,
    phase: Phase,
    activity: Activity,
    factors: Factors,
    traced: Mask,
    *,
    exact: bool,
) -> None:
    """Gradients of the weights of the phase's learning nodes and of their incoming edges.

    Args:
        memory: the program's tensors.
        operations: to add to.
        found: where gradients go.
        phase: which nodes learn.
        activity: what their edges read.
        factors: by which δ of each node is to be multiplied.
        traced: edges whose message was sent by the same errors, so that what was found on its way need not be found
            again: by autograd, the gradients; by hand, the errors between two modules of a chain.
        exact: no message was rounded.
    """
    factors = -factors / memory.arena.batch
    for edge, rows, factor in _rows_by_factor(memory, phase.learn[memory.wiring.target], factors):
        if edge.trace is not None:
            delta = None
            if not traced[edge.group.positions[0]]:
                delta = delta_after(memory, operations, edge, rows, 0, None)
            operations.append(Operation("gradient", partial(_from_trace, edge.trace, delta, factor, found), edge.names))
            continue
        for position, link in enumerate(edge.chain):
            wanted = [name for name, p in link.module.named_parameters() if p.requires_grad]
            if wanted:
                sent = exact and len(edge.names) == 1 and bool(traced[edge.group.positions[0]])
                _learn_link(memory, operations, found, edge, rows, position, wanted, activity, factor, sent)
    for node, rows in memory.node_rows(phase.learn):
        _learn_node(memory, operations, found, node, rows, phase, factors)


def _learn_link(
    memory: Memory,
    operations: list[Operation],
    found: Found,
    edge: EdgeMemory,
    rows: Positions,
    position: int,
    wanted: Sequence[str],
    activity: Activity,
    factor: float,
    sent: bool,
) -> None:
    names = Named(edge.names, rows)
    if sent and position < len(edge.chain) - 1:
        delta = edge.message_cell(position + 1, rows)
    else:
        delta = delta_after(memory, operations, edge, rows, position, None)
    if position == 0:
        value = edge.reads(activity, rows, operations)
    else:
        value = read(edge.place(position, rows), operations, names)
    kernel, call = edge.chain[position].kernel, edge.weights.gradient_call(position, rows)
    columns = {name: edge.group.column(position, name) for name in wanted}
    parameters = {name: [column[row] for row in rows.tolist()] for name, column in columns.items()}
    title = f"gradient {type(kernel).__name__}"
    operations.append(Operation(title, _gradients(kernel, call, delta, value, factor, parameters, found), names))


def _gradients(
    kernel: Kernel[Any],
    call: Call,
    delta: Cell,
    value: Cell,
    factor: float,
    parameters: dict[str, list[nn.Parameter]],
    found: Found,
) -> Callable[[], None]:
    """Runs a kernel for the gradients of its weights, of a stack for all of its rows at once."""
    alone = {name: column[0] for name, column in parameters.items()}
    apart = {name: len(set(map(id, column))) == len(column) for name, column in parameters.items()}

    def run_alone() -> None:
        out = {name: torch.empty_like(parameter) for name, parameter in alone.items()}
        kernel.gradients(call, delta.read(), value.read(), factor, out)
        for name, parameter in alone.items():
            found.add(parameter, out[name])

    def run_stack() -> None:
        out = {name: c[0].detach().new_empty(len(c), *c[0].shape) for name, c in parameters.items()}
        kernel.gradients(call, delta.read(), value.read(), factor, out)
        for name, column in parameters.items():
            found.add_all(column, out[name].unbind(), apart=apart[name])

    return run_alone if all(len(column) == 1 for column in parameters.values()) else run_stack


def _from_trace(trace: Any, delta: Cell | None, factor: float, found: Found) -> None:
    """Gradients of a part computed by autograd; with δ if it has not been pulled back for a message already."""
    if delta is not None:
        trace.vjp(delta.read(), learn=True)
    for parameter, gradient in trace.gradients.items():
        found.add(parameter, gradient * factor)


def _learn_node(
    memory: Memory,
    operations: list[Operation],
    found: Found,
    node: NodeMemory,
    rows: Positions,
    phase: Phase,
    factors: Factors,
) -> None:
    names = Named(node.names, rows)
    # A node with parameters of its own is alone in its group.
    factor = float(factors[node.group.positions[rows[0]]])
    for position, link in enumerate(node.chain):
        wanted = {name: [p] for name, p in link.module.named_parameters() if p.requires_grad}
        if wanted:
            delta = read(node.delta(rows, position + 1), operations, names)
            value = read(node.place(position, rows), operations, names)
            call = _gradients(link.kernel, node.calls[position], delta, value, factor, wanted, found)
            operations.append(Operation(f"gradient {type(link.kernel).__name__}", call, names))
    if node.trace is not None and any(p.requires_grad for p in node.node.parameters()):
        operations.append(Operation("gradient", partial(_from_trace, node.trace, None, factor, found), names))
    if node.group.deterministic:
        return
    for row in rows.tolist():
        learned = node.group.nodes[row].log_precision
        if learned is not None and learned.requires_grad:
            position = int(node.group.positions[row])
            schedule = float(phase.schedule[position]) if memory.task.learns_each_step else 1.0
            operations.append(
                Operation(
                    "gradient",
                    partial(_precision, node, row, schedule, memory.task.weight(node.names[row]), found),
                    [names[0]],
                )
            )


def _precision(node: NodeMemory, row: int, schedule: float, weight: float, found: Found) -> None:
    own = node.group.nodes[row]
    learned = own.log_precision
    assert learned is not None
    factor = schedule * weight * learned.detach().exp()
    found.add(learned, precision_gradient(own, *node.compared(row), factor, weight))


def _rows_by_factor(memory: Memory, mask: Mask, factors: Factors) -> Iterator[tuple[EdgeMemory, Positions, float]]:
    """Rows of edges whose targets have the same factor."""
    for edge, rows in memory.edge_rows(mask):
        own = factors[memory.wiring.target[edge.group.positions[rows]]]
        for factor in np.unique(own):
            yield edge, rows[own == factor], float(factor)

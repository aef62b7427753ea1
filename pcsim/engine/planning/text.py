"""A plan as a person can read it: as text, and as a table for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from pcsim import tables
from pcsim.engine.kernels.chain import edge_chain, transfer_chain
from pcsim.graph.combining import Sum
from pcsim.graph.node import Node

if TYPE_CHECKING:
    from pcsim.engine.planning.liveness import Phase
    from pcsim.engine.planning.plan import Plan
    from pcsim.engine.planning.wiring import Mask


def describe(plan: Plan) -> str:
    """A plan as text: who moves at each step, what is computed for it, and what was left out."""
    lines = []
    for label, parts in _phases(plan):
        lines += [f"{label}:", *(f"  {part:<9}{members}" for part, members in parts.items())]
    return "\n".join([*lines, _left_out(plan), *_kernels(plan)])


def html(plan: Plan) -> str:
    """The same as a table with a row for each step, or each run of steps that compute the same."""
    phases = _phases(plan)
    headings = list(dict.fromkeys(part for _, parts in phases for part in parts))
    rows = [[label, *(parts.get(part, "") for part in headings)] for label, parts in phases]
    return tables.html(["", *headings], rows, caption="; ".join([_left_out(plan), *_kernels(plan)]))


def _phases(plan: Plan) -> list[tuple[str, dict[str, str]]]:
    """Each run of equal steps, and what is learned after them, by what is done: the nodes or edges."""
    wiring = plan.wiring
    names = [node.name for node in wiring.nodes]
    edges = [edge.name + "*" * (edge_chain(edge) is None) for edge in wiring.edges]
    phases, first = [], 0
    for last, position in enumerate(plan.sequence):
        if last + 1 < len(plan.sequence) and plan.sequence[last + 1] == position:
            continue
        phase = plan.phases[position]
        parts = {
            "predict": shown(phase.refresh, edges),
            "active": shown(phase.active, names),
            "message": shown(phase.message, edges),
            "move": shown(phase.move, names),
        }
        if plan.task.learns_each_step:
            parts["learn"] = shown(phase.learn[wiring.target], edges)
        parts |= _crossing(plan, phase, (wiring.free | phase.relay)[wiring.source])
        phases.append((f"step {first}" if first == last else f"steps {first} to {last}", parts))
        first = last + 1
    if not plan.task.learns_each_step:
        learning = plan.learning()
        learned = shown(learning.learn[wiring.target], edges)
        parts = {"predict": shown(learning.refresh, edges), "weights": learned}
        phases.append(("learn", parts | _crossing(plan, learning, learning.relay[wiring.source])))
    return phases


def _crossing(plan: Plan, phase: Phase, hearing: Mask) -> dict[str, str]:
    """What goes from one device to another: latents that edges read to predict, send or learn, and messages."""
    wiring, size = plan.wiring, plan.wiring.crossing
    if not size.any():
        return {}
    total = 0
    for position in np.flatnonzero(size).tolist():
        sends, learns = bool((phase.message & hearing)[position]), bool(phase.learn[wiring.target[position]])
        chain = edge_chain(wiring.edges[position])
        first = next(iter(chain or ()), None)
        # What an identity contributes is nowhere but at its source, from where each prediction brings it anew.
        read = phase.predict[wiring.target[position]] if chain == [] else phase.refresh[position]
        reads = first is not None and sends and first.kernel.reads == "input"
        learns = first is not None and learns and any(p.requires_grad for p in first.module.parameters())
        total += int(size[position]) * (int(read) + sends + reads + learns)
    return {"cross": f"{total:,} bytes a sample"}


def _left_out(plan: Plan) -> str:
    return f"left out: {plan.left_out():.1%} of the predictions and messages of {len(plan.sequence)} full steps"


def _kernels(plan: Plan) -> list[str]:
    """What goes through autograd, since a module or a way to combine has no kernel; nothing where all have one."""
    edges = [(edge.name, edge.module) for edge in plan.wiring.edges if edge_chain(edge) is None]
    nodes = [node for node in plan.wiring.nodes if node.incoming and transfer_chain(node) is None]
    lines = []
    for kind, parts in (("edges", edges), ("nodes", [(node.name, _whole(node)) for node in nodes])):
        if parts:
            most = [f"{name} ({type(module).__name__})" for name, module in parts[:6]]
            more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
            lines.append(f"* through autograd, without a kernel: {kind} {', '.join(most)}{more}")
    return lines


def _whole(node: Node) -> nn.Module:
    """What of a node goes through autograd: how it combines, or its transfer."""
    return node.combine if type(node.combine) is not Sum else node.transfer


def shown(mask: Mask, names: list[str], most: int = 6) -> str:
    """The names of a mask's members, the first of them where there are many."""
    chosen = [names[position] for position in np.flatnonzero(mask)]
    if len(chosen) == len(names) > most:
        return f"all {len(names)}"
    more = f" and {len(chosen) - most} more" if len(chosen) > most else ""
    return (", ".join(chosen[:most]) + more) or "-"

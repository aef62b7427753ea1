"""A plan as a person can read it: as text, and as a table for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pcsim import tables
from pcsim.engine.stacks import stack_nodes

if TYPE_CHECKING:
    from pcsim.engine.plan import Mask, Plan


def describe(plan: Plan) -> str:
    """A plan as text: who moves at each step, what is computed for it, and what was left out."""
    lines = _stacks(plan)
    for label, parts in _phases(plan):
        lines += [f"{label}:", *(f"  {part:<9}{members}" for part, members in parts.items())]
    return "\n".join([*lines, _left_out(plan)])


def html(plan: Plan) -> str:
    """The same as a table with a row for each step, or each run of steps that compute the same."""
    phases = _phases(plan)
    headings = list(dict.fromkeys(part for _, parts in phases for part in parts))
    rows = [[label, *(parts.get(part, "") for part in headings)] for label, parts in phases]
    return tables.html(["", *headings], rows, caption=_left_out(plan))


def _stacks(plan: Plan) -> list[str]:
    names = [node.name for node in plan.wiring.nodes]
    lines = []
    for stack in stack_nodes(plan, stacking=True):
        kind = "given" if stack.given else "deterministic" if stack.deterministic else "latent"
        shape = "x".join(map(str, stack.nodes[0].shape)) or "1"
        members = np.zeros(len(names), bool)
        members[stack.positions] = True
        into = int(members[plan.wiring.target].sum())
        lines.append(f"stack of {len(stack.nodes)} {kind} {shape}, {into} edges into it: {_shown(members, names)}")
    return lines


def _phases(plan: Plan) -> list[tuple[str, dict[str, str]]]:
    """Each run of equal steps, and what is learned after them, by what is done: the nodes or edges."""
    wiring = plan.wiring
    names = [node.name for node in wiring.nodes]
    edges = [edge.name for edge in wiring.edges]
    phases, first = [], 0
    for last, position in enumerate(plan.sequence):
        if last + 1 < len(plan.sequence) and plan.sequence[last + 1] == position:
            continue
        phase = plan.phases[position]
        parts = {
            "predict": _shown(phase.refresh, edges),
            "push": _shown(phase.push, names),
            "message": _shown(phase.message, edges),
            "move": _shown(phase.move, names),
        }
        if plan.teaching:
            parts["learn"] = _shown(phase.teach[wiring.target], edges)
        phases.append((f"step {first}" if first == last else f"steps {first} to {last}", parts))
        first = last + 1
    if not plan.teaching:
        learning = plan.learning()
        learned = _shown(learning.teach[wiring.target], edges)
        phases.append(("learn", {"predict": _shown(learning.refresh, edges), "weights": learned}))
    return phases


def _left_out(plan: Plan) -> str:
    return f"left out: {plan.left_out():.1%} of the predictions and messages of {len(plan.sequence)} full steps"


def _shown(mask: Mask, names: list[str], most: int = 6) -> str:
    chosen = [names[position] for position in np.flatnonzero(mask)]
    if len(chosen) == len(names) > most:
        return f"all {len(names)}"
    more = f" and {len(chosen) - most} more" if len(chosen) > most else ""
    return (", ".join(chosen[:most]) + more) or "-"

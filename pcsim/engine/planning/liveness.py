"""The liveness analysis of the unrolled relaxation: what is exactly zero or unchanged at a step (SPEC §7).

An error is *live* once its node, or a node that its prediction reads, has moved since the feed-forward start, or its
node is clamped; from the start on a cycle, which does not start feed-forward, and with an energy that is not at rest
where value = prediction. A node is *active* where its error is live and its precision is not zero. Only what is active
needs its prediction fresh, sends messages and moves by its own error.

Every function here is pure: from what holds before a step, and a step, to what is computed at it and what holds after.
"""

from __future__ import annotations

import attrs
import numpy as np

from pcsim.engine.planning.wiring import Factors, Mask, Wiring
from pcsim.engine.problem import Task


@attrs.frozen(eq=False)
class Phase:
    """What is computed together, from one state: at an inference step, or for learning after the last.

    Args:
        refresh: edges whose contribution is evaluated again.
        predict: nodes whose prediction follows from contributions again.
        active: nodes whose error counts.
        relay: passing nodes that hand errors on.
        message: edges that feed back.
        learn: nodes whose incoming edges (and own parameters) learn.
        move: nodes that move.
        moved: nodes that have moved before.
        form: nodes whose value is read, and has moved since it was last put together from what they received, or from
            their prediction and their error.
        schedule: the precision schedule's value at each node; 0 where it is not active.
    """

    refresh: Mask
    predict: Mask
    active: Mask
    relay: Mask
    message: Mask
    learn: Mask
    move: Mask
    moved: Mask
    form: Mask
    schedule: Factors

    def key(self) -> bytes:
        """Equal for phases that compute the same."""
        masks = [mask for mask in attrs.astuple(self, recurse=False) if mask.dtype == bool]
        return b"".join(np.packbits(mask).tobytes() for mask in masks) + self.schedule.tobytes()


@attrs.frozen(eq=False)
class Liveness:
    """What holds between two steps.

    Args:
        live: nodes whose error may differ from zero.
        moved: nodes that have moved since the start.
        formed: nodes that have moved and whose value has been put together since.
        stale: edges whose source or weights have changed since their contribution was evaluated.
        stale_node: nodes whose transfer's weights have changed since their prediction was.
        refreshed: edges that have been evaluated again since the start.
        predicted: nodes whose prediction has been.
    """

    live: Mask
    moved: Mask
    formed: Mask
    stale: Mask
    stale_node: Mask
    refreshed: Mask
    predicted: Mask


def at_start(wiring: Wiring) -> Liveness:
    """What holds after the feed-forward start."""
    nodes, edges = np.zeros(len(wiring.nodes), bool), np.zeros(len(wiring.edges), bool)
    return Liveness(wiring.live_at_start, nodes, nodes, edges, nodes, edges, nodes)


def refresh(wiring: Wiring, before: Liveness, read: Mask, *, leave_out: bool = True) -> tuple[Mask, Mask, Liveness]:
    """Edges and nodes to evaluate again so that the predictions of ``read`` are fresh, and what holds once they are."""
    if wiring.held:
        return np.zeros(len(wiring.edges), bool), np.zeros(len(wiring.nodes), bool), before
    upstream, stale, everything = wiring.upstream(read), before.stale, not leave_out
    edges, nodes = np.zeros(len(wiring.edges), bool), np.zeros(len(wiring.nodes), bool)
    for generation, into in wiring.generations:
        again = into & upstream[wiring.target] & (stale | everything)
        edges |= again
        nodes[generation] = (wiring.any_of(again, wiring.target) | (before.stale_node & upstream))[generation]
        stale = stale | (wiring.between & nodes[wiring.source])
    again = (read & ~wiring.passing)[wiring.target] & (stale | everything)
    edges |= again
    nodes |= wiring.any_of(again, wiring.target) | (before.stale_node & read)
    after = attrs.evolve(
        before,
        stale=stale & ~edges,
        stale_node=before.stale_node & ~nodes,
        refreshed=before.refreshed | edges,
        predicted=before.predicted | nodes,
    )
    return edges, nodes, after


def take_step(
    task: Task, wiring: Wiring, before: Liveness, step: int, *, leave_out: bool = True
) -> tuple[Phase, Liveness]:
    """What is computed at a step, and what holds after it."""
    weighing = wiring.energetic & (wiring.own_precision != 0)
    schedule = _schedule(task, wiring, step, before.live & weighing if leave_out else wiring.energetic)
    live = before.live & weighing & (wiring.energy_weight != 0) & (schedule != 0)
    live |= before.live & wiring.multiplied  # whatever its precision, a multiplier counts
    active = live if leave_out else wiring.energetic
    learns = task.learns_each_step or task.rule.at_arrival
    teaching = _arriving(wiring, before, step) if task.rule.at_arrival else np.zeros_like(live)
    read = active | teaching | wiring.probed | (before.live if task.watched else teaching)
    edges, nodes, fresh = refresh(wiring, before, read, leave_out=leave_out)
    hears = wiring.hears | wiring.learns if learns else wiring.hears
    relay = wiring.upstream(active) & hears
    message = (active | relay)[wiring.target] & (wiring.hears | relay)[wiring.source]
    move = _moving(task, wiring, fresh, live)
    learn = wiring.with_upstream(live if task.learns_each_step else teaching)
    form = forming(wiring, before, edges, learn) | following(wiring, before, nodes, read)
    moving = move if leave_out else wiring.free
    phase = Phase(edges, nodes, active, relay, message, learn, moving, before.moved, form, schedule * active)
    changed = move | wiring.changing(step)
    return phase, _after(task, wiring, attrs.evolve(fresh, formed=before.formed | form), changed, learn)


def _arriving(wiring: Wiring, before: Liveness, step: int) -> Mask:
    """Nodes at which the error arrives at a step, and teaches (SPEC §4, arrival)."""
    arriving: Mask = before.live & wiring.energetic & (wiring.energy_weight != 0) & (wiring.level == step)
    return arriving


def forming(wiring: Wiring, before: Liveness, edges: Mask, learn: Mask) -> Mask:
    """Nodes whose value has to be put together: edges that are evaluated, or learn, read it."""
    read = wiring.any_of(edges | learn[wiring.target], wiring.source) & ~wiring.following
    unformed: Mask = read & before.moved & ~before.formed
    return unformed


def following(wiring: Wiring, before: Liveness, nodes: Mask, read: Mask) -> Mask:
    """Nodes whose values follow from errors, and have to, where what reads them is ``read`` and ``nodes`` are anew."""
    apart: Mask = wiring.following & (nodes | (before.moved & ~before.formed)) & wiring.upstream(read)
    return apart


def closing(wiring: Wiring, before: Liveness) -> Mask:
    """Nodes whose predictions are brought up to date after the last step, where any are."""
    closed: Mask = before.live | wiring.following
    return closed


def learning(wiring: Wiring, task: Task, before: Liveness) -> Phase:
    """What the learning rule computes after the relaxation."""
    if task.closes:
        *_, before = refresh(wiring, before, closing(wiring, before))
    if task.rule.at_arrival:  # what errors teach that were sent already; the plan says which
        edges, nodes = np.zeros(len(wiring.edges), bool), np.zeros(len(wiring.nodes), bool)
        return Phase(edges, nodes, nodes, nodes, edges, nodes, nodes, before.moved, nodes, np.zeros(len(nodes)))
    live = wiring.live_at_start | before.moved if task.learns_forward else before.live
    active = live & wiring.energetic & (wiring.energy_weight != 0)
    upstream = wiring.upstream(active, wiring.deterministic)
    relay = upstream & wiring.learns
    if task.learns_forward:
        edges = before.refreshed & (active | upstream)[wiring.target]
        nodes = wiring.any_of(edges, wiring.target)
    else:
        edges, nodes, _ = refresh(wiring, before, active)
    message = (active | relay)[wiring.target] & relay[wiring.source]
    nowhere, learn = np.zeros_like(active), active | relay
    form = nowhere if task.learns_forward else forming(wiring, before, edges, learn)
    ones = np.ones(len(active)) * active
    return Phase(edges, nodes, active, relay, message, learn, nowhere, before.moved, form, ones)


def _schedule(task: Task, wiring: Wiring, step: int, nodes: Mask) -> Factors:
    """The schedule's value at each of these nodes, 0 elsewhere; asked for once a level."""
    relaxation, values = task.relaxation, np.zeros(len(nodes))
    levels = wiring.level[nodes]
    at_level = np.zeros(wiring.deepest + 2)
    for level in np.flatnonzero(np.bincount(levels + 1)).tolist():
        at_level[level] = relaxation.precision.at(step, level - 1 if level else None, relaxation.steps)
    values[nodes] = at_level[levels + 1]
    return values


def _moving(task: Task, wiring: Wiring, before: Liveness, active: Mask) -> Mask:
    """Free nodes that these errors move: the nodes themselves, what their predictions read, and what has momentum."""
    touched = active.copy()
    touched[wiring.source[(active | wiring.upstream(active))[wiring.target]]] = True
    if not task.relaxation.plain:
        touched |= before.moved | (wiring.free & (task.relaxation.temperature > 0))
    moving: Mask = touched & wiring.free
    return moving


def _after(task: Task, wiring: Wiring, before: Liveness, move: Mask, learn: Mask) -> Liveness:
    changed, changed_nodes = move[wiring.source] & (not wiring.held), np.zeros_like(move)
    if task.learns_each_step:
        learned = wiring.learned(learn)
        changed = changed.copy()
        changed[wiring.edge_user[learned[wiring.edge_used]]] = True
        changed_nodes[wiring.transfer_user[learned[wiring.transfer_used]]] = True
        if learned.any():
            changed |= wiring.own_edge
            changed_nodes |= wiring.own_node
    return attrs.evolve(
        before,
        live=before.live | wiring.downstream(changed, changed_nodes) | (move & wiring.energetic),
        moved=before.moved | move,
        formed=before.formed & ~move,
        stale=before.stale | changed,
        stale_node=before.stale_node | changed_nodes,
    )

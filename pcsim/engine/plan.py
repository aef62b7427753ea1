"""The plan: what must be computed at which step, and what is exactly zero and so is left out (SPEC §7).

It is a liveness analysis of the unrolled relaxation: a pure function of the graph, its clamps and the rules, made
before any tensor exists. Sets of nodes and edges are boolean arrays over their positions in the network.

An error is live once its node, or a node that its prediction reads, has moved since the feed-forward start, or its
node is clamped; from the start on a cycle, which does not start feed-forward, and with an energy that is not at
rest where value = prediction. A node *pushes* where its error is live and its precision is not zero. Only what
pushes needs its prediction fresh, sends messages and pulls on itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt
from torch import nn

from pcsim.dynamics.learning import LearningRule
from pcsim.engine.engine import Problem
from pcsim.engine.plan_table import describe, html
from pcsim.graph.energy import Gaussian

Mask: TypeAlias = npt.NDArray[np.bool_]
Positions: TypeAlias = npt.NDArray[np.intp]


class Wiring:
    """A problem's graph as arrays: ends of edges, kinds of nodes, and who uses which parameter."""

    def __init__(self, problem: Problem) -> None:
        clamping, network = problem.clamping, problem.network
        self.snapshot = problem.snapshot
        self.nodes = list(network.nodes.values())
        self.edges = list(network.edges.values())
        place = {node.name: position for position, node in enumerate(self.nodes)}
        self.source = np.array([place[edge.source_name] for edge in self.edges], np.intp)
        self.target = np.array([place[edge.target_name] for edge in self.edges], np.intp)
        self.free = self._mask(clamping.free, place)
        self.energetic = self._mask(clamping.energetic, place)
        self.deterministic = self._mask(clamping.deterministic, place)
        self.weighted = np.array([node.weight != 0 for node in self.nodes], bool)
        plain = [type(n.energy_function) is Gaussian and isinstance(n.base_precision, float) for n in self.nodes]
        self.simple = np.array(plain, bool) & ~self._mask(clamping.partial, place)
        """Nodes with a Gaussian energy and a number for a precision, all of whose units are free, or all given."""
        self.level = np.array([clamping.levels.get(node.name, -1) for node in self.nodes], np.intp)
        """Level of each node, −1 where it reaches no target."""
        self.deepest = int(self.level.max(initial=0))
        restless = np.array([not node.energy_function.rests_at_prediction for node in self.nodes], bool)
        given = self._mask(clamping.full, place) | self._mask(clamping.partial, place)
        self.started = self.energetic & (given | self._mask(clamping.cyclic, place) | restless)
        self.generations = self._generations([place[name] for name in clamping.deterministic_order])
        self.generation = np.full(len(self.nodes), len(self.generations), np.intp)
        """Place in ``generations`` of each deterministic node; all others come after the last."""
        for number, (members, _) in enumerate(self.generations):
            self.generation[members] = number
        self.between = self.deterministic[self.source]
        """Edges out of deterministic nodes."""
        self.wanting = self.free.copy()
        """Nodes to which messages matter: free, or deterministic and read, somewhere below, from a free one."""
        for generation, into in self.generations:
            self.wanting[generation] |= self.any_of(into & self.wanting[self.source], self.target)[generation]
        parameters = {parameter: position for position, parameter in enumerate(problem.snapshot.parameters)}
        self.parameters = list(parameters)
        self.edge_parameters = [list(edge.module.parameters()) for edge in self.edges]
        # A deterministic node has no error, and so nothing to learn a precision from.
        self.node_parameters = [
            [p for p in node.parameters() if not (inner and p is node.log_precision)]
            for node, inner in zip(self.nodes, self.deterministic, strict=True)
        ]
        self.users = Counter(p for part in (*self.edge_parameters, *self.node_parameters) for p in part)
        """How many edges and nodes use each parameter."""
        self.edge_user, self.edge_used = _uses(parameters, self.edge_parameters)
        self.node_user, self.node_used = _uses(parameters, self.node_parameters)
        self.teaching = self.any_of(np.isin(np.arange(len(self.edges)), self.edge_user), self.target)
        """Nodes whose errors teach some parameter: of an edge into them, or of their own; and what passes them on."""
        self.teaching[self.node_user] = True
        for generation, into in self.generations:
            passed = self.any_of(into & self.between & self.teaching[self.source], self.target)
            self.teaching[generation] |= passed[generation]

    @staticmethod
    def _mask(names: Iterable[str], place: dict[str, int]) -> Mask:
        mask = np.zeros(len(place), bool)
        mask[[place[name] for name in names]] = True
        return mask

    def _generations(self, order: list[int]) -> list[tuple[Positions, Mask]]:
        """Deterministic nodes by how many deterministic ones lie before them, with the edges into each generation."""
        depth = dict.fromkeys(order, 0)
        incoming: dict[int, list[int]] = {position: [] for position in order}
        for source, target in zip(self.source.tolist(), self.target.tolist(), strict=True):
            if target in incoming:
                incoming[target].append(source)
        for position in order:
            depth[position] = max((depth[before] + 1 for before in incoming[position] if before in depth), default=0)
        generations = []
        for level in range(max(depth.values(), default=-1) + 1):
            members = np.array([position for position in order if depth[position] == level], np.intp)
            generations.append((members, np.isin(self.target, members)))
        return generations

    def any_of(self, edges: Mask, ends: Positions) -> Mask:
        """Nodes at these ends of these edges."""
        mask = np.zeros(len(self.nodes), bool)
        mask[ends[edges]] = True
        return mask

    def upstream(self, nodes: Mask) -> Mask:
        """Deterministic nodes that the predictions of ``nodes`` read."""
        if not self.generations:
            return np.zeros_like(nodes)
        reached = nodes.copy()
        for generation, _ in reversed(self.generations):
            reached[generation] |= self.any_of(self.between & reached[self.target], self.source)[generation]
        found: Mask = reached & self.deterministic
        return found

    def downstream(self, edges: Mask, nodes: Mask) -> Mask:
        """Nodes with an energy whose predictions change with these edges' contributions or nodes' transfers."""
        changed = nodes | self.any_of(edges, self.target)
        for generation, into in self.generations:
            changed[generation] |= self.any_of(into & self.between & changed[self.source], self.target)[generation]
        if self.generations:
            changed |= self.any_of(self.between & changed[self.source], self.target)
        return changed & self.energetic


@attrs.frozen(eq=False)
class Phase:
    """What is computed together, from one state: at an inference step, or for learning after the last.

    Args:
        refresh: edges whose contribution is evaluated again.
        predict: nodes whose prediction follows from contributions again.
        push: nodes whose error counts.
        receive: deterministic nodes that pass errors on.
        message: edges that feed back.
        teach: nodes whose incoming edges (and own parameters) learn.
        move: nodes that move.
        schedule: the precision schedule's value at each node; 0 where it does not push.
    """

    refresh: Mask
    predict: Mask
    push: Mask
    receive: Mask
    message: Mask
    teach: Mask
    move: Mask
    schedule: npt.NDArray[np.float64]

    def key(self) -> bytes:
        """Equal for phases that compute the same."""
        masks = (self.refresh, self.predict, self.push, self.receive, self.message, self.teach, self.move)
        return b"".join(np.packbits(mask).tobytes() for mask in masks) + self.schedule.tobytes()


class Plan:
    """The phases of a relaxation, and of what is learned after it.

    Args:
        problem: what is to be run; only its graph, clamped names and rules are used.
        teaching: learn after every inference step (incremental predictive coding).
        leave_out: leave out what is exactly zero; for debugging, False computes everything at every step.
    """

    def __init__(self, problem: Problem, *, teaching: bool = False, leave_out: bool = True) -> None:
        self.problem = problem
        self.teaching = teaching
        self.leave_out = leave_out
        self.wiring = wiring = Wiring(problem)
        self.phases: list[Phase] = []
        """Each different step once."""
        self.sequence: list[int] = []
        """Position in ``phases`` of each inference step."""
        self._live = wiring.started.copy()
        self._moved = np.zeros(len(wiring.nodes), bool)
        self._stale = np.zeros(len(wiring.edges), bool)
        self._stale_node = np.zeros(len(wiring.nodes), bool)
        self._ever_refreshed = np.zeros(len(wiring.edges), bool)
        self.ever_predicted = np.zeros(len(wiring.nodes), bool)
        """Nodes whose prediction is evaluated again after the start."""
        self._pushable = wiring.energetic & np.array(
            [not _is_zero(node.given_precision) or node.log_precision is not None for node in wiring.nodes], bool
        )
        self._marks: list[tuple[Mask, Mask, Mask, Mask, Mask]] = []
        known: dict[bytes, int] = {}
        self._mark()
        for step in range(problem.relaxation.steps):
            phase = self._step(step)
            position = known.setdefault(phase.key(), len(self.phases))
            if position == len(self.phases):
                self.phases.append(phase)
            self.sequence.append(position)
            self._mark()

    def _mark(self) -> None:
        """Keep what learning after this step would start from."""
        marks = (self._live, self._moved, self._stale, self._ever_refreshed, self._stale_node)
        if self.problem.relaxation.tolerance is None and len(self._marks):
            self._marks.pop()
        self._marks.append(tuple(mark.copy() for mark in marks))

    def _schedule(self, step: int, live: Mask) -> npt.NDArray[np.float64]:
        relaxation, values = self.problem.relaxation, np.zeros(len(live))
        levels = self.wiring.level[live]
        at_level = np.zeros(self.wiring.deepest + 2)
        for level in np.flatnonzero(np.bincount(levels + 1)).tolist():
            at_level[level] = relaxation.precision.at(step, level - 1 if level else None, relaxation.steps)
        values[live] = at_level[levels + 1]
        return values

    def _step(self, step: int) -> Phase:
        wiring = self.wiring
        schedule = self._schedule(step, wiring.energetic if not self.leave_out else self._live & self._pushable)
        live = self._live & self._pushable & wiring.weighted & (schedule != 0)
        push = live if self.leave_out else wiring.energetic
        refresh, predict = self._refresh(self._live | push if self.problem.record else push)
        upstream = wiring.upstream(push)
        receive = upstream & (wiring.wanting | wiring.teaching if self.teaching else wiring.wanting)
        message = (push | receive)[wiring.target] & (wiring.wanting | receive)[wiring.source]
        move = self._moving(live)
        teach = live | wiring.upstream(live) if self.teaching else np.zeros_like(live)
        self._advance(move, teach)
        schedule = schedule * push
        return Phase(refresh, predict, push, receive, message, teach, move if self.leave_out else wiring.free, schedule)

    def _moving(self, push: Mask) -> Mask:
        """Free nodes that these nodes' errors move: themselves, what their predictions read, and what has momentum."""
        wiring = self.wiring
        touched = push.copy()
        touched[wiring.source[(push | wiring.upstream(push))[wiring.target]]] = True
        if not self.problem.relaxation.plain:
            touched |= self._moved
        moving: Mask = touched & wiring.free
        return moving

    def _refresh(self, read: Mask) -> tuple[Mask, Mask]:
        """Edges and nodes to evaluate again so that these nodes' predictions are fresh."""
        wiring = self.wiring
        upstream = wiring.upstream(read)
        refresh = np.zeros(len(wiring.edges), bool)
        predict = np.zeros(len(wiring.nodes), bool)
        everything = not self.leave_out
        for generation, into in wiring.generations:
            stale = into & upstream[wiring.target] & (self._stale | everything)
            refresh |= stale
            again = wiring.any_of(stale, wiring.target) | (self._stale_node & upstream)
            predict[generation] = again[generation]
            self._stale |= wiring.between & predict[wiring.source]
        stale = (read & ~wiring.deterministic)[wiring.target] & (self._stale | everything)
        refresh |= stale
        predict |= wiring.any_of(stale, wiring.target) | (self._stale_node & read)
        self._stale &= ~refresh
        self._stale_node &= ~predict
        self._ever_refreshed |= refresh
        self.ever_predicted |= predict
        return refresh, predict

    def _advance(self, move: Mask, teach: Mask) -> None:
        wiring = self.wiring
        self._moved |= move
        changed = move[wiring.source]
        changed_nodes = np.zeros_like(move)
        if self.teaching:
            learned = self.learned(teach)
            changed[wiring.edge_user[learned[wiring.edge_used]]] = True
            changed_nodes[wiring.node_user[learned[wiring.node_used]]] = True
            self._stale_node |= changed_nodes
        self._stale |= changed
        self._live |= wiring.downstream(changed, changed_nodes) | (move & wiring.energetic)

    def learned(self, teach: Mask) -> Mask:
        """Positions of the parameters that these nodes teach."""
        wiring = self.wiring
        learned = np.zeros(len(wiring.parameters), bool)
        learned[wiring.edge_used[teach[wiring.target[wiring.edge_user]]]] = True
        learned[wiring.node_used[teach[wiring.node_user]]] = True
        return learned

    def _return_to(self, steps: int | None) -> None:
        """Go back to what holds after ``steps`` steps (all by default)."""
        self._live, self._moved, self._stale, self._ever_refreshed, self._stale_node = (
            mark.copy() for mark in self._marks[-1 if steps is None or len(self._marks) == 1 else steps]
        )

    def closing(self, steps: int | None = None) -> tuple[Mask, Mask]:
        """Edges and nodes to evaluate again after ``steps`` steps so that every prediction can be recorded."""
        self._return_to(steps)
        return self._refresh(self._live)

    def learning(self, steps: int | None = None) -> Phase:
        """What the learning rule computes after ``steps`` steps (all by default)."""
        wiring, rule = self.wiring, self.problem.rule
        self._return_to(steps)
        if self.problem.record:
            self._refresh(self._live)
        live = wiring.started | self._moved if rule.at_forward else self._live
        push = live & wiring.energetic & wiring.weighted
        upstream = wiring.upstream(push)
        receive = upstream & wiring.teaching
        if rule.at_forward:
            refresh = self._ever_refreshed & (push | upstream)[wiring.target]
            predict = wiring.any_of(refresh, wiring.target)
        else:
            refresh, predict = self._refresh(push)
        message = (push | receive)[wiring.target] & receive[wiring.source]
        nowhere = np.zeros_like(push)
        return Phase(refresh, predict, push, receive, message, push | receive, nowhere, np.ones(len(push)) * push)

    @cached_property
    def single_pushes(self) -> tuple[Mask, npt.NDArray[np.float64]]:
        """Nodes that push once, at their forward prediction, and receive nothing from then on; and π w at that push.

        With plain gradient descent such a node moves by what it has received, and then by its own push.
        """
        wiring, relaxation, count = self.wiring, self.problem.relaxation, len(self.wiring.nodes)
        weights, scale = np.array([node.weight for node in wiring.nodes]), np.zeros(count)
        if not relaxation.plain or relaxation.tolerance is not None or self.problem.record or not self.leave_out:
            return np.zeros(count, bool), scale
        pushes, pushed, received = np.zeros(count, np.intp), np.zeros(count, np.intp), np.full(count, -1)
        for step, position in enumerate(self.sequence):
            phase = self.phases[position]
            pushes[phase.push] += 1
            pushed[phase.push] = step
            scale[phase.push] = phase.schedule[phase.push]
            received[wiring.source[phase.message]] = step
        once = (pushes == 1) & (received < pushed) & ~self.ever_predicted & wiring.simple
        own = [float(n.given_precision) if single else 0.0 for n, single in zip(wiring.nodes, once, strict=True)]
        return once, scale * weights * own

    def pulling_last(self) -> Mask:
        """Free nodes whose own push may move them after the last step, all together: nothing reads them sooner."""
        once, _ = self.single_pushes
        return once & self.wiring.free & ~self.wiring.any_of(self._ever_refreshed, self.wiring.source)

    def lasting_errors(self) -> npt.NDArray[np.float64]:
        """By what the error that a node pushed is to be multiplied to give the one it learns from; NaN if unknown.

        With the forward rule, a node that pushes once learns from (1 − rate · π w) of that error, or from all of it at
        a clamped target. So what the push has pulled back through the node's transfer serves again.
        """
        wiring, rule = self.wiring, self.problem.rule
        factors = np.full(len(wiring.nodes), np.nan)
        if not rule.at_forward or type(rule).delta is not LearningRule.delta:
            return factors
        once, push = self.single_pushes
        # Deterministic nodes that learn gather several errors, each with a factor of its own.
        known = once & ~wiring.any_of(wiring.between & wiring.teaching[wiring.source], wiring.target)
        weights = np.array([node.weight for node in wiring.nodes])[known]
        rest = np.where(wiring.free[known], 1 - self.problem.relaxation.rate * push[known], 1.0)
        factors[known] = weights * rest / push[known]
        return factors

    def left_out(self) -> float:
        """Share of the full work, predictions and messages of every edge at every step, that the plan leaves out."""
        steps, wiring = len(self.sequence), self.wiring
        full = steps * (len(wiring.edges) + int(wiring.wanting[wiring.source].sum()))
        done = sum(int(p.refresh.sum() + p.message.sum()) for p in (self.phases[i] for i in self.sequence))
        return 1 - done / full if full else 0.0

    def __str__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        return html(self)


def _is_zero(precision: object) -> bool:
    return isinstance(precision, float) and precision == 0


def _uses(parameters: dict[nn.Parameter, int], parts: list[list[nn.Parameter]]) -> tuple[Positions, Positions]:
    """Pairs of a part's position and a trainable parameter's that it uses."""
    pairs = [
        (position, parameters[parameter])
        for position, part in enumerate(parts)
        for parameter in part
        if parameter.requires_grad
    ]
    users, used = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(users, np.intp), np.array(used, np.intp)

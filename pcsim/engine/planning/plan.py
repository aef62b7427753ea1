"""The plan: a task's steps as phases, each different one once, and what may be shared between them."""

from __future__ import annotations

from functools import cached_property

import attrs
import numpy as np

from pcsim.engine.planning import liveness
from pcsim.engine.planning.liveness import Phase
from pcsim.engine.planning.text import describe, html
from pcsim.engine.planning.wiring import Factors, Mask, Positions, Wiring
from pcsim.engine.problem import Task


@attrs.frozen(eq=False)
class _Sending:
    """When errors are sent and heard.

    Args:
        once: nodes that are active at one step only.
        last: the last step at which each is active.
        heard: the last step at which a message comes to it; −1 where none does.
        precision: π at that last step, the schedule in it.
    """

    once: Mask
    last: Positions
    heard: Positions
    precision: Factors

    @property
    def over(self) -> Mask:
        """Nodes that hear nothing from the step on at which they are active."""
        over: Mask = self.heard < self.last
        return over


class Plan:
    """The phases of a relaxation, and of what is learned after it: a pure function of the task, and printable.

    Args:
        task: what is to be run.
        leave_out: leave out what is exactly zero (2.8 to 17.6 times as fast); False computes everything at every step.
        lasting_errors: let the forward rule learn from errors that were sent already (up to 1.2 times as fast, with
            convolutions); False computes them again.
    """

    def __init__(self, task: Task, *, leave_out: bool = True, lasting_errors: bool = True) -> None:
        self.task = task
        self.leave_out = leave_out
        self.wiring = Wiring(task)
        self.phases: list[Phase] = []
        """Each different step once."""
        self.sequence: list[int] = []
        """Position in ``phases`` of each inference step."""
        now = liveness.at_start(self.wiring)
        self._between = [now]
        known: dict[bytes, int] = {}
        for step in range(task.relaxation.steps):
            phase, now = liveness.take_step(task, self.wiring, now, step, leave_out=leave_out)
            position = known.setdefault(phase.key(), len(self.phases))
            if position == len(self.phases):
                self.phases.append(phase)
            self.sequence.append(position)
            # Only a relaxation that may stop early is ever asked what holds before its end.
            self._between = [*self._between, now] if task.relaxation.tolerance is not None else [now]
        self._shares_errors = lasting_errors
        self._leave_late_learning()

    def _leave_late_learning(self) -> None:
        """What an error that lasts will teach after the relaxation need not be learned during it."""
        if self.task.rule.at_arrival:
            now = self.wiring.energetic & np.isnan(self.lasting_errors)
            self.phases = [attrs.evolve(p, learn=self.wiring.with_upstream(p.learn & now)) for p in self.phases]

    def _after(self, steps: int | None) -> liveness.Liveness:
        """What holds after so many steps, all by default."""
        return self._between[-1 if steps is None or len(self._between) == 1 else steps]

    def closing(self, steps: int | None = None) -> tuple[Mask, Mask]:
        """Edges and nodes to evaluate again after ``steps`` steps so that every prediction can be recorded."""
        now = self._after(steps)
        edges, nodes, _ = liveness.refresh(self.wiring, now, liveness.closing(self.wiring, now))
        return edges, nodes

    def learning(self, steps: int | None = None) -> Phase:
        """What the learning rule computes after ``steps`` steps (all by default)."""
        phase = liveness.learning(self.wiring, self.task, self._after(steps))
        return attrs.evolve(phase, learn=~np.isnan(self.lasting_errors)) if self.task.rule.at_arrival else phase

    def moved(self, steps: int | None = None) -> Mask:
        """Nodes that have moved within so many steps (all by default)."""
        return self._after(steps).moved

    def unformed(self, steps: int | None = None) -> Mask:
        """Nodes whose value has to be put together from what they have received within so many steps."""
        now = self._after(steps)
        follows = liveness.following(self.wiring, now, self.closing(steps)[1], self.wiring.following)
        unformed: Mask = (now.moved & ~now.formed & ~self.wiring.following) | follows
        return unformed

    @cached_property
    def received(self) -> Mask:
        """Nodes whose error is what they have received, kept apart from the value: predicted once, at the start."""
        if not self.leave_out or not self.task.rule.usual or self.task.relaxation.multipliers:
            return np.zeros(len(self.wiring.nodes), bool)
        return self.wiring.displaced & ~self._after(None).predicted

    @cached_property
    def rewritten(self) -> Mask:
        """Nodes whose prediction is evaluated again after the start: during the relaxation, to learn, or to count."""
        if self.task.relaxation.tolerance is not None:
            return np.full(len(self.wiring.nodes), not self.wiring.held)
        counts = self.task.fingerprint.counts and not self.task.reads_forward
        closing = self.closing()[1] if self.task.closes or counts else np.zeros(len(self.wiring.nodes), bool)
        return self._after(None).predicted | self.learning().predict | closing

    @cached_property
    def lasting_errors(self) -> Factors:
        """By what the error that a node sent is to be multiplied to give the one it learns from; NaN if unknown.

        With plain gradient descent, a node that is active once, at its forward prediction, keeps what it has pulled
        back through its transfer, and so need not do it again:

        - with the forward rule, where it hears nothing from then on, it learns from (1 − rate · π w) of the error that
          it sent, or from all of it at a clamped target;
        - with the arrival rule, where it was active when the error arrived, from all of it.
        """
        wiring, task, count = self.wiring, self.task, len(self.wiring.nodes)
        relaxation, rule = task.relaxation, task.rule
        factors = np.full(count, np.nan)
        plain = relaxation.plain and relaxation.tolerance is None and not task.closes
        if not (plain and self.leave_out and self._shares_errors and task.reads_forward) or not rule.usual:
            return factors
        sending = self._sending
        once = sending.once & ~self._after(None).predicted & ~np.isnan(wiring.own_precision)
        once &= sending.last == wiring.level if rule.at_arrival else sending.over & wiring.proportional
        once &= ~wiring.streamed  # what was sent was another frame's
        # Deterministic nodes that learn gather several errors, each with a factor of its own.
        known = once & ~wiring.any_of(wiring.between & wiring.learns[wiring.source], wiring.target)
        weight, sent = wiring.energy_weight[known], self.sent(np.flatnonzero(known))
        moves = wiring.free[known] & (not rule.at_arrival)
        factors[known] = weight * np.where(moves, 1 - relaxation.rate * sent, 1.0) / sent
        return factors

    @cached_property
    def finished(self) -> Mask:
        """Nodes that hear nothing any more once they send their one, lasting error.

        Nothing reads their value from then on, since what evaluates an edge also sends a message along it. So what such
        a node moves by its own error, a known multiple of what it has received by then, may wait for the end.
        """
        heard = self._sending.over & (self._sending.heard >= 0)
        return heard & self.received & self.wiring.free & self.wiring.proportional & ~np.isnan(self.lasting_errors)

    def sent(self, nodes: Positions) -> Factors:
        """π w of the errors that nodes send, at the last step at which they do."""
        sent: Factors = self._sending.precision[nodes] * self.wiring.energy_weight[nodes]
        return sent

    @cached_property
    def _sending(self) -> _Sending:
        """Who sends an error when."""
        wiring, count = self.wiring, len(self.wiring.nodes)
        active, scale = np.zeros(count, np.intp), np.zeros(count)
        last, heard = np.zeros(count, np.intp), np.full(count, -1)
        for step, position in enumerate(self.sequence):
            phase = self.phases[position]
            active[phase.active] += 1
            last[phase.active] = step
            scale[phase.active] = phase.schedule[phase.active]
            heard[wiring.source[phase.message]] = step
        return _Sending(active == 1, last, heard, scale * wiring.own_precision)

    def left_out(self) -> float:
        """Share of the full work, predictions and messages of every edge at every step, that the plan leaves out."""
        steps, wiring = len(self.sequence), self.wiring
        full = steps * (len(wiring.edges) + int(wiring.hears[wiring.source].sum()))
        done = sum(int(p.refresh.sum() + p.message.sum()) for p in (self.phases[i] for i in self.sequence))
        return 1 - done / full if full else 0.0

    def __str__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        return html(self)

"""What a plan compiles to: operations, in the order in which a run calls them."""

from __future__ import annotations

from functools import partial

import attrs
import numpy as np
import torch

from pcsim.engine.batched import errors, messages
from pcsim.engine.batched.edges import Activity
from pcsim.engine.batched.gradients import Found, learn
from pcsim.engine.batched.memory import Memory
from pcsim.engine.batched.places import Named, Operation
from pcsim.engine.batched.predict import form, nudge, predict
from pcsim.engine.planning.liveness import Phase
from pcsim.engine.planning.wiring import Factors, Mask, masked


class Stages:
    """What the stages of a run consist of; asked for in turn: the start, each different step, the end.

    Args:
        memory: the program's tensors, of whose plan the phases are.
        found: where gradients go.
        largest: where the largest update of a step goes.
        direct_moves: add messages straight to values where nothing reads them before the step is over; False gathers
            them first.
        message_dtype: of the products in messages; None for that of the values.
    """

    def __init__(
        self,
        memory: Memory,
        found: Found,
        largest: messages.Largest,
        *,
        direct_moves: bool,
        message_dtype: torch.dtype | None,
    ) -> None:
        self._memory, self._found, self._largest, self._message_dtype = memory, found, largest, message_dtype
        self._plan, self._task, self._wiring = memory.plan, memory.task, memory.wiring
        self._direct = direct_moves and self._may_move_directly()
        # Otherwise displacements start at zero, so that they may be read and added to at any time.
        self._writes_first = self._direct and not (self._task.record or self._task.probes)
        nudged = (node for node in memory.nodes if node.group.given and node.node.incoming)
        self.nudged = list(nudged) if self._task.nudged else []
        """Targets that the start nudges."""

    def _may_move_directly(self) -> bool:
        """Whether messages may be added to values at once, while other messages still wait to be computed."""
        relaxation, memory = self._task.relaxation, self._memory
        plain = relaxation.plain and relaxation.tolerance is None and not self._task.learns_each_step
        gaussian = bool(self._wiring.gaussian[self._wiring.free].all())
        # What is kept apart from the value may move while the value is still to be read.
        values = [node for node in memory.nodes if node.free and node.moving == "value"]
        read_late = any(e.source in values and e.chain and e.chain[0].kernel.reads == "input" for e in memory.edges)
        if self._learns_on_the_way:
            weighs = any(node.log_precision is not None for node in self._wiring.nodes)
            read_late = read_late or bool(values) or weighs
        given = any(node.partial and node.group.following for node in memory.nodes)
        return plain and gaussian and not (read_late or given)

    @property
    def _learns_on_the_way(self) -> bool:
        return any(bool(phase.learn.any()) for phase in self._plan.phases)

    def start(self) -> list[Operation]:
        """The forward pass, and what the steps begin with (SPEC §2, Start)."""
        depth = self._wiring.forward_depth
        later = self._wiring.predicted & (depth == 0)
        operations: list[Operation] = []
        memory = self._memory
        for level in range(1, int(depth.max(initial=0)) + 1):
            now = depth == level
            predict(memory, operations, now[self._wiring.target], now, "start")
            for node, _ in memory.node_rows(now):
                if node.partial:
                    copy = partial(node.tensor("value").copy_, node.tensor("prediction"))
                    operations += [Operation("copy", copy, node.names), Operation("clamp", node.clamp, node.names)]
        predict(memory, operations, later[self._wiring.target], later, "start")
        for node in memory.nodes:
            if node.reads_prediction_at_start:
                copy = partial(node.tensor("value").copy_, node.tensor("prediction"))
                operations.append(Operation("copy", copy, node.names))
        operations += [Operation("nudge", partial(nudge, memory, node), node.names) for node in self.nudged]
        for node in memory.nodes:
            if self._wiring.multiplied[node.group.positions].any():
                operations.append(Operation("zero", node.tensor("multiplier").zero_, node.names))
            if node.group.following:
                parts = (node.tensor(name) for name in ("value", "prediction"))
                call = partial(torch.sub, *parts, out=node.tensor("error"))
                operations.append(Operation("error", call, node.names))
            if node.group.received and not self._writes_first:
                operations.append(Operation("zero", node.tensor("displacement").zero_, node.names))
            for kept, original in node.copies:
                operations.append(Operation("keep", partial(kept.copy_, original), node.names))
        if self._direct and not self._task.between_steps:
            self._let_wait(operations)
        return operations

    def _let_wait(self, operations: list[Operation]) -> None:
        """What may wait until all steps are over, and what may be computed of many nodes before they begin."""
        memory = self._memory
        memory.waiting = self._plan.finished
        together = np.zeros_like(memory.waiting)
        for node in memory.nodes:
            alike = memory.waiting[node.group.positions]
            if node.group.by_units and node.chain and alike.sum() > 1:
                together[node.group.positions[alike]] = True
        errors.slope(memory, operations, together)
        memory.sloped = together

    def step(self, phase: Phase) -> tuple[list[Operation], list[Operation]]:
        """What brings predictions up to date, and what follows from them."""
        memory = self._memory
        memory.compile_after(phase.moved, fresh=self._writes_first)
        predictions: list[Operation] = []
        form(memory, predictions, phase.form)
        predict(memory, predictions, phase.refresh, phase.predict, memory.activity, phase.form)
        operations: list[Operation] = []
        factors = self._factors_on_the_way(phase)
        if phase.learn.any() and factors is None:
            self._learn_apart(operations, phase)
        learning = self._learns_from_sent if factors is None else self._learns_from_sent | phase.learn
        heard = self._wiring.any_of(phase.message, self._wiring.target)
        fading = self._fading(phase) & ~(heard | learning)
        apart = attrs.evolve(phase, active=phase.active & ~(self._wiring.following | fading))
        errors.compare(memory, operations, apart, learning=False)
        weights = phase.schedule * self._wiring.own_precision * self._wiring.energy_weight
        errors.fade(memory, operations, fading, weights)
        if not self._direct:
            for node, rows in memory.node_rows(phase.move):
                part = node.part("descent", rows)
                operations.append(Operation("zero", part.cell.read().zero_, node.names))
                part.scatter(operations, node.names)
        messages.own_pull(memory, operations, apart, direct=self._direct)
        errors.pull(memory, operations, apart.active & (heard | learning), learning)
        messages.relay(memory, operations, phase, learning, self._message_dtype, direct=self._direct)
        to_free = phase.message & (self._wiring.free & ~self._wiring.following)[self._wiring.source]
        messages.send(memory, operations, to_free, learning, self._message_dtype, direct=self._direct)
        if factors is not None:
            exact = self._message_dtype is None
            learn(memory, operations, self._found, phase, memory.activity, factors, phase.message, exact=exact)
        self._move(operations, phase)
        return predictions, operations

    def end(self) -> list[Operation]:
        """What follows the last step where nothing happens between two."""
        memory, operations = self._memory, list[Operation]()
        if memory.waiting.any():
            errors.fade(memory, operations, memory.waiting, self._plan.sent(np.arange(len(memory.waiting))))
        return operations

    def _fading(self, phase: Phase) -> Mask:
        """Active nodes whose error is what they have received, and moves them in proportion to itself."""
        active = phase.active & ~self._memory.waiting if self._direct else np.zeros_like(phase.active)
        return active & self._wiring.free & self._wiring.proportional & self._plan.received

    def _factors_on_the_way(self, phase: Phase) -> Factors | None:
        """By what the errors sent at a step are to be multiplied to give those that it teaches; None if unknown."""
        if not phase.learn.any() or (self._task.learns_each_step and not self._task.rule.usual):
            return None
        if self._task.learns_each_step:
            return np.ones(len(phase.active))
        wiring, teaching = self._wiring, phase.learn & self._wiring.energetic
        sent = phase.schedule * wiring.own_precision
        gathering = phase.learn & wiring.deterministic & wiring.learns
        through = wiring.any_of(wiring.between & gathering[wiring.source], wiring.target)
        alike = np.unique(sent[through & phase.active])
        strays = through & (phase.active | phase.relay) & ~phase.learn
        if not self._task.rule.usual or strays.any() or len(alike) > 1 or not (np.abs(sent[teaching]) > 0).all():
            return None
        factors = np.full(len(sent), 1 / alike[0] if len(alike) else 1.0)
        factors[teaching] = 1 / sent[teaching]
        return factors

    def _learn_apart(self, operations: list[Operation], phase: Phase) -> None:
        """What the errors of a step teach, weighed as the rule says, from δ computed for this alone."""
        memory, wiring = self._memory, self._wiring
        teaching = phase.learn & wiring.energetic
        relay = wiring.upstream(teaching) & wiring.learns
        message = (teaching | relay)[wiring.target] & relay[wiring.source]
        apart = attrs.evolve(phase, active=teaching, relay=relay, message=message, learn=teaching | relay)
        self._learn(operations, apart, teaching, memory.activity, np.ones(len(teaching)), message)

    def _learn(
        self,
        operations: list[Operation],
        phase: Phase,
        anew: Mask,
        activity: Activity,
        factors: Factors,
        traced: Mask,
    ) -> None:
        """Errors with precision left out, of the nodes whose δ is computed anew, and what they and others teach."""
        memory, exact = self._memory, self._message_dtype is None
        errors.compare(memory, operations, attrs.evolve(phase, active=anew), learning=True)
        # Those whose errors become new tensors, images, come one by one, and let them go before the next.
        apart = [(node, rows) for node, rows in memory.node_rows(anew) if node.pulled_cells(rows)]
        alone = [masked(node.group.positions[rows], len(anew)) for node, rows in apart if not phase.relay.any()]
        together = ~np.any(alone, axis=0) if alone else np.ones_like(anew)
        for now in (together, *alone):
            errors.pull(memory, operations, anew & now, phase.learn)
            if now is together:
                messages.relay(memory, operations, phase, phase.learn, None)
            taught = attrs.evolve(phase, learn=phase.learn & now)
            learn(memory, operations, self._found, taught, activity, factors, traced, exact=exact)
            for node, rows in apart:
                if now[node.group.positions[rows]].all():
                    cells = node.pulled_cells(rows)
                    operations += [Operation("let go", cell.let_go, node.names) for cell in cells]

    def _move(self, operations: list[Operation], phase: Phase) -> None:
        for node, rows in self._memory.node_rows(phase.move):
            if not self._direct:
                velocity = None if self._task.relaxation.plain else node.part("velocity", rows)
                parts = node.part(node.moving, rows), node.part("descent", rows), velocity
                move = partial(messages.displace, self._memory, node, Named(node.names, rows), *parts, self._largest)
                operations.append(Operation("move", move, node.names))
            elif node.partial and not node.group.following:
                operations.append(Operation("clamp", node.clamp, node.names))

    @property
    def _learns_from_sent(self) -> Mask:
        """Nodes whose incoming edges learn, after the relaxation, from the errors that they have sent."""
        return ~np.isnan(self._plan.lasting_errors)

    def closing(self, steps: int) -> list[Operation]:
        """What brings every prediction up to date with the last of so many steps."""
        memory, operations = self._memory, list[Operation]()
        memory.compile_after(self._plan.moved(steps))
        unformed = self._plan.unformed(steps)
        form(memory, operations, unformed)
        predict(memory, operations, *self._plan.closing(steps), memory.activity, unformed)
        return operations

    def learning(self, steps: int) -> list[Operation]:
        """What computes the learning rule's gradients after so many steps (SPEC §4)."""
        memory, phase = self._memory, self._plan.learning(steps)
        operations: list[Operation] = []
        memory.compile_after(self._plan.moved(steps))
        form(memory, operations, phase.form)
        predict(memory, operations, phase.refresh, phase.predict, self.activity_learned_from)
        sent = self._plan.lasting_errors
        been_sent = np.zeros(len(self._wiring.edges), bool)
        for step in self._plan.phases:
            been_sent |= step.message
        traced = (been_sent & ~np.isnan(sent)[self._wiring.target]) | phase.message
        factors = np.where(np.isnan(sent), 1.0, sent)
        anew = phase.active & np.isnan(sent)
        self._learn(operations, phase, anew, self.activity_learned_from, factors, traced)
        return operations

    @property
    def activity_learned_from(self) -> Activity:
        """What edges read for their weights."""
        return "forward" if self._task.reads_forward else "present"

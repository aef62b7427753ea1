"""The reference engine: every node at every step, each by autograd on nothing but itself and its incoming edges."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from pcsim.engine import local_rules
from pcsim.engine.engine import Engine
from pcsim.engine.local_rules import Evaluation
from pcsim.engine.probe import Probed, recordings
from pcsim.engine.problem import Batch, Gradients, State, Task
from pcsim.engine.reached import Reached
from pcsim.graph.statistics import frozen_statistics


class ReferenceEngine(Engine):
    """Local autograd, obviously right and slow: the oracle of every other engine."""

    name = "reference"

    def predict(self, task: Task, batch: Batch) -> dict[str, Tensor]:
        """Values after the feed-forward start alone (SPEC §2, Start), by node name."""
        with torch.no_grad(), frozen_statistics(task.fingerprint.normalising):
            return dict(local_rules.start(task, batch).value)

    def relax(
        self,
        task: Task,
        batch: Batch,
        learn: Callable[[Gradients], None] | None = None,
    ) -> State:
        """Start feed-forward, then take T inference steps (SPEC §2)."""
        reached, records, probed = Reached(task), [], list[Probed]()
        waiting: Gradients | None = None
        with torch.no_grad(), frozen_statistics(task.fingerprint.normalising):
            state = local_rules.begin(task, batch)
            for now in local_rules.steps(state):
                if learn is not None and waiting is not None:
                    learn(waiting)
                if task.record:
                    records.append(now.record())
                if task.probes:
                    probed.append(local_rules.probe(now.state, now))
                learning = reached.step(state.steps)
                if learn is not None:
                    waiting = local_rules.gradients(Evaluation(now.state, state.steps, learning=True), learning)
            if learn is not None and waiting is not None:
                learn(waiting)
            end = Evaluation(attrs.evolve(state), state.last_step)
            if state.steps:
                local_rules.multiply(end, state)
            state.value = {**state.value, **{name: end.activity(name) for name in task.clamping.deterministic}}
            if task.record:
                state.keep([*records, Evaluation(state, state.last_step).record()])
            if task.probes:
                state.recordings = recordings(task.probes, [*probed, local_rules.probe(state)])
        return state

    def gradients(self, state: State) -> Gradients:
        """Gradients of the task's learning rule at a relaxed state (SPEC §4)."""
        task, reached = state.task, Reached(state.task)
        with torch.no_grad(), frozen_statistics(task.fingerprint.normalising):
            if task.rule.at_arrival:
                return local_rules.arrived(state)
            for step in range(state.steps):
                reached.step(step)
            return local_rules.gradients(local_rules.learned_from(state), reached.learning())

    def update_statistics(self, state: State) -> None:
        """Let modules with running statistics take the batch in (Eq. 6)."""
        local_rules.update_statistics(state)

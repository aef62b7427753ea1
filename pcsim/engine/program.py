"""A plan compiled into a program: flat lists of operations, in the order in which a run calls them."""

from __future__ import annotations

import math
from functools import partial

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from pcsim.engine import operations as do
from pcsim.engine.buffers import FIRST, Arena, NodeBuffers
from pcsim.engine.engine import Problem, Record, State
from pcsim.engine.kernel import Autograd
from pcsim.engine.plan import Phase, Plan, Positions
from pcsim.engine.stacks import Stacks
from pcsim.engine.stages import Activity, Operations, Stages
from pcsim.graph.energy import sample_norm
from pcsim.graph.evaluation import frozen_statistics


class Program(Stages):
    """Everything bound for one plan and one batch size; running it is calling its operations in turn.

    Args:
        plan: what to compute.
        stacks: which nodes and edges are computed together.
        arena: scratch tensors; programs that never hold a state at the same time may share it.
        message_dtype: of the products in messages; None for that of the values.
    """

    def __init__(self, plan: Plan, stacks: Stacks, arena: Arena, *, message_dtype: torch.dtype | None = None) -> None:
        super().__init__(plan, stacks, arena, message_dtype=message_dtype)
        self._places = {node.name: (b, row) for b in self.nodes for row, node in enumerate(b.stack.nodes)}
        self._pulling_last = plan.pulling_last() & self.direct_moves
        self.start = self._compile_start()
        self.steps = [self._compile_step(phase) for phase in plan.phases]
        """What brings predictions up to date, and what follows from them, of each different step."""
        self.end = self._compile_end()
        self.taught = [self._taught(phase) for phase in plan.phases] if plan.teaching else []
        """Places of the gradients that each phase computes, by parameter."""
        self._views = self._state_views()
        self._closing: dict[int, Operations] = {}
        self._learning: dict[int, tuple[Operations, dict[nn.Parameter, Tensor]]] = {}

    # Start

    def load(self, problem: Problem, previous: State | None) -> None:
        """Take over what a new batch gives: clamps, masks, and the seed of random draws."""
        self.problem = problem
        for node in self.nodes:
            node.load(problem, previous)

    def _compile_start(self) -> Operations:
        depth = self._depths()
        later = np.array([node.predicted for node in self._wiring.nodes], bool) & (depth == 0)
        operations: Operations = []
        for level in range(1, int(depth.max(initial=0)) + 1):
            now = depth == level
            self._predict(operations, now[self._wiring.target], now, "start")
            for buffers, rows in self._rows(now):
                if buffers.partial:
                    operations.append(partial(do.write, buffers.at("value", rows), buffers.at("prediction", rows)))
                    operations.append(buffers.clamp)
        self._predict(operations, later[self._wiring.target], later, "start")
        for buffers in self.nodes:
            if self._reads_prediction_at_start(buffers):
                operations.append(partial(do.copy, buffers.tensor("value"), buffers.tensor("prediction")))
        for buffers in self.nodes:
            operations += [partial(do.copy, copy, original) for copy, original in buffers.copies]
        if self.problem.nudge != 1:
            targets = [buffers for buffers in self.nodes if buffers.stack.given and buffers.node.incoming]
            operations += [partial(self._nudge, buffers) for buffers in targets]
        return operations

    def _nudge(self, buffers: NodeBuffers) -> None:
        value = buffers.tensor("value")
        torch.lerp(buffers.tensor("prediction"), value, self.problem.nudge, out=value)

    def _depths(self) -> Positions:
        """How many predictions lie before each node's own in the forward pass; 0 where none gives its value."""
        nodes, clamping = self._wiring.nodes, self.problem.clamping
        place = {node.name: position for position, node in enumerate(nodes)}
        depth = np.zeros(len(nodes), np.intp)
        for component in clamping.components:
            for name in sorted(component, key=clamping.position.__getitem__):
                node, inner = nodes[place[name]], name in clamping.deterministic
                if inner or (name not in clamping.full and name not in clamping.cyclic and node.predicted):
                    before = (int(depth[place[edge.source_name]]) for edge in node.incoming)
                    depth[place[name]] = 1 + max(before, default=0)
        return depth

    # Steps

    def _compile_step(self, phase: Phase) -> tuple[Operations, Operations]:
        """What brings predictions up to date, and what follows from them."""
        predictions: Operations = []
        self._predict(predictions, phase.refresh, phase.predict, "present")
        operations: Operations = []
        self._push(operations, phase, learning=False)
        pulling = phase.push & self._wiring.free & ~self._pulling_last
        if self.direct_moves:
            for buffers, rows in self._rows(pulling):
                value, delta = buffers.at("value", rows), buffers.at("delta", rows)
                operations.append(do.adding(value, delta, -self.problem.relaxation.rate))
        else:
            for buffers, rows in self._rows(phase.move):
                operations.append(partial(do.zero, buffers.at("descent", rows)))
            for buffers, rows in self._rows(pulling):
                operations.append(self._pull(buffers, rows, phase))
        self._pull_back(operations, phase.push)
        self._pass_on(operations, phase)
        if self.plan.teaching:
            self._teach(operations, phase, "present", np.ones(len(phase.push)))
        self._send(operations, phase.message & self._wiring.free[self._wiring.source])
        if not self.direct_moves:
            for buffers, rows in self._rows(phase.move):
                operations.append(partial(self._displace, buffers, rows))
        for buffers, _ in self._rows(phase.move):
            if buffers.partial and self.direct_moves:
                operations.append(buffers.clamp)
        return predictions, operations

    def _compile_end(self) -> Operations:
        """What every run ends with, after its last step."""
        operations: Operations = []
        rate, (_, push) = self.problem.relaxation.rate, self.plan.single_pushes
        for buffers, rows in self._rows(self._pulling_last):
            share = self._scale_of(rate * push[buffers.stack.positions[rows]], buffers)
            value, prediction = buffers.at("value", rows), buffers.at("prediction", rows)
            operations.append(partial(do.approach, value, prediction, share))
        return operations

    def closing(self, steps: int) -> Operations:
        """Operations that bring every prediction up to date with the last step."""
        if steps not in self._closing:
            self._closing[steps] = []
            self._predict(self._closing[steps], *self.plan.closing(steps), "present")
        return self._closing[steps]

    def learning(self, steps: int) -> tuple[Operations, dict[nn.Parameter, Tensor]]:
        """Operations that compute the learning rule's gradients after so many steps, and the gradients' places."""
        if steps not in self._learning:
            phase = self.plan.learning(steps)
            operations: Operations = []
            activity: Activity = "forward" if self.problem.rule.at_forward else "present"
            self._predict(operations, phase.refresh, phase.predict, activity)
            kept = self.plan.lasting_errors()
            anew = attrs.evolve(phase, push=phase.push & np.isnan(kept))
            self._push(operations, anew, learning=True)
            self._pull_back(operations, anew.push)
            self._pass_on(operations, phase)
            self._teach(operations, phase, activity, np.where(np.isnan(kept), 1.0, kept))
            self._learning[steps] = operations, self._taught(phase)
        return self._learning[steps]

    def _taught(self, phase: Phase) -> dict[nn.Parameter, Tensor]:
        """Places of the gradients that a phase computes, by parameter."""
        learned = self.plan.learned(phase.teach)
        return {
            p: self._gradients[p] for p, is_learned in zip(self._wiring.parameters, learned, strict=True) if is_learned
        }

    # What a run leaves

    def energies(self, step: int) -> Record:
        """Energies and errors of this state, and F_t with this step's precision."""
        problem = self.problem
        rows, total = [], torch.zeros((), dtype=self._arena.dtype, device=self._arena.device)
        for name in problem.clamping.energetic:
            buffers, row = self._places[name]
            energy = buffers.stack.nodes[row].energy_function
            value, prediction = buffers.tensor("value")[row], buffers.tensor("prediction")[row]
            rows.append((energy.sample_energy(value, prediction), sample_norm(value - prediction)))
            total = total + (problem.scale(name, step) * energy.unit_energy(value, prediction)).sum()
            total = total + problem.normaliser(name)
        return Record.of(rows, total, problem.batch)

    def finite(self) -> bool:
        """Whether every value that moved is finite, and small enough for its square to be."""
        moving = [b.tensor("value") for b in self.nodes if not (b.stack.given or b.stack.deterministic)]
        norms = [torch.linalg.vector_norm(value) for value in moving]
        return not norms or math.isfinite((norms[0] if len(norms) == 1 else torch.stack(norms).max()).item())

    def update_statistics(self, steps: int) -> None:
        """Evaluate the modules that normalise once more, on the activity that they saw last, statistics unfrozen."""
        if self.plan.teaching:  # values and weights have moved on since the last step's predictions
            with frozen_statistics(self.problem.snapshot.normalising):
                for operation in self.closing(steps):
                    operation()
        normalising = {id(module) for module in self.problem.snapshot.normalising}
        activity: Activity = "forward" if self.problem.rule.at_forward else "present"
        for edge in self.edges:
            owner = edge.stack.edges[0]
            if not any(id(module) in normalising for module in owner.modules()):
                continue
            if isinstance(edge.stages[0].kernel, Autograd):
                owner.contribute(edge.stages[0].saved["value"].detach(), self.problem.seed)
                continue
            for link, stage in enumerate(edge.stages):
                if id(stage.module) in normalising:
                    place = edge.place(link, FIRST) if link else self._activity(edge, FIRST, activity)
                    stage.module(place.read())
        for buffers in self.nodes:
            for link, stage in enumerate(buffers.stages):
                if id(stage.module) in normalising:
                    stage.module(buffers.place(link, FIRST).read())
            if buffers.graph is not None and any(id(module) in normalising for module in buffers.node.modules()):
                leaves, _ = buffers.graph
                buffers.node.predict([leaf.detach() for leaf in leaves.values()], self.problem.seed)

    def lost(self) -> str:
        """Name of a node whose value is not finite, or too large."""
        norms = ((name, torch.linalg.vector_norm(value)) for name, value in self._views[0].items())
        return next((name for name, norm in norms if not bool(torch.isfinite(norm))), "unknown")

    def _state_views(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        views: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        for node in self._wiring.nodes:
            buffers, row = self._places[node.name]
            for name, of in zip(("value", "forward_value", "forward_prediction"), views, strict=True):
                if name in buffers.tensors:
                    of[node.name] = buffers.tensors[name][row]
        return views[0], views[1], views[2]

    def holds(self, state: State) -> bool:
        """Whether a state's tensors are those of this program."""
        return state.value is self._views[0]

    def state(self, steps: int) -> State:
        """Views of the tensors, by node name; the next run of this program overwrites them."""
        return State(self.problem, *self._views, steps=steps)

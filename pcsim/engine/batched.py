"""The batched engine: runs a plan as a program over stacked tensors, and leaves out what is exactly zero."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import attrs
import torch

from pcsim.engine.buffers import Arena
from pcsim.engine.engine import Engine, Gradients, Problem, State
from pcsim.engine.plan import Plan
from pcsim.engine.program import Program
from pcsim.engine.reference import ReferenceEngine
from pcsim.engine.stacks import WeightRegistry
from pcsim.errors import DivergenceError
from pcsim.graph.evaluation import frozen_statistics
from pcsim.graph.network import Network

KEPT_PROGRAMS = 4
"""Programs of different clamps or batch sizes that are kept; a last, smaller batch is one of its own."""


class BatchedEngine(Engine):
    """Equal to the reference engine, planned and stacked.

    Args:
        network: the network to run.
        leave_out: leave out what is exactly zero (SPEC §7); for debugging, False computes everything at every step.
        stacking: compute equal nodes and edges together; for debugging, False computes each alone.
    """

    name = "batched"

    def __init__(self, network: Network, *, leave_out: bool = True, stacking: bool = True) -> None:
        super().__init__(network)
        self._leave_out, self._stacking = leave_out, stacking
        self._reference = ReferenceEngine(network)
        self._programs: dict[tuple[object, ...], cycle[Program]] = {}
        self._latest: tuple[State, Program] | None = None

    def forward(self, problem: Problem) -> State:
        """Values after the feed-forward start alone (SPEC §2, Start)."""
        return self._reference.forward(problem)

    def relax(
        self,
        problem: Problem,
        previous: State | None = None,
        learn: Callable[[Gradients], None] | None = None,
    ) -> State:
        """Start feed-forward, then take T inference steps (SPEC §2)."""
        program = self._program(problem, teaching=learn is not None)
        self._latest = None
        recorded = []
        with torch.no_grad(), frozen_statistics(self.network.snapshot().normalising):
            program.load(problem, previous)
            for operation in program.start:
                operation()
            steps = 0
            for steps, position in enumerate(program.plan.sequence, start=1):
                program.largest = 0.0
                predictions, update = program.steps[position]
                for operation in predictions:
                    operation()
                if problem.record:
                    recorded.append(program.energies(steps - 1))
                for operation in update:
                    operation()
                if learn is not None:
                    learn(program.taught[position])
                if problem.relaxation.tolerance is not None and problem.settled(program.largest, steps - 1):
                    break
            if not program.finite():
                self._explain_divergence(problem, previous)
            state = program.state(steps)
            if problem.record:
                for operation in program.closing(steps):
                    operation()
                recorded.append(program.energies(state.last_step))
                state.energies = torch.stack([row for row, _ in recorded])
                state.free_energies = torch.stack([total for _, total in recorded])
        self._latest = state, program
        return state

    def gradients(self, state: State) -> Gradients:
        """Gradients of the problem's learning rule at a relaxed state (SPEC §4)."""
        if self._latest is None or self._latest[0] is not state:
            # Its scratch tensors have been overwritten since, by a run that failed.
            return self._reference.gradients(state)
        operations, gradients = self._latest[1].learning(state.steps)
        with torch.no_grad(), frozen_statistics(self.network.snapshot().normalising):
            for operation in operations:
                operation()
        return gradients

    def _program(self, problem: Problem, *, teaching: bool) -> Program:
        """The program of a problem, made when it is first needed.

        There are two of each, which take turns: the state that the last run left stays whole if this one fails.
        """
        registry = WeightRegistry.of(self.network)
        if not registry.intact():
            self._programs.clear()
        relaxation, rule = problem.relaxation, problem.rule
        key = (
            problem.clamping,
            relaxation,
            rule,
            problem.batch,
            problem.dtype,
            problem.device,
            problem.record,
            teaching,
        )
        programs = self._programs.pop(key, None)
        program = next(programs) if programs is not None else None
        if programs is None or program is None or not program.intact():
            plan = Plan(problem, teaching=teaching, leave_out=self._leave_out)
            arena = Arena(problem.dtype, problem.device)
            pair = [Program(plan, arena, stacking=self._stacking) for _ in range(2)]
            programs = cycle(pair)
            program = next(programs)
        self._programs[key] = programs
        for stale in list(self._programs)[:-KEPT_PROGRAMS]:
            del self._programs[stale]
        return program

    def _explain_divergence(self, problem: Problem, previous: State | None) -> None:
        """Run again step by step, to name the node and the step at which a latent was lost."""
        quiet = attrs.evolve(problem, record=False)
        self._reference.relax(quiet, previous)
        raise DivergenceError(
            "a latent became NaN or infinite during relaxation; a smaller rate than "
            f"{problem.relaxation.rate:g} usually helps, or less momentum, or smaller weights or precisions"
        )

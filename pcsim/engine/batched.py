"""The batched engine: runs a plan as a program over stacked tensors, and leaves out what is exactly zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import attrs
import torch
from torch import Tensor

from pcsim.engine.buffers import Arena
from pcsim.engine.engine import Engine, Gradients, Problem, State, divergence
from pcsim.engine.plan import Plan
from pcsim.engine.program import Program
from pcsim.engine.reference import ReferenceEngine
from pcsim.engine.stacks import Stacks, WeightRegistry
from pcsim.errors import DivergenceError, SettingError
from pcsim.graph.evaluation import frozen_statistics
from pcsim.graph.network import Network

KEPT_PROGRAMS = 4
"""Programs of different clamps or batch sizes that are kept; a last, smaller batch is one of its own."""
IMAGE_AXES = 4
"""Of a batch of images: (batch, channels, height, width)."""


class _Turns:
    """Two programs of one plan that take turns, so that a run never touches the state that is kept from another."""

    def __init__(self, problem: Problem, plan: Plan, make: Callable[[], Program]) -> None:
        self.plan = plan
        self._snapshot, self._addresses = problem.snapshot, _addresses(problem)
        self._make = make
        self._programs = [self._make()]

    def fits(self, problem: Problem) -> bool:
        """Whether the parameters are still those of the programs, and where they were (not so after ``net.to``)."""
        return problem.snapshot is self._snapshot and _addresses(problem) == self._addresses

    def next(self, kept: State | None) -> Program:
        """A program that does not hold the kept state; the second is made when it is needed."""
        for program in self._programs:
            if kept is None or not program.holds(kept):
                return program
        self._programs.append(self._make())
        return self._programs[-1]


class BatchedEngine(Engine):
    """Equal to the reference engine, planned and stacked.

    Args:
        network: the network to run.
        leave_out: leave out what is exactly zero (SPEC §7); for debugging, False computes everything at every step.
        stacking: compute equal nodes and edges together; for debugging, False computes each alone.
        message_dtype: a lower precision for the products in messages, such as ``torch.bfloat16``; None for that of
            the network. Predictions and latents are never rounded: an error is a small difference of the two, and
            rounding either to 8 bits would leave little of it, while a message only has to point downhill.

    Raises:
        SettingError: at the first batch, if messages are to be rounded to half precision on a CPU, some of which
            abort on such products.
    """

    name = "batched"

    def __init__(
        self,
        network: Network,
        *,
        leave_out: bool = True,
        stacking: bool = True,
        message_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(network)
        self._leave_out, self._stacking, self._message_dtype = leave_out, stacking, message_dtype
        self._reference = ReferenceEngine(network)
        self._programs: dict[tuple[object, ...], _Turns] = {}
        self._latest: tuple[State, Program] | None = None
        self._versions: list[int] = []

    def __getstate__(self) -> dict[str, object]:
        """Without programs, which are compiled anew where they are needed."""
        return {**self.__dict__, "_programs": {}, "_latest": None, "kept": None}

    def forward(self, problem: Problem) -> State:
        """Values after the feed-forward start alone (SPEC §2, Start)."""
        if not problem.snapshot.standard:
            return self._reference.forward(problem)  # a module of the user's own may want them contiguous
        # Laid out channels last, images stay so from module to module, and pooling them is several times faster.
        images = {
            name: attrs.evolve(clamp, value=clamp.value.contiguous(memory_format=torch.channels_last))
            for name, clamp in problem.clamps.items()
            if clamp.value.dim() == IMAGE_AXES
        }
        return self._reference.forward(attrs.evolve(problem, clamps={**problem.clamps, **images}))

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
        with torch.no_grad(), frozen_statistics(problem.snapshot.normalising):
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
                    if not program.finite():
                        raise self._divergence(program, previous, steps)
                    learn(program.taught[position])
                if problem.relaxation.tolerance is not None and problem.settled(program.largest, steps - 1):
                    break
            for operation in program.end:
                operation()
            if not program.finite():
                raise self._divergence(program, previous, steps)
            state = program.state(steps)
            if problem.record:
                for operation in program.closing(steps):
                    operation()
                recorded.append(program.energies(state.last_step))
                state.keep(recorded)
        self._latest, self._versions = (state, program), _versions(problem)
        return state

    def gradients(self, state: State) -> Gradients:
        """Gradients of the problem's learning rule at a relaxed state (SPEC §4)."""
        program = self._program_of(state)
        if program is None:
            return self._reference.gradients(state)
        operations, gradients = program.learning(state.steps)
        with torch.no_grad(), frozen_statistics(state.problem.snapshot.normalising):
            for operation in operations:
                operation()
        return gradients

    def update_statistics(self, state: State) -> None:
        """Let normalising modules take the batch into their running statistics (Eq. 6)."""
        program = self._program_of(state)
        if program is None:
            self._reference.update_statistics(state)
            return
        with torch.no_grad():
            program.update_statistics(state.steps)

    def _program_of(self, state: State) -> Program | None:
        """The program that left the state, while its scratch tensors are those of the state.

        They are not once another run has overwritten them, even one that failed, or a weight has changed.
        """
        if self._latest is None or self._latest[0] is not state or self._versions != _versions(state.problem):
            return None
        return self._latest[1]

    def _program(self, problem: Problem, *, teaching: bool) -> Program:
        """The program of a problem, made when it is first needed.

        There are two of each, which take turns: the state that an earlier run left stays whole if this one fails.
        """
        if self._message_dtype in (torch.bfloat16, torch.float16) and problem.device.type == "cpu":
            raise SettingError(
                f"message_dtype {self._message_dtype} on a CPU: some abort on half-precision products; use None there"
            )
        sizes = (problem.batch, problem.dtype, problem.device)
        key = (problem.clamping, problem.relaxation, problem.rule, *sizes, problem.record, problem.nudge != 1, teaching)
        turns = self._programs.pop(key, None)
        if turns is None or not turns.fits(problem):
            WeightRegistry.of(self.network).forget_replaced()
            plan = Plan(problem, teaching=teaching, leave_out=self._leave_out)
            stacks, arena = Stacks.of(plan, stacking=self._stacking), Arena(problem.dtype, problem.device)
            turns = _Turns(problem, plan, partial(Program, plan, stacks, arena, message_dtype=self._message_dtype))
        self._programs[key] = turns
        for forgotten in list(self._programs)[:-KEPT_PROGRAMS]:
            del self._programs[forgotten]
        return turns.next(self.kept)

    def _divergence(self, program: Program, previous: State | None, steps: int) -> DivergenceError:
        """The error that names the node and the step; found by running again if only the end is known."""
        problem = attrs.evolve(program.problem, record=False)
        if not program.plan.teaching:
            try:
                self._reference.relax(problem, previous)
            except DivergenceError as error:
                return error
        return divergence(problem, program.lost(), steps - 1 if steps else None)


def _addresses(problem: Problem) -> list[tuple[int, bool]]:
    """Where each parameter is, and whether it learns."""
    parameters = problem.snapshot.parameters
    return [*zip(map(Tensor.data_ptr, parameters), map(_learns, parameters), strict=True)]


_learns = attrgetter("requires_grad")
_version = attrgetter("_version")


def _versions(problem: Problem) -> list[int]:
    """A number by parameter that grows whenever the parameter changes."""
    return [*map(_version, problem.snapshot.parameters)]

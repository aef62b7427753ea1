"""The batched engine: runs a plan as a program over stacked tensors, and leaves out what is exactly zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from pcsim.collecting import uncollected
from pcsim.engine import local_rules
from pcsim.engine.batched.groups import Groups
from pcsim.engine.batched.places import Arena
from pcsim.engine.batched.program import Program
from pcsim.engine.engine import Engine
from pcsim.engine.kernels.products import PRODUCTS, Products
from pcsim.engine.planning.plan import Plan
from pcsim.engine.probe import Probed, recordings
from pcsim.engine.problem import Batch, Gradients, State, Task
from pcsim.errors import DivergenceError, SettingError, StateError
from pcsim.graph.network import Network
from pcsim.graph.statistics import frozen_statistics

KEPT_PROGRAMS = 6
"""Programs of different tasks or batch sizes that are kept; a last, smaller batch is one of its own."""


class _Turns:
    """Two programs of one plan that take turns, so that a run never touches the state that is shown from another."""

    def __init__(self, plan: Plan, make: Callable[[], Program]) -> None:
        self.plan, self._make = plan, make
        self.programs = [make()]

    def next(self, shown: State | None) -> Program:
        """A program that does not hold the shown state; the second is made when it is needed."""
        for program in self.programs:
            if shown is None or not program.holds(shown):
                return program
        self.programs.append(self._make())
        return self.programs[-1]


class BatchedEngine(Engine):
    """Equal to the reference engine, planned and stacked.

    Each shortcut has a switch, for debugging.

    Args:
        network: the network to run.
        leave_out: leave out what is exactly zero (SPEC §7); False computes everything at every step.
        stacking: compute equal nodes and edges together; False computes each alone.
        lasting_errors: let the forward rule learn from errors that were sent already; False computes them again.
        direct_moves: add messages straight to values; False gathers them first.
        message_dtype: a lower precision for the products in messages, such as ``torch.bfloat16``; None for that of
            the network. Predictions and latents are never rounded: an error is a small difference of the two, and
            rounding either to 8 bits would leave little of it, while a message only has to point downhill.
        cuda_graphs: let a CUDA device capture what a batch's runs consist of, and play it back from the third batch of
            a kind on, so that the CPU queues one call in place of hundreds. Not for programs that autograd computes a
            part of, that draw random numbers in modules, or that do something between two steps, such as recording:
            a warning, and ``print(sim.program)``, say why.
        compiled: let ``torch.compile`` make C++ of steps that are alike, many at a time, on a CPU with a C++ compiler:
            for small layers and batches, whose operations take less time than calling them. It takes ten seconds to a
            minute at the first batch of a kind. Not for programs that do something between two steps, such as
            recording, nor for steps with what leaves its results elsewhere, such as convolutions, clamps of single
            units, or what autograd computes: a warning, and ``print(sim.program)``, say why.
        products: which of PyTorch's libraries multiplies the matrices of linear maps, and takes hyperbolic tangents, in
            float32 on a CPU: ``"torch"``, its own way; ``"onednn"``; or ``"auto"``, oneDNN where it is known to be the
            faster.

    Raises:
        SettingError: products is none of these; or, at the first batch, messages are to be rounded to half precision
            on a CPU, some of which abort on such products.
    """

    name = "batched"
    reads_late = True

    def __init__(
        self,
        network: Network,
        *,
        leave_out: bool = True,
        stacking: bool = True,
        lasting_errors: bool = True,
        direct_moves: bool = True,
        message_dtype: torch.dtype | None = None,
        cuda_graphs: bool = False,
        compiled: bool = False,
        products: Products = "auto",
    ) -> None:
        super().__init__(network)
        if products not in PRODUCTS:
            raise SettingError(f"products={products!r} given, expected one of {', '.join(map(repr, PRODUCTS))}")
        self._products: Products = products
        self._plan_options = {"leave_out": leave_out, "lasting_errors": lasting_errors}
        self._stacking, self._message_dtype = stacking, message_dtype
        self._program_options = {
            "direct_moves": direct_moves,
            "message_dtype": message_dtype,
            "cuda_graphs": cuda_graphs,
            "compiled": compiled,
        }
        self._programs: dict[tuple[object, ...], _Turns] = {}
        self._latest: tuple[State, Program] | None = None
        self._versions: list[int] = []

    def __getstate__(self) -> dict[str, object]:
        """Without programs, which are compiled anew where they are needed."""
        return {**self.__dict__, "_programs": {}, "_latest": None, "shown": None}

    def predict(self, task: Task, batch: Batch) -> dict[str, Tensor]:
        """Values after the feed-forward start alone (SPEC §2, Start), by a program of no steps."""
        program = self._program(task, batch)
        with torch.no_grad(), frozen_statistics(task.fingerprint.normalising):
            program.load(batch)
            program.start_forward()
            values = program.state(batch, 0).value
            return {name: value.clone(memory_format=torch.contiguous_format) for name, value in values.items()}

    def relax(
        self,
        task: Task,
        batch: Batch,
        learn: Callable[[Gradients], None] | None = None,
    ) -> State:
        """Start feed-forward, then take T inference steps (SPEC §2)."""
        program = self._program(task, batch)
        self._latest = None
        recorded, probed = [], list[Probed]()
        with torch.no_grad(), frozen_statistics(task.fingerprint.normalising):
            program.load(batch)
            steps, sequence = 0, program.plan.sequence
            if program.uninterrupted:
                program.relax()
                steps, sequence = len(sequence), []
            else:
                program.start_forward()
            for steps, position in enumerate(sequence, start=1):
                program.at(steps - 1)
                predictions, update = program.calls[position]
                for call in predictions:
                    call()
                if program.judge(steps - 1):
                    for call in predictions:
                        call()
                program.remember()
                if task.record:
                    recorded.append(program.record(steps - 1))
                if task.probes:
                    probed.append(program.probe())
                for call in update:
                    call()
                if learn is not None:
                    if not batch.late and not program.finite(steps):
                        raise self._divergence(program, batch, steps)
                    learn(gradients := program.found())
                    program.bring_learned(gradients)
                if task.relaxation.tolerance is not None and task.settled(program.largest.update, steps - 1):
                    break
                program.largest.update = 0.0
            program.largest.update = 0.0
            if not program.uninterrupted:
                program.close(steps)
                if steps and program.judge(steps - 1):
                    program.close(steps)
            if not program.finite(steps):
                raise self._divergence(program, batch, steps)
            state = program.state(batch, steps)
            if task.record:
                state.keep([*recorded, program.record(state.last_step)])
            if task.probes:
                state.recordings = recordings(task.probes, [*probed, local_rules.probe(state)])
            if learn is None:
                state.learned = program.found()
        self._latest, self._versions = (state, program), _versions(task)
        return state

    def gradients(self, state: State) -> Gradients:
        """Gradients of the task's learning rule at a relaxed state (SPEC §4)."""
        program = self._program_of(state)
        with torch.no_grad(), frozen_statistics(state.task.fingerprint.normalising):
            if program is None and state.task.rule.at_arrival:
                return local_rules.arrived(state)
            if program is None:
                plan = Plan(state.task)
                learning = plan.learning(state.steps).learn
                names = [node.name for node, learns in zip(plan.wiring.nodes, learning, strict=True) if learns]
                return local_rules.gradients(local_rules.learned_from(state), names)
            program.learn(state.steps)
            gradients = {**program.found()}
            for parameter, gradient in state.learned.items():
                gradients[parameter] = gradient + gradients[parameter] if parameter in gradients else gradient.clone()
            return gradients

    def update_statistics(self, state: State) -> None:
        """Let modules with running statistics take the batch in (Eq. 6)."""
        program = self._program_of(state)
        if program is None or program.forward_pass_lost:
            local_rules.update_statistics(state)
            return
        with torch.no_grad():
            program.update_statistics(state.steps)

    def plan(self, state: State) -> Plan:
        """The plan by which a state was computed."""
        return self.program(state).plan

    def program(self, state: State) -> Program:
        """The operations that computed a state; StateError once it is no longer the latest."""
        return next(program for program in self.programs(state) if program.holds(state))

    def programs(self, state: State) -> list[Program]:
        """The programs that take turns on a state's task; StateError once it is no longer the latest."""
        for turns in self._programs.values():
            if any(program.holds(state) for program in turns.programs):
                return turns.programs
        raise StateError("the program of that state has been let go since; run infer again")

    def _program_of(self, state: State) -> Program | None:
        """The program that left the state, while its scratch tensors are those of the state.

        They are not once another run has overwritten them, even one that failed, or a weight has changed.
        """
        if self._latest is None or self._latest[0] is not state or self._versions != _versions(state.task):
            return None
        return None if state.altered else self._latest[1]

    @uncollected()
    def _program(self, task: Task, batch: Batch) -> Program:
        """The program of a task, made when it is first needed.

        There are two of each, which take turns: the state that an earlier run left stays whole if this one fails.
        """
        devices = task.fingerprint.devices(batch.device)
        if self._message_dtype in (torch.bfloat16, torch.float16) and "cpu" in {device.type for device in devices}:
            raise SettingError(
                f"message_dtype {self._message_dtype} on a CPU: some abort on half-precision products; use None there"
            )
        key = (task, batch.size, batch.dtype, batch.device, *devices)
        turns = self._programs.pop(key, None)
        if turns is None:
            plan = Plan(task, **self._plan_options)
            groups = Groups.of(plan, stacking=self._stacking)
            arena = Arena(batch.size, batch.dtype, batch.device, self._products)
            turns = _Turns(plan, partial(Program, plan, groups, arena, **self._program_options))  # type: ignore[arg-type]
        self._programs[key] = turns
        for forgotten in list(self._programs)[:-KEPT_PROGRAMS]:
            del self._programs[forgotten]
        return turns.next(self.shown)

    def _divergence(self, program: Program, batch: Batch, steps: int) -> DivergenceError:
        """The error that names the node and the step; found by the local rules if only the end is known."""
        task = program.plan.task
        if not task.learns_each_step:
            try:
                for _ in local_rules.steps(local_rules.begin(task.unwatched, batch)):
                    pass
            except DivergenceError as error:
                return error
        return local_rules.divergence(task, program.lost(steps), steps - 1 if steps else None)


_version = attrgetter("_version")


def _versions(task: Task) -> list[int]:
    """A number by parameter that grows whenever the parameter changes."""
    return [*map(_version, task.fingerprint.parameters)]

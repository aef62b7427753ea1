"""A program: flat lists of operations that a plan has been compiled into, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import chain, groupby, repeat

import numpy as np
import torch
from torch import Tensor

from pcsim.engine.batched import errors, messages
from pcsim.engine.batched.compiled import FEWEST, CompiledSteps, refuse
from pcsim.engine.batched.edges import Activity, EdgeMemory
from pcsim.engine.batched.gradients import Found
from pcsim.engine.batched.groups import Groups
from pcsim.engine.batched.memory import Memory, Views
from pcsim.engine.batched.nodes import NodeMemory
from pcsim.engine.batched.places import Arena, Operation, read, runs_of
from pcsim.engine.batched.playback import GRAPHS, Playback
from pcsim.engine.batched.predict import nudge
from pcsim.engine.batched.stages import Stages
from pcsim.engine.batched.weights import Stack
from pcsim.engine.planning.plan import Plan
from pcsim.engine.planning.wiring import Positions
from pcsim.engine.probe import Probed
from pcsim.engine.problem import Batch, Gradients, Record, State, Values, all_finite, free_energies, record
from pcsim.engine.rates import Rates
from pcsim.graph.part import Part
from pcsim.graph.statistics import frozen_statistics
from pcsim.messages import listed

FIRST: Positions = np.zeros(1, np.intp)


class Program:
    """Everything bound for one plan and one batch size; running it is calling its operations in turn.

    Args:
        plan: what to compute.
        groups: which nodes and edges are computed together.
        arena: scratch tensors; programs that never hold a state at the same time may share it.
        direct_moves: add messages straight to values where nothing reads them before the step is over (1.0 to 1.22
            times as fast); False gathers them first.
        message_dtype: of the products in messages; None for that of the values.
        cuda_graphs: let the device capture what runs consist of, and play it back.
        compiled: compile steps that are alike.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Groups,
        arena: Arena,
        *,
        direct_moves: bool = True,
        message_dtype: torch.dtype | None = None,
        cuda_graphs: bool = False,
        compiled: bool = False,
    ) -> None:
        self.plan, self.groups = plan, groups
        self._task, self._wiring, self._memory = plan.task, plan.wiring, Memory(plan, groups, arena)
        self._found, self.largest = Found(), messages.Largest()
        self._stages = Stages(
            self._memory, self._found, self.largest, direct_moves=direct_moves, message_dtype=message_dtype
        )
        self.uninterrupted = not self._task.between_steps
        """Whether nothing happens between two steps."""
        self.start = self._stages.start()
        self.steps = [self._stages.step(phase) for phase in plan.phases]
        """What brings predictions up to date, and what follows from them, of each different step."""
        # What a run calls again and again, without looking it up in its operation each time.
        self.calls = [
            ([each.call for each in predictions], [each.call for each in update]) for predictions, update in self.steps
        ]
        self.end = self._stages.end()
        self.native = all(each.native for lists in self.steps for part in lists for each in part)
        """Whether all that the steps make lies in tensors of the program, so that autograd need not know of them."""
        self._views = self._state_views()
        self._valued: dict[int, tuple[Mapping[str, Tensor], Views]] = {}
        self._checked: dict[int, list[Tensor]] = {}
        self._closing: dict[int, list[Operation]] = {}
        self._learning: dict[int, list[Operation]] = {}
        self._stacks: list[Stack] = []
        self._find_stacks()
        self.playback = Playback(arena, self._found, self._task.network, asked=cuda_graphs)
        """What the stages of a run go through, to be played back where the device can."""
        if cuda_graphs and (refused := self._uncaptured(arena.device)):
            self.playback.refuse(refused)
        self._runs = [(position, len([*alike])) for position, alike in groupby(plan.sequence)]
        self.compiled: dict[int, CompiledSteps] = {}
        """Steps that are compiled, by their place among the different ones."""
        self._uncompiled = self._compile_further(arena) if compiled and plan.sequence else ""
        if self._uncompiled:
            refuse(self._uncompiled)

    def _find_stacks(self) -> None:
        """Stacked weights are known once the operations that read them are."""
        self._stacks = [stack for edge in self._memory.edges for stack in edge.weights.stacks.values()]

    def _uncaptured(self, device: torch.device) -> str:
        """Why a device cannot play back what this program calls; "" where it can."""
        parts: list[EdgeMemory | NodeMemory] = [*self._memory.edges, *self._memory.nodes]
        traced = [part.names[0] for part in parts if part.trace is not None]
        if device.type not in GRAPHS:
            return f"they are for {listed(GRAPHS)}, and the network is on {device.type!r}"
        if not self.uninterrupted:
            return self._interrupted()
        if any(edge.crosses for edge in self._memory.edges):
            return "the network lies on several devices"
        if self._task.fingerprint.stochastic:
            return "a module may draw random numbers"
        own = [
            node.name for node in self._wiring.nodes if not type(node.energy_function).__module__.startswith("pcsim.")
        ]
        if own:  # whose settings nobody looks at
            return f"{listed(own, 3)} may change, whose energy is of your own"
        return f"autograd computes {listed(traced, 3)}" if traced else ""

    def _interrupted(self) -> str:
        return f"something happens between two steps: {', '.join(self._task.between_steps)}"

    def _compile_further(self, arena: Arena) -> str:
        """Compile steps of which enough that are alike follow each other; why none is, "" where one is."""
        if arena.device.type != "cpu":
            return f"this is for CPUs, and the network is on {arena.device.type!r}"
        if not self.uninterrupted:
            return self._interrupted()
        long = dict.fromkeys(p for p, count in self._runs if count > FEWEST and any(self.steps[p]))
        if not long:
            return f"no {FEWEST + 1} steps that are alike follow each other"
        apart = ""
        for position in long:
            step = [*chain.from_iterable(self.steps[position])]
            foreign = [each for each in step if not each.native]
            if foreign:
                apart = apart or f"what {str(foreign[0])!r} makes is kept elsewhere each time"
            else:
                self.compiled[position] = CompiledSteps([each.call for each in step], arena)
        return "" if self.compiled else apart

    # Runs

    def load(self, batch: Batch) -> None:
        """Take over what a new batch gives: clamps, masks, the seed of random draws; and the present weights.

        Nothing stays of a run that was interrupted.
        """
        self._found.clear()
        self.largest.update = 0.0
        if not self.playback.refused:
            batch = self.playback.hold(batch)
        self._memory.batch, self._memory.step = batch.at(0), 0
        relaxation = self._task.relaxation
        self._memory.rates = None if relaxation.least_rate is None else Rates(relaxation, batch)
        self._bring_weights()
        for node in self._memory.nodes:
            node.load(batch, self.plan)

    def closing(self, steps: int) -> list[Operation]:
        """Operations that bring every prediction up to date with the last step."""
        if steps not in self._closing:
            self._closing[steps] = self._stages.closing(steps)
            self._bring_new_stacks()
        return self._closing[steps]

    def learning(self, steps: int) -> list[Operation]:
        """Operations that compute the learning rule's gradients after so many steps."""
        if steps not in self._learning:
            self._learning[steps] = self._stages.learning(steps)
            self._bring_new_stacks()
        return self._learning[steps]

    def _bring_new_stacks(self) -> None:
        """What was compiled late may read weights in stacks that no earlier operation did."""
        known = len(self._stacks)
        self._find_stacks()
        if len(self._stacks) > known:
            self._bring_weights()

    def _bring_weights(self) -> None:
        with torch.no_grad():
            for stack in self._stacks:
                stack.bring()

    def bring_learned(self, learned: Gradients) -> None:
        """Take over the weights that an optimizer has changed within a run."""
        for stack in self._stacks:
            stack.bring_learned(learned)

    def start_forward(self) -> None:
        """Take the forward pass (SPEC §2, Start)."""
        self.playback.run(("start", self._memory.at_hand().nudge), self._start_forward)

    def _start_forward(self) -> None:
        for operation in self.start:
            operation.call()

    def relax(self) -> None:
        """Take the forward pass and all steps, where nothing happens between two."""
        self.playback.run(("relax", self._memory.at_hand().nudge), self._relax)

    def _relax(self) -> None:
        self._start_forward()
        steps = chain.from_iterable(self._taken(*run) for run in self._runs)
        # A call of a small operation takes a seventh less than where autograd has only been told to stay out.
        with torch.inference_mode() if self.native else nullcontext():
            for call in chain(steps, (each.call for each in self.end)):
                call()
        self.close(len(self.plan.sequence))

    def _taken(self, position: int, count: int) -> Iterable[Callable[[], object]]:
        """What takes so many steps that are alike."""
        if position in self.compiled:
            return [partial(self.compiled[position].take, count)]
        return chain.from_iterable(chain.from_iterable(repeat(self.calls[position], count)))

    def learn(self, steps: int) -> None:
        """Compute the learning rule's gradients after so many steps."""
        self.learning(steps)  # compiled before it is captured
        self._found.clear()
        self.playback.go_on(("learn", steps), partial(self._learn_after, steps))

    def _learn_after(self, steps: int) -> None:
        for operation in self.learning(steps):
            operation.call()

    def at(self, step: int) -> None:
        """Say which step is being taken, and show its frames."""
        memory = self._memory
        memory.step = step
        changing = self._task.changing(step - 1) if step else ()
        if changing:
            memory.batch = memory.at_hand().at(step)
            changed = [node for node in memory.nodes if node.streamed and not set(changing).isdisjoint(node.names)]
            for node in changed:
                node.show()
            for node in self._stages.nudged:
                if node in changed:
                    nudge(memory, node)

    def close(self, steps: int) -> None:
        """Bring what follows from the last step up to date with it: predictions, and multipliers."""
        if self._task.closes:
            for operation in self.closing(steps):
                operation.call()
        if self._task.relaxation.multipliers and steps:
            errors.last_multipliers(self._memory)

    def judge(self, step: int) -> bool:
        """Take back the last step of the samples whose energy it has raised; whether there are any."""
        rates = self._memory.rates
        if rates is None:
            return False
        rose = rates.judge(free_energies(self._task, self._memory.at_hand(), step, self._compared))
        if rose is None:
            return False
        for node, before in self._before:
            after = node.tensor(node.moving)
            after.copy_(rates.take_back(rose, before, after, len(node.node.shape)))
        return True

    def remember(self) -> None:
        """Keep what is about to move, to be taken back."""
        if self._memory.rates is not None:
            for node, before in self._before:
                before.copy_(node.tensor(node.moving))

    @cached_property
    def _before(self) -> list[tuple[NodeMemory, Tensor]]:
        moving = (node for node in self._memory.nodes if node.free)
        return [(node, torch.empty_like(node.tensor(node.moving))) for node in moving]

    def found(self) -> Gradients:
        """Gradients by parameter that the last operations have found, to be kept by the caller."""
        gradients = self._found.copy()
        self._found.clear()
        return gradients

    # What a run leaves

    def record(self, step: int) -> Record:
        """Energies and errors of this state, and F_t with this step's precision."""
        return record(self._task, self._memory.at_hand(), step, self._compared)

    def probe(self) -> Probed:
        """What the task's probes see of this state."""
        seen = {}
        for probe in self._task.probes:
            memory, row = self._memory.rows[probe.node]
            seen[probe.node] = {part: probe.chosen(memory.present(part, row)) for part in probe.of or ()}
        return seen

    def _compared(self, name: str) -> tuple[Tensor, Tensor]:
        memory, row = self._memory.rows[name]
        return memory.compared(row)

    def finite(self, steps: int) -> bool:
        """Whether every value that moved is finite, and small enough for its square to be.

        Raises:
            ClampError: what is unread of the clamps is not finite.
        """
        squares = [torch.dot(units, units) for units in self._moving(steps)]
        return not squares or all_finite(squares, self._memory.at_hand().unread)

    def _moving(self, steps: int) -> list[Tensor]:
        """What values of free nodes are made of after so many steps, as vectors: their dot products with themselves
        take a third of the time of their norms.
        """
        if steps not in self._checked:
            moving = (n for n in self._memory.nodes if n.free)
            checked = [n.tensor("forward_prediction" if n.group.received else "value") for n in moving]
            for node, rows in self._memory.node_rows(self.plan.moved(steps) & self.plan.received):
                checked += [node.tensor("displacement")[slice(*run)] for run in runs_of(rows)]
            # However its images are laid out, a tensor of the program is dense.
            self._checked[steps] = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in checked]
        return self._checked[steps]

    def lost(self, steps: int) -> str:
        """Name of a node whose value is not finite, or too large."""
        values = ((n, v) for n, v in self._values(steps)[0].items() if n not in self._task.fingerprint.integers)
        norms = ((name, torch.linalg.vector_norm(value)) for name, value in values)
        return next((name for name, norm in norms if not bool(torch.isfinite(norm))), "unknown")

    @cached_property
    def forward_pass_lost(self) -> bool:
        """Whether modules keep statistics of the forward pass that have been evaluated on other values since."""
        if not self._task.reads_forward:
            return False
        nodes = (self._wiring.nodes[position] for position in np.flatnonzero(self.plan.rewritten).tolist())
        return any(self._counts(part) for node in nodes for part in (node, *node.incoming))

    @cached_property
    def _keeping(self) -> set[int]:
        """Modules that keep running statistics, by identity."""
        return {id(module) for module in self._task.fingerprint.normalising}

    def _counts(self, part: Part) -> bool:
        """Whether a node or edge keeps anything of the batches that it has seen."""
        return part.moves or any(id(module) in self._keeping for module in part.modules())

    def update_statistics(self, steps: int) -> None:
        """Evaluate the modules that keep statistics once more, on the activity that they saw last, and let them."""
        activity = self._stages.activity_learned_from
        if activity == "present":
            if self._task.learns_each_step:  # weights have moved on since the last step's predictions
                self._bring_weights()
            with frozen_statistics(self._task.fingerprint.normalising):
                for operation in self.closing(steps):
                    operation.call()
        self._memory.compile_after(self.plan.moved(steps))
        for edge in self._memory.edges:
            self._count_edge(edge, activity)
        for node in self._memory.nodes:
            self._count_node(node)

    def _count_edge(self, edge: EdgeMemory, activity: Activity) -> None:
        owner, seed = edge.group.edges[0], self._memory.at_hand().seed
        if not self._counts(owner):
            return
        if edge.trace is not None:
            owner.contribute(edge.trace.inputs[0].detach(), seed, hold=False)
            return
        for position, link in enumerate(edge.chain):
            if id(link.module) in self._keeping:
                place = edge.place(position, FIRST) if position else edge.activity(activity, FIRST)
                link.module(read(place, [], edge.names).read().to(edge.target.arena.device))

    def _count_node(self, node: NodeMemory) -> None:
        if not node.node.incoming:  # a root's transfer is never evaluated
            return
        for position, link in enumerate(node.chain):
            if id(link.module) in self._keeping:
                link.module(read(node.place(position, FIRST), [], node.names).read())
        if node.trace is not None and self._counts(node.node):
            given = [tensor.detach() for tensor in node.trace.inputs]
            node.node.predict(given, self._memory.at_hand().seed, hold=False)

    def _state_views(self) -> tuple[Views, Views, Views]:
        nodes = [(node.name, *self._memory.rows[node.name]) for node in self._wiring.nodes]
        present = {
            name: (memory.tensors["forward_prediction" if memory.group.received else "value"], row)
            for name, memory, row in nodes
        }
        value, prediction = (
            {name: (memory.tensors[of], row) for name, memory, row in nodes if of in memory.tensors}
            for of in ("forward_value", "forward_prediction")
        )
        return Views(present), Views(value), Views(prediction)

    def _values(self, steps: int) -> tuple[Mapping[str, Tensor], Views]:
        """Values by node name after so many steps, and the displacements that are kept apart."""
        if steps not in self._valued:
            has_moved = self.plan.moved(steps)
            moved, still = dict[str, tuple[Tensor, int]](), dict[str, tuple[Tensor, int]]()
            for memory, rows in self._memory.node_rows(self.plan.received):
                stack = memory.tensor("displacement")
                zero = stack.new_zeros(()).expand_as(stack)
                for row in rows.tolist():
                    there = bool(has_moved[memory.group.positions[row]])
                    (moved if there else still)[memory.names[row]] = (stack if there else zero, row)
            self._valued[steps] = Values(self._views[0], Views(moved)), Views({**moved, **still})
        return self._valued[steps]

    def holds(self, state: State) -> bool:
        """Whether a state's tensors are those of this program."""
        return state.forward_value is self._views[1]

    def state(self, batch: Batch, steps: int) -> State:
        """Views of the tensors, by node name; the next run of this program overwrites them."""
        value, displacement = self._values(steps)
        carried = self._task.clamping.multiplied if self._task.relaxation.multipliers else ()
        places = ((name, *self._memory.rows[name]) for name in carried)
        multiplier = {name: memory.tensor("multiplier")[row] for name, memory, row in places}
        follows = ((name, *self._memory.rows[name]) for name in self._task.following)
        error = {name: memory.tensor("error")[row] for name, memory, row in follows}
        views = self._views[1], self._views[2]
        return State(
            self._task,
            batch.at(max(steps - 1, 0)),
            value,
            *views,
            displacement,
            steps,
            error=error,
            multiplier=multiplier,
        )

    def __str__(self) -> str:
        lines = [
            str(self.groups),
            *self._told_of_playback(),
            *self._told_of_compiled(),
            "start:",
            *self._stacked(),
            *(f"  {each}" for each in self.start),
        ]
        first = 0
        for position, count in self._runs:
            last = first + count - 1
            lines.append(f"step {first}:" if first == last else f"steps {first} to {last}:")
            lines += [f"  {each}" for each in (*self.steps[position][0], *self.steps[position][1])]
            first = last + 1
        if self.end:
            lines += ["end:", *(f"  {each}" for each in self.end)]
        if not self._task.learns_each_step:
            lines += ["learn:", *(f"  {each}" for each in self.learning(len(self.plan.sequence)))]
        return "\n".join(lines)

    def _told_of_playback(self) -> list[str]:
        if not self.playback.asked:
            return []
        why = self.playback.refused
        return [f"CUDA graphs: none, since {why}" if why else "CUDA graphs: played back by the device"]

    def _told_of_compiled(self) -> list[str]:
        if self._uncompiled:
            return [f"compiled: no steps, since {self._uncompiled}"]
        return [f"compiled: {steps}" for steps in self.compiled.values()]

    def _stacked(self) -> list[str]:
        edges = self._memory.edges
        return [
            f"  {Operation('stack weights', stack.bring, e.names)}"
            for e in edges
            for stack in e.weights.stacks.values()
        ]

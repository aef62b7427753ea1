"""A plan compiled into a program: flat lists of operations, in the order in which a run calls them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import chain, groupby, repeat

import attrs
import numpy as np
import torch
from torch import Tensor

from pcsim.engine.batched import errors, messages
from pcsim.engine.batched.compiled import FEWEST, CompiledSteps
from pcsim.engine.batched.edges import Activity, EdgeMemory
from pcsim.engine.batched.gradients import Found, learn
from pcsim.engine.batched.groups import Groups
from pcsim.engine.batched.memory import Memory, Views
from pcsim.engine.batched.nodes import NodeMemory
from pcsim.engine.batched.places import Arena, Operation, named, read, runs_of
from pcsim.engine.batched.playback import GRAPHS, Playback
from pcsim.engine.batched.predict import form, nudge, predict
from pcsim.engine.batched.weights import Stack
from pcsim.engine.planning.liveness import Phase
from pcsim.engine.planning.plan import Plan
from pcsim.engine.planning.wiring import Factors, Mask, Positions, masked
from pcsim.engine.probe import Probed
from pcsim.engine.problem import Batch, Gradients, Record, State, Values, all_finite, free_energies, record
from pcsim.engine.rates import Rates
from pcsim.errors import PCWarning
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
        self._task, self._wiring = plan.task, plan.wiring
        self._memory, self._message_dtype = Memory(plan, groups, arena), message_dtype
        self._direct = direct_moves and self._may_move_directly()
        # Otherwise displacements start at zero, so that they may be read and added to at any time.
        self._writes_first = self._direct and not (self._task.record or self._task.probes)
        self._found = Found()
        self.largest = messages.Largest()
        self.uninterrupted = not self._between_steps
        """Whether nothing happens between two steps."""
        self.start = self._compile_start()
        if self.uninterrupted and self._direct:
            self._let_wait()
        self.steps = [self._compile_step(phase) for phase in plan.phases]
        """What brings predictions up to date, and what follows from them, of each different step."""
        # What a run calls again and again, without looking it up in its operation each time.
        self.calls = [
            ([each.call for each in predictions], [each.call for each in update]) for predictions, update in self.steps
        ]
        self.end: list[Operation] = []
        """What follows the last step where nothing happens between two."""
        if self._memory.waiting.any():
            errors.fade(self._memory, self.end, self._memory.waiting, plan.sent(np.arange(len(self._wiring.nodes))))
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
            warnings.warn(f"compiled: steps are called one by one, since {self._uncompiled}", PCWarning, stacklevel=2)

    def _find_stacks(self) -> None:
        """Stacked weights are known once the operations that read them are."""
        self._stacks = [stack for edge in self._memory.edges for stack in edge.weights.stacks.values()]

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
    def _between_steps(self) -> list[str]:
        """What is done between two steps."""
        relaxation, task = self._task.relaxation, self._task
        kinds = {
            "energies are recorded": task.record,
            "single nodes are recorded": task.probes,
            "frames follow each other": task.streams,
            "the weights learn": task.learns_each_step,
            "a tolerance may stop the relaxation": relaxation.tolerance is not None,
            "a step may be taken back (least_rate)": relaxation.least_rate is not None,
            "noise is drawn (temperature)": relaxation.temperature > 0,
            "multipliers grow": relaxation.multipliers > 0,
        }
        return [kind for kind, there in kinds.items() if there]

    def _uncaptured(self, device: torch.device) -> str:
        """Why a device cannot play back what this program calls; "" where it can."""
        parts: list[EdgeMemory | NodeMemory] = [*self._memory.edges, *self._memory.nodes]
        traced = [part.names[0] for part in parts if part.trace is not None]
        if device.type not in GRAPHS:
            return f"they are for {listed(GRAPHS)}, and the network is on {device.type!r}"
        if self._between_steps:
            return f"something happens between two steps: {', '.join(self._between_steps)}"
        if any(edge.crosses for edge in self._memory.edges):
            return "the network lies on several devices"
        if self._task.fingerprint.stochastic:
            return "a module may draw random numbers"
        return f"autograd computes {listed(traced, 3)}" if traced else ""

    def _compile_further(self, arena: Arena) -> str:
        """Compile steps of which enough that are alike follow each other; why none is, "" where one is."""
        if arena.device.type != "cpu":
            return f"this is for CPUs, and the network is on {arena.device.type!r}"
        if self._between_steps:
            return f"something happens between two steps: {', '.join(self._between_steps)}"
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

    @property
    def _learns_on_the_way(self) -> bool:
        return any(bool(phase.learn.any()) for phase in self.plan.phases)

    # Start

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

    def _compile_start(self) -> list[Operation]:
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
        operations += [Operation("nudge", partial(nudge, memory, node), node.names) for node in self._nudged]
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
        return operations

    def _let_wait(self) -> None:
        """What may wait until all steps are over, and what may be computed of many nodes before they begin."""
        memory, plan = self._memory, self.plan
        memory.waiting = plan.finished
        together = np.zeros_like(memory.waiting)
        for node in memory.nodes:
            alike = memory.waiting[node.group.positions]
            if node.group.by_units and node.chain and alike.sum() > 1:
                together[node.group.positions[alike]] = True
        errors.slope(memory, self.start, together)
        memory.sloped = together

    @property
    def _nudged(self) -> list[NodeMemory]:
        nudged = (node for node in self._memory.nodes if node.group.given and node.node.incoming)
        return list(nudged) if self._task.nudged else []

    # Steps

    def _compile_step(self, phase: Phase) -> tuple[list[Operation], list[Operation]]:
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

    def _fading(self, phase: Phase) -> Mask:
        """Active nodes whose error is what they have received, and moves them in proportion to itself."""
        active = phase.active & ~self._memory.waiting if self._direct else np.zeros_like(phase.active)
        return active & self._wiring.free & self._wiring.proportional & self.plan.received

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
                move = partial(messages.displace, self._memory, node, named(node.names, rows), *parts, self.largest)
                operations.append(Operation("move", move, node.names))
            elif node.partial and not node.group.following:
                operations.append(Operation("clamp", node.clamp, node.names))

    @property
    def _learns_from_sent(self) -> Mask:
        """Nodes whose incoming edges learn, after the relaxation, from the errors that they have sent."""
        return ~np.isnan(self.plan.lasting_errors)

    def closing(self, steps: int) -> list[Operation]:
        """Operations that bring every prediction up to date with the last step."""
        if steps not in self._closing:
            self._closing[steps] = []
            self._memory.compile_after(self.plan.moved(steps))
            unformed = self.plan.unformed(steps)
            form(self._memory, self._closing[steps], unformed)
            predict(self._memory, self._closing[steps], *self.plan.closing(steps), self._memory.activity, unformed)
            self._bring_new_stacks()
        return self._closing[steps]

    def learning(self, steps: int) -> list[Operation]:
        """Operations that compute the learning rule's gradients after so many steps."""
        if steps not in self._learning:
            memory, phase = self._memory, self.plan.learning(steps)
            operations: list[Operation] = []
            memory.compile_after(self.plan.moved(steps))
            activity = self._activity_learned_from
            form(memory, operations, phase.form)
            predict(memory, operations, phase.refresh, phase.predict, activity)
            sent = self.plan.lasting_errors
            been_sent = np.zeros(len(self._wiring.edges), bool)
            for step in self.plan.phases:
                been_sent |= step.message
            traced = (been_sent & ~np.isnan(sent)[self._wiring.target]) | phase.message
            factors = np.where(np.isnan(sent), 1.0, sent)
            anew = phase.active & np.isnan(sent)
            self._learn(operations, phase, anew, activity, factors, traced)
            self._learning[steps] = operations
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
            for node in self._nudged:
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

    @property
    def _activity_learned_from(self) -> Activity:
        return "forward" if self._task.reads_forward else "present"

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
        if self._activity_learned_from != "forward":
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
        activity = self._activity_learned_from
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

"""The simulator: binds a network to the rules that move it and the engine that computes them."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import ClassVar
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from pcsim import clamps as given
from pcsim.clamps import Clamps, Recorded
from pcsim.collecting import uncollected
from pcsim.dynamics.inference import Relaxation, check_delay
from pcsim.dynamics.learning import LearningRule, SettledUpdate
from pcsim.dynamics.nudging import Nudge
from pcsim.dynamics.precision import Constant
from pcsim.engine.batched.engine import BatchedEngine
from pcsim.engine.batched.program import Program
from pcsim.engine.engine import Engine
from pcsim.engine.landscape import Landscape
from pcsim.engine.local_rules import divergence, finite, start
from pcsim.engine.planning.plan import Plan
from pcsim.engine.problem import Batch, Clamp, Gradients, State, Task, all_finite
from pcsim.engine.reading import Reading
from pcsim.engine.reference import ReferenceEngine
from pcsim.errors import DivergenceError, EnergyWarning, SettingError, StateError
from pcsim.graph import checks
from pcsim.graph.clamping import Clamping
from pcsim.graph.fingerprint import Fingerprint
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.graph.probing import in_mode
from pcsim.graph.statistics import buffers_put_back, frozen_statistics
from pcsim.messages import instead_of, is_number, listed
from pcsim.trace import Trace

_hooks, _later_hooks = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")
ByNode = Mapping[str | Node, Tensor]
"""A tensor for each of some nodes, by node or name."""
ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (BatchedEngine, ReferenceEngine)}


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """What is made in it could never learn again, and programs are kept."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class Simulator:
    """Clamps, relaxes, learns and predicts on one network.

    Runs on one network take turns, whichever simulator or thread they are from.

    Args:
        network: the graph to simulate.
        relaxation: how the free nodes move.
        rule: how the weights learn.
        nudging: how targets draw only a little: :class:`Nudging` or :class:`SoftNudging`; None clamps them in full.
        engine: "batched" (planned and stacked), "reference" (slow and obviously right), or what makes an
            :class:`Engine` for a network.

    Raises:
        SettingError: an argument is of another kind, the engine is unknown, or the rule cannot be combined with
            centred nudging.
    """

    _locks: ClassVar[WeakKeyDictionary[Network, threading.RLock]] = WeakKeyDictionary()

    def __init__(
        self,
        network: Network,
        relaxation: Relaxation | None = None,
        rule: LearningRule | None = None,
        *,
        nudging: Nudge | None = None,
        engine: str | Callable[[Network], Engine] = "batched",
    ) -> None:
        self.network = network
        self.relaxation = Relaxation() if relaxation is None else relaxation
        self.rule = SettledUpdate() if rule is None else rule
        self.nudging = nudging
        for name, kind in (("network", Network), ("relaxation", Relaxation), ("rule", LearningRule)):
            _check_kind(name, getattr(self, name), kind)
        if nudging is not None:
            _check_kind("nudging", nudging, Nudge)
            nudging.check_rule(self.rule)
        if not callable(engine) and engine not in ENGINES:
            raise SettingError(f"engine {engine!r} is unknown; choose one of {', '.join(map(repr, ENGINES))}")
        self.engine = (ENGINES[engine] if isinstance(engine, str) else engine)(network)
        _check_kind("engine", self.engine, Engine)
        self.checks_late = True
        """On a device, look once a batch whether values are finite, also where the weights learn at every step."""
        self._forget()

    def _forget(self) -> None:
        self._state: State | None = None
        self._clampings: dict[tuple[object, ...], Clamping] = {}
        self._checked: set[tuple[object, ...]] = set()
        self._optimizer: tuple[weakref.ref[Optimizer], object] | None = None
        self._learning = WeakIdKeyDictionary()
        self._single: Fingerprint | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without the latest run, so that a copy starts afresh."""
        latest = ("_state", "_clampings", "_checked", "_optimizer", "_learning", "_single")
        return {name: value for name, value in self.__dict__.items() if name not in latest}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One run at a time on a network: runs change its modules' modes and set its statistics aside."""
        with self._locks.setdefault(self.network, threading.RLock()), _outside_inference_mode():
            if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                raise SettingError(
                    "torch.autocast is on around this call: errors are small differences, which half precision would "
                    "drown; leave it off here (BatchedEngine(message_dtype=...) rounds messages alone)"
                )
            yield

    # Running

    def infer(
        self,
        clamps: Clamps,
        *,
        record: Recorded = False,
        init: ByNode | None = None,
        precision: ByNode | None = None,
        batch: int | None = None,
    ) -> Trace:
        """Relax the free nodes; afterwards each node and edge shows its state.

        Args:
            clamps: what is given.
            record: what of every step the trace keeps: True for every node's energy; nodes, their names or
                :class:`Probe` for their values, predictions and errors; or a list of these.
            init: where free nodes start, by node or name, (batch, *shape), instead of where the forward pass, or
                ``start="previous"``, puts them.
            precision: what nodes' own precisions are in this run, trial by trial: (batch,) or (batch, *shape), by node
                or name. The weights learn with precision left out (SPEC §4), except by the incremental rule.
            batch: number of samples where nothing is clamped, ``infer({}, batch=n)``: with a temperature these come to
                follow the model's own distribution, e^(−F/temperature), every root of which needs a prior.

        Raises:
            ClampError: a clamp does not fit.
            GraphError: the network is not complete.
            SettingError: the relaxation is too short for its schedule, or autocast is on.
            DivergenceError: a latent became NaN or infinite; the last good state stays.
        """
        with self._turn():
            problem = self._problem(clamps, record, init=init, precision=precision, size=batch)
            return self._finish(self._relax(*problem))

    def equilibrium(
        self,
        clamps: Clamps,
        *,
        tolerance: float | None = None,
        init: ByNode | None = None,
        precision: ByNode | None = None,
    ) -> Trace:
        """Put the free nodes where the energy rests; afterwards each node and edge shows that state.

        Of a linear Gaussian network this is the exact rest, by conjugate gradients; of any other a stationary point
        by L-BFGS and Newton's method, from the values of the forward pass or ``init``. Precision is that of a constant
        schedule, 1 where the relaxation has another. Not local: it is where a relaxation of many steps would end.

        Args:
            clamps: what is given.
            tolerance: the largest derivative of F by a free unit, > 0; by default 1e-10 in float64 and 1e-4 in float32.
            init: where to start, as of :meth:`infer`.
            precision: trial by trial, as of :meth:`infer`.

        Raises:
            ConvergenceError: no such place was found.
            SettingError: the relaxation holds predictions, or the tolerance is not positive.
            PCError: as :meth:`infer`.
        """
        if tolerance is not None and not (is_number(tolerance) and tolerance > 0):
            raise SettingError(f"equilibrium: tolerance {tolerance!r} given, expected a positive number")
        if self.relaxation.hold_predictions:
            raise SettingError("equilibrium: predictions are held (hold_predictions=True), which has no energy to rest")
        with self._turn():
            task, batch = self._problem(clamps, False, init=init, precision=precision, resting=True)
            with torch.no_grad(), frozen_statistics(task.fingerprint.normalising):
                landscape = Landscape(start(task, batch))
            if tolerance is None:
                tolerance = 1e-10 if batch.dtype == torch.float64 else 1e-4
            units = torch.as_tensor(landscape.rest(tolerance), dtype=batch.dtype, device=batch.device)
            there = {name: value.detach() for name, value in landscape.values(units).items()}
            clamping = self._clamping(dict(batch.clamps), False, frozenset(there))
            return self._finish(self._relax(attrs.evolve(task, clamping=clamping), attrs.evolve(batch, start=there)))

    def learn(self, optimizer: Optimizer) -> None:
        """One local weight update from the relaxed state: fill ``.grad`` anew and step the optimizer.

        Raises:
            SettingError: the optimizer is none, needs a closure, or holds no parameter of the network.
            StateError: nothing was inferred, nothing can be learned from it, or the rule learns during inference.
        """
        with self._turn():
            self._check_optimizer(optimizer, self.network.fingerprint())
            self._fill_gradients(self._require_learnable())
            optimizer.step()

    def compute_gradients(self, *, accumulate: bool = False) -> None:
        """Fill ``.grad`` of the network's parameters by the learning rule, divided by the batch size (SPEC §4).

        As after ``zero_grad(set_to_none=True)`` and ``backward()``: the gradients are fresh tensors, a parameter that
        no error has reached has None, and hooks of parameters are called.

        Args:
            accumulate: add to the gradients that are there, in place, as ``backward()`` alone does.

        Raises:
            StateError: as :meth:`learn`.
        """
        with self._turn():
            self._fill_gradients(self._require_learnable(), accumulate)

    def gradients(self) -> Gradients:
        """The same gradients by parameter, in tensors of the caller's own; ``.grad`` and running statistics stay.

        Raises:
            StateError: as :meth:`learn`.
        """
        with self._turn():
            return self._gradients(self._require_learnable())

    def _require_learnable(self) -> State:
        state = self._require("learning")
        if self.rule.every_step:
            raise StateError(
                f"{type(self.rule).__name__} learns at every inference step, so it cannot learn after them; call "
                "update(clamps, optimizer) in place of infer and learn"
            )
        if state.task.rule != self.rule:
            raise StateError(f"the rule is {type(self.rule).__name__} since the network was relaxed; infer again")
        self._require_target(state.task, state.batch)
        if not state.task.fingerprint.consists_of_the_same():
            raise StateError("the network or a part of it was changed after it was relaxed; infer again")
        state.altered = not state.task.fingerprint.holds()
        return state

    def _fill_gradients(self, state: State, accumulate: bool = False) -> None:
        gradients, parameters = self._gradients(state), state.task.fingerprint.parameters
        hooked = any(map(_hooks, parameters)) or any(map(_later_hooks, parameters))
        if not (hooked or accumulate):  # a thousand layers have thousands of parameters
            for parameter, found in zip(parameters, map(gradients.get, parameters), strict=True):
                parameter.grad = found
            self._count(state)
            return
        for parameter in parameters:
            gradient = gradients.get(parameter)
            if gradient is not None and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
                if not accumulate:
                    parameter.grad = None
                with torch.enable_grad():  # autograd itself calls them as they are to be called
                    torch.autograd.backward(parameter.view_as(parameter), gradient)
            elif not accumulate or parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                parameter.grad.add_(gradient)
        self._count(state)

    def _gradients(self, state: State) -> Gradients:
        """Gradients of the learning rule; with nudging, scaled or averaged as it says."""
        gradients, nudging = self.engine.gradients(state), self.nudging
        if nudging is None or (nudging.factor == 1 and not nudging.centred):
            return gradients
        scaled = {parameter: nudging.factor * gradient for parameter, gradient in gradients.items()}
        if nudging.centred:
            opposite = nudging.opposite()
            task = attrs.evolve(state.task.unwatched, target_weight=opposite.weight)
            other = self.engine.relax(task, attrs.evolve(state.batch, nudge=opposite.place, unread=None))
            for parameter, gradient in self.engine.gradients(other).items():
                scaled[parameter] = scaled.get(parameter, 0.0) - nudging.factor * gradient
        return scaled

    def update(
        self, clamps: Clamps, optimizer: Optimizer, *, record: Recorded = False, precision: ByNode | None = None
    ) -> Trace:
        """Infer and learn on one batch; with the incremental rule, one optimizer step after every inference step.

        Args:
            clamps: what is given.
            optimizer: any ``torch.optim`` optimizer of the network's parameters.
            record: what of every step the trace keeps, as of :meth:`infer`.
            precision: trial by trial, as of :meth:`infer`.

        Raises:
            PCError: as :meth:`infer` and :meth:`learn`; weights and optimizer stay as they were.
        """
        with self._turn():
            task, batch = self._problem(clamps, record, precision=precision, updating=True)
            self._require_target(task, batch)
            self._check_optimizer(optimizer, task.fingerprint)
            if not self.rule.every_step:
                state = self._relax(task, batch)
                trace = self._finish(state)
                self._fill_gradients(state)
                optimizer.step()
                return trace
            try:
                state = self._learn_each_step(task, batch, optimizer)
            except DivergenceError:
                if not batch.late:
                    raise
                # Once more, looking at every step, for the node and the step at which it was lost.
                state = self._learn_each_step(task, attrs.evolve(batch, late=False), optimizer)
            return self._finish(state)

    def _learn_each_step(self, task: Task, batch: Batch, optimizer: Optimizer) -> State:
        """Relax and learn at once; where it fails, weights and optimizer are put back."""

        def learn(gradients: Gradients) -> None:
            factor = 1.0 if self.nudging is None else self.nudging.factor
            for parameter in task.fingerprint.parameters:
                gradient = gradients.get(parameter)
                parameter.grad = gradient if gradient is None or factor == 1 else factor * gradient
            optimizer.step()

        weights = [parameter.detach().clone() for parameter in self.network.parameters()]
        moments = copy.deepcopy(optimizer.state_dict())
        try:
            state = self._checked_outputs(self.engine.relax(task, batch, learn))
            self._count(state)
            return state
        except BaseException:
            with torch.no_grad():
                for parameter, before in zip(self.network.parameters(), weights, strict=True):
                    parameter.copy_(before)
            optimizer.load_state_dict(moments)
            raise

    def _relax(self, task: Task, batch: Batch) -> State:
        return self._checked_outputs(self.engine.relax(task, batch))

    @staticmethod
    def _checked_outputs(state: State) -> State:
        """Where no latent moves, the engine has none to look at, and the targets' predictions are what may be lost."""
        task = state.task
        if not task.clamping.free:
            predicted = {name: state.forward_prediction[name] for name in task.clamping.targets}
            if not all_finite([torch.linalg.vector_norm(value) for value in predicted.values()], state.batch.unread):
                raise divergence(task, next(name for name, value in predicted.items() if not finite(value)), None)
        return state

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer by which the network would not learn, as :meth:`update` does, before anything else.

        Raises:
            SettingError: it is none, needs a closure, holds no parameter of the network, or some that were replaced.
            GraphError: the network is not complete.
        """
        with self._turn():
            self._check_optimizer(optimizer, self.network.fingerprint())

    def _check_optimizer(self, optimizer: Optimizer, fingerprint: Fingerprint) -> None:
        """Refuse an optimizer that holds none of the parameters, or some that the network had and has no more."""
        if self._optimizer is not None and self._optimizer[0]() is optimizer and self._optimizer[1] is fingerprint:
            return
        _check_kind("optimizer", optimizer, Optimizer)
        if isinstance(optimizer, LBFGS):
            raise SettingError(
                "optimizer: LBFGS given, which evaluates a loss several times per step, and a local rule has none; "
                "give one that steps from gradients, such as SGD or AdamW"
            )
        own = {id(parameter) for parameter in fingerprint.parameters}
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        mend = "make it of network.parameters()"
        if own and not any(id(parameter) in own for parameter in held):
            raise SettingError(
                f"optimizer: {type(optimizer).__name__} holds no parameter of this network, so nothing would "
                f"learn; {mend}"
            )
        gone = [parameter for parameter in held if id(parameter) not in own and parameter in self._learning]
        if gone:
            raise SettingError(
                f"optimizer: {type(optimizer).__name__} holds {len(gone)} parameters that this network had and that "
                f"have been replaced since, so they would no longer learn; {mend} again"
            )
        self._learning.update({parameter: True for parameter in held if id(parameter) in own})
        self._optimizer = weakref.ref(optimizer), fingerprint

    def _count(self, state: State) -> None:
        """Let what is kept of each batch take it in, once and as a whole (arXiv 2506.23800, Eq. 6)."""
        fingerprint = state.task.fingerprint
        if state.counted or not fingerprint.counts:
            return
        moving = (module for part in fingerprint.moving for module in part.modules())
        with buffers_put_back([*fingerprint.normalising, *moving]):
            self.engine.update_statistics(state)
        state.counted = True

    def predict(self, clamps: Clamps, *, precision: ByNode | None = None) -> dict[str, Tensor]:
        """Values of all nodes, given some (SPEC §2, Test); the state that nodes and edges show stays as it is.

        One forward pass where that is exact (no cycle, no clamped node with incoming edges, no free root without a
        prior), in evaluation mode. Otherwise a relaxation with constant precision, since no error arrives from a
        target.

        Args:
            clamps: what is given.
            precision: trial by trial, as of :meth:`infer`.

        Raises:
            PCError: as :meth:`infer`.

        Returns:
            Value by node name, (batch, *shape), in tensors of the caller's own.
        """
        with self._turn(), in_mode(self.network, training=False):
            task, batch = self._problem(clamps, record=False, precision=precision, predicting=True)
            if task.clamping.feedforward:
                return self.engine.predict(task, batch)
            reading = Reading(self.engine.relax(task, batch))
            return {name: reading.value(node) for name, node in self.network.nodes.items()}

    def forget(self) -> None:
        """Let go of the last run: with ``start="previous"`` the next one begins afresh, as a new trial does."""
        with self._turn():
            self._state = self.engine.shown = None
            self.network.reader = None

    def energy(self) -> dict[str, Tensor]:
        """E_n before precision of every node with an energy, (batch,), at the present values and weights."""
        state = self._require("reading energies")
        reading = Reading(state)
        return {name: reading.energy(self.network.nodes[name]) for name in state.task.clamping.energetic}

    @property
    def plan(self) -> Plan:
        """What the last batch's relaxation computed at which step; print it to read it."""
        return self.engine.plan(self._require("a plan"))

    @property
    def program(self) -> Program:
        """The operations by which the last batch was computed; print it to read them."""
        return self.engine.program(self._require("a program"))

    # What a run is given

    @uncollected()
    def _problem(
        self,
        clamps: Clamps,
        record: Recorded,
        *,
        predicting: bool = False,
        updating: bool = False,
        init: ByNode | None = None,
        precision: ByNode | None = None,
        resting: bool = False,
        size: int | None = None,
    ) -> tuple[Task, Batch]:
        energies, probes = given.read_record(self.network, record)
        fingerprint = self.network.fingerprint()
        steps = self._unchanging(predicting, resting) or self.relaxation.steps
        fits, first, unread = given.read(self.network, clamps, fingerprint, steps, size)
        streams = tuple((name, clamp.every) for name, clamp in fits.items() if clamp.frames is not None)
        if len(first) == 1 and not predicting and self._single is not fingerprint:
            checks.single_sample(self.network)
            self._single = fingerprint
        if self.network.constants:
            fits = given.with_constants(self.network, fits, first)
        begun = {} if predicting else self._carried(fits, first)
        if init is not None:
            placed, unread = given.read_start(self.network, init, fits, first, unread)
            begun |= placed
        weighed = dict[str, Tensor]()
        if precision is not None:
            weighed, unread = given.read_precision(self.network, precision, first, unread)
        if unread is not None and (predicting or resting or not self.engine.reads_late):
            all_finite((), unread)
            unread = None
        clamping = self._clamping(fits, predicting, frozenset(begun))
        relaxation = self.relaxation
        if predicting:
            steps = 0 if clamping.feedforward else relaxation.steps
            relaxation = attrs.evolve(relaxation, precision=Constant(), steps=steps, temperature=0.0, multipliers=0.0)
        elif self.rule.backprop:
            relaxation = attrs.evolve(relaxation, steps=0)
        elif resting:
            constant = isinstance(relaxation.precision, Constant)
            relaxation = attrs.evolve(relaxation, steps=0, precision=relaxation.precision if constant else Constant())
        nudging = None if predicting else self.nudging
        place, weight = (1.0, 1.0) if nudging is None else (nudging.place, nudging.weight)
        # At an equilibrium nothing arrives, so that the arrival rule has nothing to refuse there, or to learn.
        rule = SettledUpdate() if predicting or (resting and self.rule.at_arrival) else self.rule
        each_step = rule.every_step and updating
        task = Task(
            clamping,
            fingerprint,
            relaxation,
            rule,
            each_step,
            energies,
            place != 1,
            weight,
            probes,
            streams,
            frozenset(weighed),
        )
        relaxation.check(clamping)
        if not predicting:
            self._check_task(task)
        draws = (fingerprint.stochastic and not predicting) or relaxation.temperature > 0
        seed = int(torch.randint(2**31, ()).item()) if draws else 0
        begun = {name: value for name, value in begun.items() if name in clamping.placed}
        late = self.checks_late and not all(map(given.reads_freely, fingerprint.devices(first.device)))
        return task, Batch(fits, len(first), first.dtype, first.device, seed, place, begun, unread, late, weighed)

    def _unchanging(self, predicting: bool, resting: bool) -> str:
        """Why no clamp can change within a run; empty where one can."""
        if predicting:
            return "predict takes no time"
        if resting:
            return "an equilibrium is that of one clamp"
        if self.rule.backprop:
            return "backprop takes no inference step"
        if self.relaxation.hold_predictions:
            return "predictions are held (hold_predictions=True), so that nothing would follow from it"
        if self.relaxation.least_rate is not None:
            return "with least_rate= a step that raises the energy is taken back, and a new frame may raise it"
        return ""

    def _carried(self, fits: Mapping[str, Clamp], first: Tensor) -> dict[str, Tensor]:
        """Values of the last run that ``start="previous"`` begins with: of nodes and a batch of the same size."""
        if self.relaxation.start != "previous" or self._state is None or self.rule.backprop:
            return {}
        last = self._state.value
        full = {name for name, clamp in fits.items() if clamp.mask is None}
        found = {}
        for name, node in self.network.nodes.items():
            if name in last and name not in full and not node.deterministic:
                before = last[name]
                if before.shape == (len(first), *node.shape):
                    found[name] = before.to(node.device or first.device, first.dtype, copy=True)
        return found

    def _check_task(self, task: Task) -> None:
        combined = task, self.nudging
        if combined in self._checked:
            return
        if self.nudging is not None:
            self.nudging.check_rule(self.rule)
            self.nudging.check(task.clamping)
        if task.clamping.drifting:
            warnings.warn(
                f"free nodes ({listed(task.clamping.drifting, 6)}) have an energy without a minimum in the value, such "
                "as the cross-entropy, so that they drift; clamp them, or give them another energy",
                EnergyWarning,
                stacklevel=5,
            )
        arrivals = task.arrivals
        task.rule.check(task.relaxation, arrivals)
        if not task.rule.backprop:
            task.relaxation.precision.check(arrivals, task.relaxation.steps)
            if not task.relaxation.relaxes_errors:
                check_delay(self.network, task.relaxation)
        self._checked.add(combined)

    def _clamping(self, fits: dict[str, Clamp], predicting: bool, carried: frozenset[str]) -> Clamping:
        full = frozenset(name for name, clamp in fits.items() if clamp.mask is None)
        partial = frozenset(fits) - full
        backprop = self.rule.backprop and not predicting
        key = (self.network.revision, full, partial, backprop, predicting, carried)
        if key not in self._clampings:
            clamping = Clamping(self.network, full, partial, backprop, predicting, carried)
            _ = clamping.order  # refuses cycles that have no value to start from
            self._clampings = {k: c for k, c in self._clampings.items() if k[0] == self.network.revision}
            self._checked.clear()
            self._clampings[key] = clamping
        return self._clampings[key]

    def _require_target(self, task: Task, batch: Batch) -> None:
        if batch.clamps.keys().isdisjoint(task.clamping.energetic):
            raise StateError(
                "nothing to learn: no clamped node has an incoming edge or a prior (clamped: "
                f"{', '.join(batch.clamps)}); clamp a target as well"
            )

    # What a run leaves

    def _finish(self, state: State) -> Trace:
        self._state = self.engine.shown = state
        self.network.reader = Reading(state)
        names = state.task.clamping.energetic
        recorded = (state.energies, state.error_norms, state.free_energies)
        return Trace(state.steps, names, state.task.clamping.levels, *recorded, state.recordings)

    def _require(self, purpose: str) -> State:
        if self._state is None:
            raise StateError(f"{purpose} needs a relaxed state: call infer first")
        return self._state


def _check_kind(argument: str, thing: object, kind: type) -> None:
    if not isinstance(thing, kind):
        shown = thing.__name__ if isinstance(thing, type) else type(thing).__name__
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        mend = instead_of(thing, kind, f"pass {article} {kind.__name__}")
        raise SettingError(f"{argument}: {shown} given, expected an instance of {kind.__name__}; {mend}")

"""The simulator: binds a network to the rules that move it and the engine that computes them."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import attrs
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from pcsim.dynamics.inference import Relaxation, check_delay
from pcsim.dynamics.learning import LearningRule, SettledUpdate
from pcsim.dynamics.nudging import Nudging
from pcsim.dynamics.precision import Constant
from pcsim.engine.batched import BatchedEngine
from pcsim.engine.engine import Clamp, Engine, Gradients, Problem, State, divergence
from pcsim.engine.plan import Plan
from pcsim.engine.reading import Reading
from pcsim.engine.reference import ReferenceEngine
from pcsim.errors import ClampError, SettingError, StateError
from pcsim.graph.clamping import Clamping
from pcsim.graph.network import Network, listed
from pcsim.graph.node import Node, instead_of
from pcsim.trace import Trace

Given = Tensor | tuple[Tensor, Tensor]
Clamps = Mapping[str, Given] | Mapping[Node, Given] | Mapping[str | Node, Given]
"""What is given, by node or its name: (batch, *shape), or a pair of that and a boolean mask of the given units."""

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

    Args:
        network: the graph to simulate.
        relaxation: how the free nodes move.
        rule: how the weights learn.
        nudging: clamp targets only a little of the way to what is given; None clamps them there.
        engine: "batched" (planned and stacked), "reference" (slow and obviously right), or what makes an
            :class:`Engine` for a network.

    Raises:
        SettingError: an argument is of another kind, the engine is unknown, or the rule cannot be combined with
            centred nudging.
    """

    def __init__(
        self,
        network: Network,
        relaxation: Relaxation | None = None,
        rule: LearningRule | None = None,
        *,
        nudging: Nudging | None = None,
        engine: str | Callable[[Network], Engine] = "batched",
    ) -> None:
        self.network = network
        self.relaxation = Relaxation() if relaxation is None else relaxation
        self.rule = SettledUpdate() if rule is None else rule
        self.nudging = nudging
        for name, kind in (("network", Network), ("relaxation", Relaxation), ("rule", LearningRule)):
            _check_kind(name, getattr(self, name), kind)
        if nudging is not None:
            _check_kind("nudging", nudging, Nudging)
            nudging.check_rule(self.rule)
        if not callable(engine) and engine not in ENGINES:
            raise SettingError(f"engine {engine!r} is unknown; choose one of {', '.join(map(repr, ENGINES))}")
        self.engine = (ENGINES[engine] if isinstance(engine, str) else engine)(network)
        self._state: State | None = None
        self._clampings: dict[tuple[object, ...], Clamping] = {}
        self._checked: set[tuple[object, ...]] = set()
        self._optimizer: weakref.ref[Optimizer] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without the latest run, so that a copy starts afresh."""
        return {**self.__dict__, "_state": None, "_clampings": {}, "_checked": set(), "_optimizer": None}

    # Running

    @_outside_inference_mode()
    def infer(self, clamps: Clamps, *, record: bool = False) -> Trace:
        """Relax the free nodes; afterwards each node and edge shows its state.

        Args:
            clamps: what is given.
            record: keep every node's energy at every step in the trace.

        Raises:
            ClampError: a clamp does not fit.
            GraphError: the network is not complete.
            SettingError: the relaxation is too short for its schedule.
            DivergenceError: a latent became NaN or infinite; the last good state stays.
        """
        return self._finish(self._relax(self._problem(clamps, record)))

    def learn(self, optimizer: Optimizer) -> None:
        """One local weight update from the relaxed state: fill ``.grad`` and step the optimizer.

        Raises:
            SettingError: the optimizer is none, needs a closure, or holds no parameter of the network.
            StateError: nothing was inferred, nothing can be learned from it, or the rule learns during inference.
        """
        self._check_optimizer(optimizer)
        self.compute_gradients()
        optimizer.step()

    @_outside_inference_mode()
    def compute_gradients(self, *, accumulate: bool = False) -> None:
        """Fill ``.grad`` of the network's parameters by the learning rule, divided by the batch size (SPEC §4).

        A parameter that no error has reached gets None, and optimizers leave it alone.

        Args:
            accumulate: add to the gradients that are there instead of replacing them.

        Raises:
            StateError: as :meth:`learn`.
        """
        self._fill_gradients(self._require_learnable(), accumulate)

    @_outside_inference_mode()
    def gradients(self) -> Gradients:
        """The same gradients by parameter; ``.grad`` and running statistics stay, and the next run overwrites them.

        Raises:
            StateError: as :meth:`learn`.
        """
        state = self._require_learnable()
        for parameter in state.problem.snapshot.parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()  # it may be the very tensor that the engine is about to write
        return self._gradients(state)

    def _require_learnable(self) -> State:
        state = self._require("learning")
        if self.rule.every_step:
            raise StateError(
                f"{type(self.rule).__name__} learns at every inference step, so it cannot learn after them; call "
                "update(clamps, optimizer) in place of infer and learn"
            )
        if state.problem.rule != self.rule:
            raise StateError(f"the rule is {type(self.rule).__name__} since the network was relaxed; infer again")
        self._require_target(state.problem)
        if self.network.snapshot() is not state.problem.snapshot:
            raise StateError("the network or a part of it was changed after it was relaxed; infer again")
        return state

    def _fill_gradients(self, state: State, accumulate: bool = False) -> None:
        parameters = state.problem.snapshot.parameters
        # Copied first: what .grad holds may be the very tensors that the engine is about to write.
        before = [None if p.grad is None else p.grad.clone() for p in parameters] if accumulate else []
        gradients = self._gradients(state)
        if len(gradients) < len(parameters):
            for parameter in parameters:
                parameter.grad = None
        for parameter, gradient in gradients.items():
            if parameter.grad is not gradient:  # looking costs less than setting, which checks what it is given
                parameter.grad = gradient
        for parameter, held in zip(parameters, before, strict=False):
            if held is not None:
                parameter.grad = held if parameter.grad is None else held.add_(parameter.grad)
        self._count(state)

    def _gradients(self, state: State) -> Gradients:
        """Gradients of the learning rule; with nudging, of the sign or the average that it asks for."""
        gradients, nudging = self.engine.gradients(state), self.nudging
        if nudging is None or (nudging.beta > 0 and not nudging.centred):
            return gradients
        if not nudging.centred:
            return {parameter: gradient.neg() for parameter, gradient in gradients.items()}
        first = {parameter: 0.5 * gradient for parameter, gradient in gradients.items()}
        other = self.engine.relax(attrs.evolve(state.problem, nudge=-nudging.beta, record=False), state)
        for parameter, gradient in self.engine.gradients(other).items():
            first[parameter] = first.get(parameter, 0.0) - 0.5 * gradient
        return first

    @_outside_inference_mode()
    def update(self, clamps: Clamps, optimizer: Optimizer, *, record: bool = False) -> Trace:
        """Infer and learn on one batch; with the incremental rule, one optimizer step after every inference step.

        Args:
            clamps: what is given.
            optimizer: any ``torch.optim`` optimizer of the network's parameters.
            record: keep every node's energy at every step in the trace.

        Raises:
            PCError: as :meth:`infer` and :meth:`learn`; weights and optimizer stay as they were.
        """
        problem = self._problem(clamps, record)
        self._require_target(problem)
        self._check_optimizer(optimizer)
        if not self.rule.every_step:
            state = self._relax(problem)
            trace = self._finish(state)
            self._fill_gradients(state)
            optimizer.step()
            return trace

        def learn(gradients: Gradients) -> None:
            sign = 1 if self.nudging is None else self.nudging.sign
            for parameter in problem.snapshot.parameters:
                gradient = gradients.get(parameter)
                parameter.grad = gradient if gradient is None or sign == 1 else gradient.neg()
            optimizer.step()

        weights = [parameter.detach().clone() for parameter in self.network.parameters()]
        moments = copy.deepcopy(optimizer.state_dict())
        try:
            state = self.engine.relax(problem, self._state, learn)
        except BaseException:
            with torch.no_grad():
                for parameter, before in zip(self.network.parameters(), weights, strict=True):
                    parameter.copy_(before)
            optimizer.load_state_dict(moments)
            raise
        self._count(state)
        return self._finish(state)

    def _relax(self, problem: Problem) -> State:
        state = self.engine.relax(problem, self._state)
        if not problem.clamping.free:  # no latent moves, so that the engine has none to look at
            for name in problem.clamping.targets:
                if not bool(torch.isfinite(torch.linalg.vector_norm(state.forward_prediction[name]))):
                    raise divergence(problem, name, None)
        return state

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        if self._optimizer is not None and self._optimizer() is optimizer:
            return
        _check_kind("optimizer", optimizer, Optimizer)
        if isinstance(optimizer, LBFGS):
            raise SettingError(
                "optimizer: LBFGS given, which evaluates a loss several times per step, and a local rule has none; "
                "give one that steps from gradients, such as SGD or AdamW"
            )
        own = {id(parameter) for parameter in self.network.parameters()}
        if own and not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise SettingError(
                f"optimizer: {type(optimizer).__name__} holds no parameter of this network, so nothing would learn; "
                "make it of network.parameters()"
            )
        self._optimizer = weakref.ref(optimizer)

    def _count(self, state: State) -> None:
        """Update the running statistics, once per batch (arXiv 2506.23800, Eq. 6)."""
        if state.problem.snapshot.normalising and not state.counted:
            self.engine.update_statistics(state)
            state.counted = True

    @_outside_inference_mode()
    def predict(self, clamps: Clamps) -> dict[str, Tensor]:
        """Values of all nodes, given some (SPEC §2, Test); the state that nodes and edges show stays as it is.

        One forward pass where that is exact (no cycle, no clamped node with incoming edges, no free root without a
        prior), in evaluation mode. Otherwise a relaxation with constant precision, since no error arrives from a
        target.

        Raises:
            PCError: as :meth:`infer`.

        Returns:
            Value by node name, (batch, *shape); images may be laid out channels last, which is faster.
        """
        training = {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            problem = self._problem(clamps, record=False, predicting=True)
            if problem.clamping.feedforward:
                return self.engine.forward(problem).value
            reading = Reading(self.engine.relax(problem))
            return {name: reading.value(node).clone() for name, node in self.network.nodes.items()}
        finally:
            for module, mode in training.items():
                module.training = mode

    def energy(self) -> dict[str, Tensor]:
        """E_n before precision of every node with an energy, (batch,), at the present values and weights."""
        state = self._require("reading energies")
        reading = Reading(state)
        return {name: reading.energy(self.network.nodes[name]) for name in state.problem.clamping.energetic}

    @property
    def plan(self) -> Plan:
        """What the last batch's relaxation computed at which step; print it to read it."""
        return Plan(self._require("a plan").problem, teaching=self.rule.every_step)

    # What a run is given

    def _problem(self, clamps: Clamps, record: bool, predicting: bool = False) -> Problem:
        named = self._by_name(clamps)
        values = (given[0] if isinstance(given, tuple) else given for given in named.values())
        some = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
        snapshot = self.network.snapshot()
        options = snapshot.tensor_options or self.network.tensor_options(otherwise=some)
        fits = {name: self._clamp(name, given, *options) for name, given in named.items()}
        if not fits:
            raise ClampError("nothing is clamped, so the batch size is unknown; clamp at least one node")
        sizes = {name: len(clamp.value) for name, clamp in fits.items()}
        batch = next(iter(sizes.values()))
        for name, size in sizes.items():
            if size != batch:
                raise ClampError(
                    f"clamp {name!r}: batch of {size} given, but {next(iter(sizes))!r} has {batch}; clamp all nodes "
                    "with the same number of samples"
                )
        if batch == 1 and snapshot.normalising:
            self._check_single()
        clamping = self._clamping(fits, predicting)
        relaxation = self.relaxation
        if predicting:
            relaxation = attrs.evolve(relaxation, precision=Constant())
        elif self.rule.backprop:
            relaxation = attrs.evolve(relaxation, steps=0)
        nudge = 1.0 if self.nudging is None or predicting else self.nudging.beta
        seed = int(torch.randint(2**31, ()).item()) if clamping.stochastic and not predicting else 0
        problem = Problem(clamping, fits, relaxation, self.rule, batch, *options, snapshot, seed, record, nudge)
        combined = clamping, relaxation, self.nudging, self.rule.every_step
        if combined not in self._checked and not predicting:
            if self.nudging is not None:
                self.nudging.check_rule(self.rule)
                self.nudging.check(clamping)
            if not self.rule.backprop:
                relaxation.precision.check(problem.arrivals, relaxation.steps)
                check_delay(self.network, relaxation)
            self._checked.add(combined)
        return problem

    def _check_single(self) -> None:
        """Refuse one sample where a module takes the mean and spread of the batch."""
        edges = ((f"edge {name!r}", edge, edge.contribution_shape) for name, edge in self.network.edges.items())
        nodes = ((f"node {name!r}", node, node.shape) for name, node in self.network.nodes.items())
        for place, part, shape in chain(edges, nodes):
            if len(shape) == 1 and any(isinstance(m, nn.BatchNorm1d) and m.training for m in part.modules()):
                raise ClampError(
                    f"a batch of one sample given, but {place} normalises over the batch, which takes two; leave out a "
                    "last batch of one (DataLoader(drop_last=True)), or call network.eval()"
                )

    def _by_name(self, clamps: Clamps) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        if not isinstance(clamps, Mapping) or not all(isinstance(node, str | Node) for node in clamps):
            raise ClampError(
                f"clamps: {type(clamps).__name__} given, expected a dictionary from nodes or their names to tensors, "
                "such as {'input': images, 'output': targets}"
            )
        named = {}
        for node, given in clamps.items():
            name = node if isinstance(node, str) else node.name
            if not isinstance(node, str) and node not in self.network:
                raise ClampError(f"clamp {name!r}: that node belongs to another network; pass this one's, or its name")
            if name in named:
                raise ClampError(f"clamp {name!r}: given twice, by name and by node; give it once")
            named[name] = given
        return named

    def _clamping(self, clamps: Mapping[str, Clamp], predicting: bool) -> Clamping:
        full = frozenset(name for name, clamp in clamps.items() if clamp.mask is None)
        partial = frozenset(clamps) - full
        backprop = self.rule.backprop and not predicting
        key = (self.network.revision, full, partial, backprop)
        if key not in self._clampings:
            self.network.check()
            clamping = Clamping(self.network, full, partial, backprop)
            _ = clamping.order  # refuses cycles that have no value to start from
            self._clampings = {k: c for k, c in self._clampings.items() if k[0] == self.network.revision}
            self._checked.clear()
            self._clampings[key] = clamping
        return self._clampings[key]

    def _clamp(
        self, name: str, given: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype, device: torch.device
    ) -> Clamp:
        known = self.network.nodes
        if name not in known:
            raise ClampError(f"clamp {name!r}: no such node; the network has {listed(known)}")
        if isinstance(given, tuple) and len(given) != 2:
            raise ClampError(f"clamp {name!r}: a tuple of {len(given)} given, expected a pair of values and a mask")
        value, mask = given if isinstance(given, tuple) else (given, None)
        shape = known[name].shape
        expected = f"(batch, {', '.join(map(str, shape))})"
        if not isinstance(value, Tensor):
            raise ClampError(f"clamp {name!r}: {type(value).__name__} given, expected a tensor {expected}")
        if value.dim() == 0 or tuple(value.shape[1:]) != shape or len(value) == 0:
            classes = value.dim() == len(shape) == 1 and not value.is_floating_point()
            one_hot = "class numbers have to be made one-hot (torch.nn.functional.one_hot)"
            mend = one_hot if classes else "the batch is the first axis"
            expected += " with at least one sample"
            raise ClampError(f"clamp {name!r}: shape {tuple(value.shape)} given, expected {expected}; {mend}")
        if value.dtype != dtype:
            raise ClampError(f"clamp {name!r}: dtype {value.dtype} given, expected {dtype} as the network; convert it")
        if value.device != device:
            raise ClampError(f"clamp {name!r}: on device {value.device}, expected {device} as the network; move one")
        if value.is_inference():
            value = value.clone()
        # The sum tells at a fraction of the cost; only where it overflows does every unit have to be looked at.
        finite = math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())
        if mask is None:
            if not finite:
                raise ClampError(f"clamp {name!r}: holds NaN or infinity; clean the data, or mask the unknown units")
            return Clamp(value.detach())
        if not isinstance(mask, Tensor):
            raise ClampError(f"clamp {name!r}: a mask of type {type(mask).__name__} given, expected a boolean tensor")
        if mask.dtype != torch.bool or tuple(mask.shape) not in (shape, tuple(value.shape)):
            raise ClampError(
                f"clamp {name!r}: mask of {mask.dtype} and shape {tuple(mask.shape)} given, expected torch.bool of "
                f"shape {shape} or {tuple(value.shape)}; True marks the units that are given"
            )
        mask = mask.to(device)
        if not finite:
            value = torch.where(mask, value, 0)
            if not bool(torch.isfinite(value).all()):
                raise ClampError(f"clamp {name!r}: a given unit is NaN or infinite; clean the data, or mask it as well")
        return Clamp(value.detach(), mask)

    def _require_target(self, problem: Problem) -> None:
        if not any(name in problem.clamping.energetic for name in problem.clamps):
            raise StateError(
                "nothing to learn: no clamped node has an incoming edge or a prior (clamped: "
                f"{', '.join(problem.clamps)}); clamp a target as well"
            )

    # What a run leaves

    def _finish(self, state: State) -> Trace:
        self._state = self.engine.kept = state
        self.network.reader = Reading(state)
        names = state.problem.clamping.energetic
        recorded = (state.energies, state.error_norms, state.free_energies)
        return Trace(state.steps, names, state.problem.clamping.levels, *recorded)

    def _require(self, purpose: str) -> State:
        if self._state is None:
            raise StateError(f"{purpose} needs a relaxed state: call infer first")
        return self._state


def _check_kind(argument: str, given: object, kind: type) -> None:
    if not isinstance(given, kind):
        shown = given.__name__ if isinstance(given, type) else type(given).__name__
        mend = instead_of(given, kind, f"pass a {kind.__name__}")
        raise SettingError(f"{argument}: {shown} given, expected an instance of {kind.__name__}; {mend}")

"""The local rules of SPEC §2 and §4 by autograd, node by node: for the reference engine, reading, and what diverged.

Nothing here looks further than a node, its edges and their other ends; where a deterministic node stands between, it
is passed within the step, as the SPEC says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import attrs
import torch
from torch import Tensor, nn

from pcsim.engine.probe import Probed
from pcsim.engine.problem import Batch, Record, State, Task, free_energies, precision_gradient, record
from pcsim.engine.rates import Rates
from pcsim.engine.reached import Reached
from pcsim.errors import DivergenceError
from pcsim.graph.energy import Scale
from pcsim.graph.probing import leaf
from pcsim.graph.statistics import frozen_statistics

ROUNDING = 64
"""Units in the last place of its largest number by which a prediction may differ that has not changed."""
MODERATE = 1e4
"""What is below this in size cannot be blamed for a module that makes NaN or infinity of it."""


class Evaluation:
    """What the local rules make of one state (SPEC §2), each number computed when it is first asked for.

    Args:
        state: the values; deterministic nodes follow from the others.
        step: whose precision weighs the errors.
        learning: errors are those that the weights learn from, and their gradients are wanted too.
        later: weights may have changed since the state's predictions were made.
        only: the nodes whose errors count; all by default.
    """

    def __init__(
        self,
        state: State,
        step: int,
        *,
        learning: bool = False,
        later: bool = False,
        only: Collection[str] | None = None,
    ) -> None:
        self.task, self.batch, self.value = state.task, state.batch, state.value
        task = state.task
        forward = task.held or (learning and task.rule.at_forward)
        self._activity = state.forward_value if forward else state.value
        self.state, self._step, self._learning, self._only = state, step, learning, only
        self._unusual = learning and not task.rule.usual
        self._later = later or task.learns_each_step
        clamping = task.clamping
        self._deterministic, self._position = clamping.deterministic, clamping.position
        # What the weights learn from ends at the next node with an error of its own, wherever errors are relaxed.
        self._following = frozenset[str]() if learning else frozenset(task.following)
        if task.following:
            self._position = clamping.place_in_sequence
        self._contribution: dict[str, Tensor] = {}
        self._prediction: dict[str, Tensor] = {}
        self._graph: dict[str, tuple[list[Tensor], Tensor]] = {}
        self._delta: dict[str, Tensor] = {}
        self._message: dict[str, Tensor] = {}
        self._gradient: dict[str, dict[nn.Parameter, Tensor]] = {}

    def activity(self, name: str) -> Tensor:
        """What a node's outgoing edges read, (batch, *shape)."""
        return self.prediction(name) if name in self._deterministic else self._activity[name]

    def prediction(self, name: str) -> Tensor:
        """u_n, (batch, *shape)."""
        if name not in self._prediction:
            for before in self._in_order(self._deterministic_before(name)):
                self._predict(before)
            self._predict(name)
        return self._prediction[name]

    def error(self, name: str) -> Tensor:
        """ε_n, (batch, *shape): what the node has received, less how its prediction has changed since (SPEC §7)."""
        received, prediction = self.state.displacement.get(name), self.prediction(name)
        if name in self.state.error:
            return self._kept(name, prediction)
        if received is None:
            return self.value[name] - prediction
        before = self.state.forward_prediction[name]
        return received if self._stays(name, before, prediction) else received + (before - prediction)

    def _kept(self, name: str, prediction: Tensor) -> Tensor:
        """The error from which a value follows, unless the weights have changed since, so that rounding makes none."""
        kept, value = self.state.error[name], self.value[name]
        if not (self._later and kept.numel()):
            return kept
        apart = value - prediction
        within = ROUNDING * torch.finfo(value.dtype).eps * float(value.abs().max())
        return kept if bool(((apart - kept).abs() <= within).all()) else apart

    def _stays(self, name: str, before: Tensor, prediction: Tensor) -> bool:
        """Whether a node's prediction is that of the start: by what it reads, so that rounding makes no error."""
        state, sources = self.state, set[str]()
        for inner in [*self._deterministic_before(name, met=True), name]:
            sources |= {edge.source_name for edge in self.task.network.nodes[inner].incoming}
        unmoved = all(
            self._activity[source] is state.forward_value[source]
            or torch.equal(self._activity[source], state.forward_value[source])
            for source in sources - self._deterministic
        )
        if not (unmoved and self._later):
            return unmoved
        within = ROUNDING * torch.finfo(before.dtype).eps * float(before.abs().max()) if before.numel() else 0.0
        return bool(((prediction - before).abs() <= within).all())

    def compared(self, name: str) -> tuple[Tensor, Tensor]:
        """Value and prediction of a node with an energy; its error and zero where the energy knows no more of them."""
        gaussian = self.task.network.nodes[name].energy_function.gaussian
        kept = name in self.state.displacement or (name in self.state.error and gaussian)
        if not kept or self._unusual:
            return self.value[name].contiguous(), self.prediction(name)
        error = self.error(name).contiguous()
        return error, torch.zeros_like(error)

    def contribution(self, edge: str) -> Tensor:
        """a_e, (batch, *shape before the target's transfer)."""
        self.prediction(self.task.network.edges[edge].target_name)
        return self._contribution[edge]

    def delta(self, name: str) -> Tensor:
        """δ_n = −∂(π_n w_n E_n)/∂u_n, or the sum of the messages to a deterministic node, (batch, *shape)."""
        if name not in self._delta:
            for after in reversed(self._in_order(self._deterministic_after(name))):
                self._compare(after)
        return self._delta[name]

    def message(self, edge: str) -> Tensor:
        """m_e, (batch, *source shape)."""
        if edge not in self._message:
            self._vjp(self.task.network.edges[edge].target_name)
        return self._message[edge]

    def gradients(self, name: str) -> dict[nn.Parameter, Tensor]:
        """Gradients of the parameters of a node and its incoming edges, divided by the batch size.

        A parameter that autograd does not reach from the prediction is left out, as by ``backward()``.
        """
        if name not in self._gradient:
            self._vjp(name)
        return self._gradient[name]

    def scale(self, name: str) -> Scale:
        """The factor on a node's energy: π w, or, for what the weights learn from, what their rule says (SPEC §4)."""
        if self._learning and not self.task.rule.every_step:
            return self.task.weight(name)
        return self.task.scale(name, self._step, self.batch)

    def descent(self, name: str) -> Tensor:
        """−∂F_t/∂v_n = −∂(π_n w_n E_n)/∂v_n + Σ m_e over outgoing e, (batch, *shape)."""
        node = self.task.network.nodes[name]
        total = torch.zeros_like(self.value[name].contiguous())
        if node.predicted:
            total = total - node.energy_function.value_gradient(*self.compared(name), self.scale(name))
        if name in self.state.multiplier:
            total = total - self.state.multiplier[name]
        return sum((self.message(edge.name) for edge in node.outgoing), total)

    def record(self) -> Record:
        """Energies and errors of this state, and F_t."""
        return record(self.task, self.batch, self._step, self.compared)

    def free_energies(self) -> Tensor:
        """F_t of each sample, (batch,)."""
        return free_energies(self.task, self.batch, self._step, self.compared)

    def _predict(self, name: str) -> None:
        if name in self._prediction:
            return
        node, seed = self.task.network.nodes[name], self.batch.seed
        leaves = [leaf(self.activity(edge.source_name).detach().contiguous()) for edge in node.incoming]
        with torch.enable_grad():
            given = [edge.contribute(read, seed) for edge, read in zip(node.incoming, leaves, strict=True)]
            output = node.predict(given, seed) if given else node.predict_from_prior(self.batch.size)
        for edge, contribution in zip(node.incoming, given, strict=True):
            self._contribution[edge.name] = contribution.detach()
        self._graph[name], self._prediction[name] = (leaves, output), output.detach().contiguous()

    def _compare(self, name: str) -> None:
        if name in self._delta:
            return
        node, prediction = self.task.network.nodes[name], self.prediction(name)
        if name in self._deterministic or name in self._following:
            messages = (self.message(edge.name) for edge in node.outgoing)
            arrived = sum(messages, torch.zeros_like(prediction))
            self._delta[name] = arrived if name in self._deterministic else self._passed(name, arrived)
        elif self._only is not None and name not in self._only:
            self._delta[name] = torch.zeros_like(prediction)
        else:
            rule = self.task.rule.delta if self._learning else self.task.rule.descent
            own = rule(node.energy_function, *self.compared(name), self.scale(name))
            self._delta[name] = own + self.state.multiplier[name] if name in self.state.multiplier else own

    def _passed(self, name: str, arrived: Tensor) -> Tensor:
        """What a node whose value follows from its error hands on: −∂F/∂u with v = u + ε where it is free."""
        energy, given = self.task.network.nodes[name].energy_function, self.batch.given(name)
        if energy.gaussian and given is None:
            return arrived
        compared, scale = self.compared(name), self.scale(name)
        moved = arrived - energy.value_gradient(*compared, scale)
        if given is not None:
            moved = torch.where(given, 0.0, moved)
        return moved + self.task.rule.descent(energy, *compared, scale)

    def _vjp(self, name: str) -> None:
        """The error pulled back through a node's transfer and its edges, to their sources and all parameters."""
        delta, node = self.delta(name), self.task.network.nodes[name]
        self.prediction(name)
        leaves, output = self._graph.pop(name)
        parameters = node.trainable if self._learning else []
        wanted = [tensor for tensor in (*leaves, *parameters) if tensor.requires_grad]
        found: dict[Tensor, Tensor | None] = {}
        if wanted and output.requires_grad:
            found = dict(zip(wanted, torch.autograd.grad(output, wanted, delta, allow_unused=True), strict=True))
        for edge, read in zip(node.incoming, leaves, strict=True):
            message = found.get(read)
            self._message[edge.name] = delta.new_zeros(read.shape, device=read.device) if message is None else message
        reached = ((parameter, found.get(parameter)) for parameter in parameters)
        own = {parameter: gradient / -self.batch.size for parameter, gradient in reached if gradient is not None}
        learned = node.log_precision
        if learned is not None and learned.requires_grad and self._learning and name not in self._deterministic:
            factor = self.scale(name)
            if not self.task.rule.every_step:
                factor = factor * learned.detach().exp()
            own[learned] = precision_gradient(node, *self.compared(name), factor, self.task.weight(name))
        self._gradient[name] = own

    def _deterministic_before(self, name: str, *, met: bool = False) -> set[str]:
        """Deterministic nodes that a prediction reads, directly or through others, and that have none yet (or have)."""
        nodes, found, frontier = self.task.network.nodes, set[str](), [name]
        while frontier:
            for edge in nodes[frontier.pop()].incoming:
                before = edge.source_name
                known = before in self._prediction and not met
                if before in self._deterministic and not known and before not in found:
                    found.add(before)
                    frontier.append(before)
        return found

    def _deterministic_after(self, name: str) -> set[str]:
        """A node and, where errors pass through it, all whose errors do and are not known yet."""
        nodes, found, frontier = self.task.network.nodes, {name}, [name]
        while frontier:
            current = frontier.pop()
            passes = current in self._deterministic or current in self._following
            for edge in nodes[current].outgoing if passes else ():
                if edge.target_name not in found and edge.target_name not in self._delta:
                    found.add(edge.target_name)
                    frontier.append(edge.target_name)
        return found

    def _in_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=self._position.__getitem__)


def start(task: Task, batch: Batch) -> State:
    """The feed-forward start, and the stated rule where no forward pass gives a value (SPEC §2, Start)."""
    clamping, nodes, batch = task.clamping, task.network.nodes, batch.at(0)
    value: dict[str, Tensor] = {}
    prediction: dict[str, Tensor] = {}
    for component in clamping.components:
        for name in component:
            if name in clamping.full:
                value[name] = batch.clamps[name].value.clone(memory_format=torch.contiguous_format)
            elif name in clamping.placed:
                value[name] = batch.clamped(name, batch.origin(nodes[name]))
        for name in sorted(component, key=clamping.position.__getitem__):
            if name not in value:
                prediction[name] = predict(task, batch, name, value)
                value[name] = batch.clamped(name, prediction[name])
    for name, node in nodes.items():
        if node.predicted and name not in prediction:
            prediction[name] = predict(task, batch, name, value)
    if task.nudged:
        for name in clamping.targets:
            value[name] = torch.lerp(prediction[name], value[name], batch.nudge)
    apart = clamping.displaced if not task.relaxation.relaxes_errors else ()
    displacement = {name: torch.zeros_like(value[name]) for name in apart}
    error = {name: value[name] - prediction[name] for name in task.following}
    carried = clamping.multiplied if task.relaxation.multipliers else ()
    multiplier = {name: torch.zeros_like(value[name]) for name in carried}
    return State(task, batch, dict(value), value, prediction, displacement, error=error, multiplier=multiplier)


def follow(state: State) -> None:
    """Put values where errors put them, v = u + ε in topological order (SPEC §2, Error coordinates)."""
    task, batch, value, error = state.task, state.batch, dict(state.value), dict(state.error)
    for name in task.clamping.sequence:
        if name not in error and name not in task.clamping.deterministic:
            continue
        prediction = predict(task, batch, name, value)
        value[name] = prediction
        if name in error:
            value[name] = batch.clamped(name, prediction + error[name])
            given = batch.given(name)
            if given is not None:
                error[name] = torch.where(given, value[name] - prediction, error[name])
    state.value, state.error = value, error


def predict(task: Task, batch: Batch, name: str, value: Mapping[str, Tensor], *, hold: bool = True) -> Tensor:
    """u_n from the values of its sources, (batch, *shape), without a trace; ``hold=False`` lets statistics move."""
    node = task.network.nodes[name]
    with torch.no_grad():
        given = [edge.contribute(value[edge.source_name].contiguous(), batch.seed, hold=hold) for edge in node.incoming]
        if given:
            return node.predict(given, batch.seed, hold=hold).contiguous()
        # A copy: what starts at a learned prior must not move with it.
        return node.predict_from_prior(batch.size).clone(memory_format=torch.contiguous_format)


def begin(task: Task, batch: Batch) -> State:
    """The start, and whether every free node has a finite value there.

    Raises:
        DivergenceError: one has not; names it, and the module or the weights that made it so.
    """
    state = start(task, batch)
    lost = next((name for name in task.clamping.free if not finite(state.value[name])), None)
    if lost is not None:
        raise divergence(task, lost, None, blamed(Evaluation(state, 0)))
    return state


def steps(state: State) -> Iterator[Evaluation]:
    """Take all steps from a state on, every free node from the same state; what is made of it, before each is taken.

    Raises:
        DivergenceError: a latent became NaN or infinite; names the node and the step, or the module that made it.
    """
    task, batch = state.task, state.batch
    velocity: dict[str, Tensor | None] = dict.fromkeys(task.clamping.free)
    rates = None if task.relaxation.least_rate is None else Rates(task.relaxation, batch)
    before = attrs.evolve(state)
    for step in range(task.relaxation.steps):
        if step:
            _show(state, step)
            batch = state.batch
        now = Evaluation(attrs.evolve(state), step)
        if rates is not None and _take_back(rates.judge(now.free_energies()), before, state):
            now = Evaluation(attrs.evolve(state), step)
        if step:
            multiply(now, state)
        yield now
        before, largest = attrs.evolve(state), 0.0
        value, displacement, error = dict(state.value), dict(state.displacement), dict(state.error)
        for name in task.clamping.free:
            move, velocity[name] = task.relaxation.displacement(now.descent(name), velocity[name])
            if rates is not None:
                move = rates.scale(move, move.dim() - 1)
            if task.relaxation.temperature:
                move = move + task.relaxation.noise(move, batch.seed, name, step)
            if name in error:
                error[name] = error[name] + move
            elif name in displacement:
                displacement[name] = displacement[name] + move
                value[name] = state.forward_prediction[name] + displacement[name]
            else:
                value[name] = batch.clamped(name, state.value[name] + move)
        state.value, state.displacement, state.error, state.steps = value, displacement, error, step + 1
        if error:
            follow(state)
        # Of what a node keeps, the last is what moves it.
        still, moving = ({**each.value, **each.displacement, **each.error} for each in (before, state))
        for name in task.clamping.free:
            # The norm, since errors of values whose squares overflow would make the gradients infinite next.
            if rates is None and not finite(state.value[name]):
                raise divergence(task, name, step, blamed(now))
            largest = max(largest, (moving[name] - still[name]).abs().max().item())
        if task.settled(largest, step):
            break
    if rates is not None and state.steps:
        _take_back(rates.judge(Evaluation(attrs.evolve(state), state.last_step).free_energies()), before, state)


def _show(state: State, step: int) -> None:
    """Put the frames of a step in the place of those before."""
    task, changing = state.task, state.task.changing(step - 1)
    if not changing:
        return
    state.batch = state.batch.at(step)
    shown = {name: state.batch.clamped(name, state.value[name]) for name in changing}
    if task.nudged:
        for name in set(changing).intersection(task.clamping.targets):
            shown[name] = torch.lerp(state.forward_prediction[name], shown[name], state.batch.nudge)
    state.value = {**state.value, **shown}
    if task.following:
        follow(state)


def _take_back(rose: Tensor | None, before: State, after: State) -> bool:
    """Put the samples whose energy rose at a step where they were before it; whether there are any."""
    if rose is None:
        return False
    for part in ("value", "displacement", "error"):
        former, kept = getattr(before, part), getattr(after, part)
        taken = {name: Rates.take_back(rose, former[name], kept[name], kept[name].dim() - 1) for name in kept}
        setattr(after, part, taken)
    return True


def probe(state: State, now: Evaluation | None = None) -> Probed:
    """What the task's probes see of a state, or of what has been made of it already."""
    clamping = state.task.clamping
    now = Evaluation(state, state.last_step, later=True) if now is None else now
    seen = {}
    for each in state.task.probes:
        name, inner = each.node, each.node in clamping.deterministic
        ask = {
            "value": now.prediction if inner else now.value.__getitem__,
            "prediction": now.prediction,
            "error": (lambda name: torch.zeros_like(now.prediction(name))) if inner else now.error,
        }
        seen[name] = {part: each.chosen(ask[part](name)) for part in each.of or ()}
    return seen


def multiply(now: Evaluation, state: State) -> None:
    """The multipliers after a step, λ + α ε with ε after the step (SPEC §2), in what is made of a state and in it."""
    growth = state.task.relaxation.multipliers
    now.state.multiplier = state.multiplier = {
        name: before + growth * now.error(name) for name, before in state.multiplier.items()
    }


def finite(value: Tensor) -> bool:
    """Whether a value is finite, and small enough for its square to be."""
    return bool(torch.isfinite(torch.linalg.vector_norm(value)))


def divergence(task: Task, node: str, step: int | None, cause: str = "") -> DivergenceError:
    """The error for a latent that was lost at a step, or in the forward pass if that is None."""
    lost = f"node {node!r} became NaN or infinite at inference step {step}"
    if step is None:
        lost = f"node {node!r} is NaN or infinite after the forward pass, before any inference step"
    if cause:
        return DivergenceError(f"{lost}: {cause}")
    if step is None:
        return DivergenceError(f"{lost}; look at the weights, which a smaller learning rate usually keeps finite")
    return DivergenceError(
        f"{lost}; a smaller inference rate than {task.relaxation.rate:g} usually helps, or less momentum, or smaller "
        f"precisions; or smaller weights{_largest_weight(task)}, where earlier batches went well by a smaller learning "
        "rate"
    )


def _largest_weight(task: Task) -> str:
    sizes = [float(p.detach().abs().max()) for p in task.fingerprint.parameters if p.numel()]
    return f" (the largest is {max(sizes):.3g})" if sizes else ""


def blamed(now: Evaluation) -> str:
    """The module or energy that made NaN or infinity of moderate numbers, and what to do; empty if there is none."""
    network, clamping = now.task.network, now.task.clamping
    for name in (name for name in clamping.order if network.nodes[name].predicted):
        node, prediction = network.nodes[name], now.prediction(name)
        for edge in node.incoming:
            if _moderate(now.activity(edge.source_name)) and not _whole(now.contribution(edge.name)):
                return (
                    f"edge {edge.name!r}: its module, {edge.module!r}, made NaN or infinity of finite values; look at "
                    "the module, no rate mends it"
                )
        if all(_moderate(now.contribution(edge.name)) for edge in node.incoming) and not _whole(prediction):
            return (
                f"its combine, {node.combine!r}, or transfer, {node.transfer!r}, made NaN or infinity of finite "
                "contributions; look at the module, no rate mends it"
            )
        if name in clamping.deterministic or not (_moderate(prediction) and _moderate(now.value[name])):
            continue
        energy, scale = node.energy_function, now.scale(name)
        for gradient in (energy.value_gradient, energy.prediction_gradient):
            if not _whole(gradient(now.value[name], prediction, scale)):
                return (
                    f"the energy of node {name!r}, {energy!r}, has a NaN or infinite derivative at finite values and "
                    "predictions; look at the energy, no rate mends it"
                )
    for edge in network.edges.values():
        if _moderate(now.delta(edge.target_name)) and not _whole(now.message(edge.name)):
            return (
                f"edge {edge.name!r}: its module, {edge.module!r}, or what follows it, has a NaN or infinite "
                "derivative at finite values; look at the module, no rate mends it"
            )
    return ""


def _whole(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _moderate(tensor: Tensor) -> bool:
    return _whole(tensor) and (not tensor.numel() or float(tensor.abs().max()) < MODERATE)


def gradients(now: Evaluation, names: Iterable[str]) -> dict[nn.Parameter, Tensor]:
    """Gradients of the parameters of these nodes and their incoming edges, summed where several share one."""
    total: dict[nn.Parameter, Tensor] = {}
    for name in names:
        for parameter, gradient in now.gradients(name).items():
            total[parameter] = total[parameter] + gradient if parameter in total else gradient
    return total


def learned_from(state: State) -> Evaluation:
    """What the task's learning rule sees of a relaxed state, at the present weights (SPEC §4)."""
    return Evaluation(state, state.last_step, learning=True, later=True)


def arrived(state: State) -> dict[nn.Parameter, Tensor]:
    """Gradients of the arrival rule (SPEC §4), by taking the steps of a state again from its start.

    At the step at which the error arrives at a node, the parameters of the node and its edges learn from it, and those
    of the deterministic nodes through which it passes.
    """
    task = state.task.unwatched
    again, reached, total = begin(task, state.batch), Reached(task), dict[nn.Parameter, Tensor]()
    for step, now in enumerate(steps(again)):
        if step == state.steps:
            break
        arriving = {name for name in reached.weighing() if task.clamping.levels.get(name) == step}
        taught = Evaluation(now.state, step, learning=True, only=arriving)
        for parameter, gradient in gradients(taught, reached.with_inner(arriving)).items():
            total[parameter] = total[parameter] + gradient if parameter in total else gradient
        reached.step(step)
    return total


def update_statistics(state: State) -> None:
    """Evaluate all modules that keep statistics once more, on the activity that the rule learns from, and let them."""
    task, batch = state.task, state.batch
    activity = dict(state.forward_value)
    if not task.reads_forward:
        # Evaluated anew: values of deterministic nodes follow from the others', and from weights that may move.
        with torch.no_grad(), frozen_statistics(task.fingerprint.normalising):
            now = Evaluation(state, state.last_step, later=True)
            activity = {name: now.activity(name) for name in task.network.nodes}
    for name, node in task.network.nodes.items():
        if node.predicted:
            predict(task, batch, name, activity, hold=False)

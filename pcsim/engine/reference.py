"""The reference engine: every node at every step, each by autograd on nothing but itself and its incoming edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor, nn

from pcsim.dynamics.learning import LearningRule
from pcsim.engine.engine import Engine, Gradients, Problem, Record, State, divergence
from pcsim.engine.kernel import pull_back
from pcsim.engine.plan import Mask, Plan
from pcsim.graph.energy import Energy, Scale, sample_norm
from pcsim.graph.evaluation import frozen_statistics


class ReferenceEngine(Engine):
    """Local autograd, obviously right and slow: the oracle of every other engine."""

    name = "reference"

    def forward(self, problem: Problem) -> State:
        """Values after the feed-forward start alone (SPEC §2, Start)."""
        with torch.no_grad(), frozen_statistics(problem.snapshot.normalising):
            return start(problem, None)

    def relax(
        self,
        problem: Problem,
        previous: State | None = None,
        learn: Callable[[Gradients], None] | None = None,
    ) -> State:
        """Start feed-forward, then take T inference steps (SPEC §2)."""
        relaxation, clamping = problem.relaxation, problem.clamping
        velocity: dict[str, Tensor | None] = dict.fromkeys(clamping.free)
        plan = Plan(problem, teaching=learn is not None)
        recorded: list[Record] = []
        with torch.no_grad(), frozen_statistics(problem.snapshot.normalising):
            state = start(problem, previous)
            for name in clamping.free:
                if not _finite(state.value[name]):
                    raise divergence(problem, name, None)
            for step in range(relaxation.steps):
                now = evaluate(problem, state.value, state.value, problem.scales(step))
                if problem.record:
                    recorded.append(now.energies(step))
                largest = 0.0
                for name in clamping.free:
                    move, velocity[name] = relaxation.displacement(now.descent(name), velocity[name])
                    largest = max(largest, _apply(problem, state, name, move, step))
                if learn is not None:
                    taught = evaluate(problem, now.activity, now.value, now.scale, delta=problem.rule.delta)
                    learn(_gradients(taught, plan.phases[plan.sequence[step]].teach))
                state.steps = step + 1
                if problem.settled(largest, step):
                    break
            end = evaluate(problem, state.value, state.value, problem.scales(state.last_step))
            state.value.update(end.deterministic_values)
            if problem.record:
                recorded.append(end.energies(state.last_step))
                state.keep(recorded)
        return state

    def gradients(self, state: State) -> Gradients:
        """Gradients of the problem's learning rule at a relaxed state (SPEC §4)."""
        problem, rule = state.problem, state.problem.rule
        weights: dict[str, Scale] = {name: problem.network.nodes[name].weight for name in problem.clamping.energetic}
        activity = state.forward_value if rule.at_forward else state.value
        with torch.no_grad(), frozen_statistics(problem.snapshot.normalising):
            taught = evaluate(problem, activity, state.value, weights, delta=rule.delta)
            return _gradients(taught, Plan(problem).learning(state.steps).teach)

    def update_statistics(self, state: State) -> None:
        """Let normalising modules take the batch into their running statistics (Eq. 6)."""
        problem = state.problem
        activity = state.forward_value
        if not problem.rule.at_forward:
            # Evaluated anew: values of deterministic nodes follow from the others', and from weights that may move.
            scales = problem.scales(state.last_step)
            with torch.no_grad(), frozen_statistics(problem.snapshot.normalising):
                activity = evaluate(problem, state.value, state.value, scales).activity
        with torch.no_grad():
            for name, node in problem.network.nodes.items():
                if node.predicted:
                    _predict(problem, name, activity)


def start(problem: Problem, previous: State | None) -> State:
    """The feed-forward start, and the stated rule where no forward pass gives a value (SPEC §2, Start)."""
    clamping, nodes = problem.clamping, problem.network.nodes
    value: dict[str, Tensor] = {}
    prediction: dict[str, Tensor] = {}
    for component in clamping.components:
        for name in component:
            if name in clamping.full:
                value[name] = problem.clamps[name].value
            elif name not in clamping.deterministic and (name in clamping.cyclic or not nodes[name].predicted):
                value[name] = _clamped(problem, name, problem.origin(name, previous))
        for name in sorted(component, key=clamping.position.__getitem__):
            if name not in value:
                prediction[name] = _predict(problem, name, value)
                value[name] = _clamped(problem, name, prediction[name])
    for name, node in nodes.items():
        if node.predicted and name not in prediction:
            prediction[name] = _predict(problem, name, value)
    if problem.nudge != 1:
        for name in clamping.targets:
            value[name] = torch.lerp(prediction[name], value[name], problem.nudge)
    return State(problem, dict(value), value, prediction)


def _predict(problem: Problem, name: str, value: Mapping[str, Tensor]) -> Tensor:
    node = problem.network.nodes[name]
    contributions = [edge.contribute(value[edge.source_name], problem.seed) for edge in node.incoming]
    if contributions:
        return node.predict(contributions, problem.seed)
    # A copy: what starts at a learned prior must not move with it.
    return node.predict_from_prior(problem.batch).detach().clone()


def _clamped(problem: Problem, name: str, value: Tensor) -> Tensor:
    clamp = problem.clamps.get(name)
    return value if clamp is None else clamp.onto(value)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(torch.linalg.vector_norm(value)))


def _apply(problem: Problem, state: State, name: str, move: Tensor, step: int) -> float:
    """Move one node; the largest update of its units."""
    before = state.value[name]
    state.value[name] = _clamped(problem, name, before + move)
    # The norm, since errors of values whose squares overflow would make the gradients infinite next.
    if not _finite(state.value[name]):
        raise divergence(problem, name, step)
    return (state.value[name] - before).abs().max().item()


@attrs.define(eq=False)
class Evaluation:
    """All that the local rules read at one state (SPEC §2); tensors are batch-first, by node or edge name."""

    problem: Problem
    activity: dict[str, Tensor]
    value: Mapping[str, Tensor]
    scale: Mapping[str, Scale]
    prediction: dict[str, Tensor] = attrs.field(factory=dict)
    contribution: dict[str, Tensor] = attrs.field(factory=dict)
    delta: dict[str, Tensor] = attrs.field(factory=dict)
    message: dict[str, Tensor] = attrs.field(factory=dict)
    gradient: dict[str, dict[nn.Parameter, Tensor]] = attrs.field(factory=dict)

    @property
    def deterministic_values(self) -> dict[str, Tensor]:
        """Values of the deterministic nodes, which follow from those of the others."""
        return {name: self.activity[name] for name in self.problem.clamping.deterministic}

    def descent(self, name: str) -> Tensor:
        """−∂F_t/∂v_n = −∂(π_n w_n E_n)/∂v_n + Σ m_e over outgoing e."""
        node = self.problem.network.nodes[name]
        total = torch.zeros_like(self.value[name])
        if node.predicted:
            energy = node.energy_function
            total = total - energy.value_gradient(self.value[name], self.prediction[name], self.scale[name])
        return sum((self.message[edge.name] for edge in node.outgoing), total)

    def energies(self, step: int) -> Record:
        """Energies and errors of this state, and F_t with this step's precision."""
        nodes = self.problem.network.nodes
        rows, total = [], torch.zeros((), dtype=self.problem.dtype, device=self.problem.device)
        for name in self.problem.clamping.energetic:
            energy, value, prediction = nodes[name].energy_function, self.value[name], self.prediction[name]
            rows.append((energy.sample_energy(value, prediction), sample_norm(value - prediction)))
            total = total + (self.scale[name] * energy.unit_energy(value, prediction)).sum()
            total = total + self.problem.normaliser(name)
        return Record.of(rows, total, self.problem.batch)


def evaluate(
    problem: Problem,
    activity: Mapping[str, Tensor],
    value: Mapping[str, Tensor],
    scale: Mapping[str, Scale],
    *,
    delta: Callable[[Energy, Tensor, Tensor, Scale], Tensor] | None = None,
) -> Evaluation:
    """Predictions, errors and messages of every node and edge, each from its own neighbourhood (SPEC §2).

    Args:
        problem: the network with its clamps.
        activity: what the edges read, by source name; deterministic nodes are computed from the others.
        value: what the errors compare with the predictions, by node name.
        scale: factor on each node's energy.
        delta: a learning rule's δ; with it, the gradients of all parameters too, divided by the batch size.
    """
    clamping, nodes = problem.clamping, problem.network.nodes
    now = Evaluation(problem, dict(activity), dict(value), scale)
    leaves: dict[str, list[Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    for name in (name for name in clamping.order if nodes[name].predicted):
        node = nodes[name]
        leaves[name] = [now.activity[edge.source_name].detach().requires_grad_() for edge in node.incoming]
        with torch.enable_grad():
            pairs = zip(node.incoming, leaves[name], strict=True)
            contributions = {edge.name: edge.contribute(leaf, problem.seed) for edge, leaf in pairs}
            given = list(contributions.values())
            outputs[name] = node.predict(given, problem.seed) if given else node.predict_from_prior(problem.batch)
        now.contribution.update({edge: contribution.detach() for edge, contribution in contributions.items()})
        now.prediction[name] = outputs[name].detach()
        if name in clamping.deterministic:
            now.activity[name] = now.prediction[name]
    for name in (name for name in reversed(clamping.order) if name in outputs):
        node, output = nodes[name], outputs[name]
        if name in clamping.deterministic:
            now.delta[name] = sum((now.message[edge.name] for edge in node.outgoing), torch.zeros_like(output))
        else:
            rule = LearningRule.descent if delta is None else delta
            now.delta[name] = rule(node.energy_function, value[name], now.prediction[name], scale[name])
        parameters = [] if delta is None else node.trainable
        pulled = pull_back(output, [*leaves[name], *parameters], now.delta[name])
        now.message.update({edge.name: message for edge, message in zip(node.incoming, pulled, strict=False)})
        gradients = [gradient / -problem.batch for gradient in pulled[len(leaves[name]) :]]
        now.gradient[name] = dict(zip(parameters, gradients, strict=True))
        if node.log_precision in now.gradient[name]:
            if name in clamping.deterministic:
                del now.gradient[name][node.log_precision]  # no energy, so nothing weighs its precision
            else:
                now.gradient[name][node.log_precision] = _precision_gradient(now, name)
    return now


def _precision_gradient(now: Evaluation, name: str) -> Tensor:
    """∂/∂log π of π w E − ½ w log π, summed over what shares the precision, divided by the batch size."""
    node = now.problem.network.nodes[name]
    assert node.log_precision is not None
    factor = now.scale[name] if now.problem.rule.every_step else now.scale[name] * node.log_precision.exp()
    unit = factor * node.energy_function.unit_energy(now.value[name], now.prediction[name]) - 0.5 * node.weight
    return unit.mean(0).sum_to_size(node.log_precision.shape)


def _gradients(now: Evaluation, teach: Mask) -> dict[nn.Parameter, Tensor]:
    """Gradients of the parameters that these nodes teach, summed where several nodes share one."""
    total: dict[nn.Parameter, Tensor] = {}
    for name in (name for name, teaches in zip(now.problem.network.nodes, teach, strict=True) if teaches):
        for parameter, gradient in now.gradient.get(name, {}).items():
            total[parameter] = total[parameter] + gradient if parameter in total else gradient
    return total

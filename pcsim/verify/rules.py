"""Learning rules are local: what a node hands to its edges follows from its own error, now, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import attrs
import torch
from torch import Tensor, nn

from pcsim.clamps import Stream
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import LearningRule
from pcsim.graph.edge import Edge
from pcsim.graph.energy import Energy, Scale
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.simulator import Simulator
from pcsim.verify.case import Case, EngineChoice, given_value
from pcsim.verify.comparing import compare, largest
from pcsim.verify.oracle import energetic, predictions
from pcsim.verify.recording import RecordingOptimizer
from pcsim.verify.restart import clamped_onto, plain, random_state


def check_rule(case: Case, watched: Sequence[Network], engine: EngineChoice, tolerance: float, seed: int) -> None:
    """The case's rule reads neither other samples, nor other nodes, nor the past, nor the future.

    Args:
        case: the network, and the rule.
        watched: networks that the rule may hold on to: what they show, and their weights, must not matter.
        engine: what runs the rule.
        tolerance: relative to the largest number compared, and at least to 1.
        seed: of the random states.
    """
    _check_delta(case, watched, tolerance, seed)
    _check_gradients_apart(case, engine, tolerance, seed)
    if case.rule.every_step:
        _check_future(case, engine, tolerance, seed)


def _check_delta(case: Case, watched: Sequence[Network], tolerance: float, seed: int) -> None:
    """``delta`` itself, called as the engines call it."""
    network, rule, half = case.network, case.rule, case.batch
    here, there = (_twice(case, first) for first in (seed, seed + 2))
    with torch.no_grad():
        predicted, elsewhere = (predictions(network, state, case.deterministic) for state in (here, there))

    def handed(name: str, value: Tensor, prediction: Tensor) -> Tensor:
        node = network[name]
        found = rule.delta(node.energy_function, value.clone(), prediction.clone(), node.energy_weight)
        if not isinstance(found, Tensor) or found.shape != value.shape:
            shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AssertionError(f"node {name!r}: {rule}.delta gives {shown}, expected {tuple(value.shape)}\n{case!r}")
        return found.detach()

    for name in energetic(network, case.deterministic):
        value, prediction = here[name], predicted[name]
        with _showing(watched, seed):
            expected = handed(name, value, prediction)
        said = f"node {name!r}: what {type(rule).__name__}.delta hands to its edges"
        others = (
            torch.cat([own[:half], other[half:]])
            for own, other in ((value, there[name]), (prediction, elsewhere[name]))
        )
        with _showing(watched, seed):
            found = handed(name, *others)
        size = largest(expected, found)
        compare(f"{said}, with other samples changed", found[:half], expected[:half], tolerance, size, case)
        with _showing(watched, seed + 1), _shifted_all(watched):
            found = handed(name, value, prediction)
        compare(
            f"{said}, with all that the network shows and its weights changed", found, expected, tolerance, size, case
        )
        with _showing(watched, seed):
            for other in energetic(network, case.deterministic):
                handed(other, there[other], elsewhere[other])
            found = handed(name, value, prediction)
        compare(f"{said}, asked again after other nodes and values", found, expected, tolerance, size, case)


def _twice(case: Case, seed: int) -> dict[str, Tensor]:
    """A random state of twice the batch, (2 batch, *shape)."""
    one, two = random_state(case, seed), random_state(case, seed + 1)
    return {name: torch.cat([one[name], two[name]]) for name in one}


def _check_gradients_apart(case: Case, engine: EngineChoice, tolerance: float, seed: int) -> None:
    """What an engine makes of it: the gradients of a node's edges, with all but the ends of these edges changed."""
    network, inner = case.network, case.deterministic
    simulator = Simulator(network, Relaxation(0), _AtOnce(case.rule), engine=engine)
    if not any(name in energetic(network, inner) for name in case.clamps):
        return
    state, elsewhere = clamped_onto(case, random_state(case, seed)), random_state(case, seed + 1)

    def gradients(values: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
        clamps = {
            name: (values[name], given[1]) if isinstance(given, tuple) else values[name]
            for name, given in case.clamps.items()
        }
        simulator.infer(clamps, init={name: values[name] for name in case.free})
        return dict(simulator.gradients())

    whole = gradients(state)
    for name in energetic(network, inner):
        inside, frontier = {name}, [name]
        while frontier:
            for edge in network.incoming(frontier.pop()):
                if edge.source_name in inner and edge.source_name not in inside:
                    frontier.append(edge.source_name)
                inside.add(edge.source_name)
        own = [p for part in (network[name], *network.incoming(name)) for p in part.parameters()]
        own = [p for p in own if p in whole and _users(network, p) == {name}]
        if not own or len(inside) == len(network.nodes):
            continue
        changed = gradients({other: value if other in inside else elsewhere[other] for other, value in state.items()})
        for parameter in own:
            said = f"node {name!r}: gradients of its edges, with the nodes beyond them changed"
            size = largest(whole[parameter])
            compare(said, changed.get(parameter, torch.zeros_like(parameter)), whole[parameter], tolerance, size, case)


def _users(network: Network, parameter: nn.Parameter) -> set[str]:
    """Nodes whose prediction, or precision, uses a parameter."""
    return {
        node.name
        for node in network.nodes.values()
        if any(p is parameter for part in (node, *node.incoming) for p in part.parameters())
    }


class _AtOnce(LearningRule):
    """Another rule's ``delta`` at the present state, whenever that one learns."""

    def __init__(self, rule: LearningRule) -> None:
        self._rule = rule

    @property
    def usual(self) -> bool:
        """As the other rule."""
        return self._rule.usual

    def delta(self, energy: Energy, value: Tensor, prediction: Tensor, scale: Scale) -> Tensor:
        """As the other rule."""
        return self._rule.delta(energy, value, prediction, scale)


def _check_future(case: Case, engine: EngineChoice, tolerance: float, seed: int) -> None:
    """Gradients of each step but the last, with what is given at the last step changed."""
    steps, generator = case.relaxation.steps, torch.Generator().manual_seed(seed)
    if steps < 2 or not any(name in energetic(case.network, case.deterministic) for name in case.clamps):
        return
    runs = []
    for changed in (False, True):
        clamps: dict[str, Stream | tuple[Stream, Tensor]] = {}
        for name, given in case.clamps.items():
            frames = given_value(given).expand(steps, *given_value(given).shape).clone()
            if changed:
                frames[-1] = torch.randn(frames[-1].shape, generator=generator, dtype=frames.dtype)
            stream = Stream(frames)
            clamps[name] = (stream, given[1]) if isinstance(given, tuple) else stream
        optimizer = RecordingOptimizer(case.network, learning_rate=0.0)
        relaxation = attrs.evolve(plain(case, steps), hold_predictions=False)
        Simulator(case.network, relaxation, case.rule, engine=engine).update(clamps, optimizer)
        runs.append(optimizer.gradients)
    for step, (expected, found) in enumerate(zip(*(run[:-1] for run in runs), strict=True)):
        for name, gradient in expected.items():
            other = found[name]
            one, two = (torch.zeros(()) if each is None else each for each in (gradient, other))
            if gradient is None and other is None:
                continue
            said = f"gradient of parameter {name!r} at step {step}, with what is given at the last step changed"
            compare(said, two.expand_as(one), one, tolerance, largest(one, two), case)


@contextmanager
def _showing(networks: Sequence[Network], seed: int) -> Iterator[None]:
    """Networks whose nodes and edges show random numbers, for as long as it lasts."""
    before = [network.reader for network in networks]
    try:
        for network in networks:
            network.reader = _Elsewhere(seed)
        yield
    finally:
        for network, reader in zip(networks, before, strict=True):
            network.reader = reader


@contextmanager
def _shifted_all(networks: Sequence[Network]) -> Iterator[None]:
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(shifted(list(network.parameters())))
        yield


@contextmanager
def shifted(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters half a unit off, for as long as it lasts."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.5)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@attrs.frozen
class _Elsewhere:
    """Shows random numbers, one sample each, which broadcast to any batch."""

    seed: int

    def _random(self, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(map(ord, name)))
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    def value(self, node: Node) -> Tensor:
        """Random."""
        return self._random(f"value {node.name}", node.shape)

    def forward_value(self, node: Node) -> Tensor:
        """Random."""
        return self._random(f"forward value {node.name}", node.shape)

    def forward_prediction(self, node: Node) -> Tensor:
        """Random."""
        return self._random(f"forward prediction {node.name}", node.shape)

    def prediction(self, node: Node) -> Tensor:
        """Random."""
        return self._random(f"prediction {node.name}", node.shape)

    def error(self, node: Node) -> Tensor:
        """Random."""
        return self._random(f"error {node.name}", node.shape)

    def precision(self, node: Node) -> Tensor:
        """Random."""
        return self._random(f"precision {node.name}", ()).abs()

    def energy(self, node: Node) -> Tensor:
        """Random."""
        return self._random(f"energy {node.name}", ())

    def contribution(self, edge: Edge) -> Tensor:
        """Random."""
        return self._random(f"contribution {edge.name}", edge.contribution_shape)

    def message(self, edge: Edge) -> Tensor:
        """Random."""
        return self._random(f"message {edge.name}", edge.source.shape)

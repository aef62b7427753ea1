"""A case: everything that one run depends on, so that a failure can be printed, shrunk and run again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cached_property

import attrs
import torch
from torch import Tensor

from pcsim.clamps import Clamps, Stream
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import LearningRule, SettledUpdate
from pcsim.engine.engine import Engine
from pcsim.errors import SettingError
from pcsim.graph.clamping import Clamping
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.simulator import Simulator

NamedClamps = dict[str, Tensor | tuple[Tensor, Tensor]]
"""What is given, by node name: (batch, *shape), or a pair of that and a boolean mask of the given units."""

EngineChoice = str | Callable[[Network], Engine]
"""An engine's name, or what makes one for a network."""


class SeededNetwork(Network):
    """A network whose weights all come from one seed, so that a few lines of code rebuild it (:func:`code_of`)."""

    weight_seed: int | None = None

    def seed_weights(self, seed: int) -> None:
        """Draw every parameter anew, uniformly within ±1/√fan_in (±½ for parameters of one axis or none)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                bound = 0.5 if parameter.dim() < 2 else 1 / math.sqrt(parameter[0].numel())
                drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(bound * (2 * drawn - 1))
        self.weight_seed = seed


@attrs.frozen(eq=False, repr=False, slots=False)
class Case:
    """A network with its clamps and the rules that move it.

    Printed, it is Python code that rebuilds it.

    Args:
        network: the graph.
        clamps: what is given, by node name.
        relaxation: how the free nodes move.
        rule: how the weights learn.
        record: whether a comparison of engines records energies, which some shortcuts do without; None: in the second
            of its two runs alone.
    """

    network: Network
    clamps: NamedClamps
    relaxation: Relaxation = attrs.field(factory=Relaxation)
    rule: LearningRule = attrs.field(factory=SettledUpdate)
    record: bool | None = None

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(given_value(next(iter(self.clamps.values()))))

    @property
    def deterministic(self) -> frozenset[str]:
        """Names of the nodes whose value is their prediction: built so or by the rule, and not clamped."""
        full = fully_clamped(self.clamps)
        nodes = self.network.nodes.values()
        return frozenset(n.name for n in nodes if (n.deterministic or self.rule.backprop) and n.name not in full)

    @property
    def free(self) -> list[str]:
        """Names of the nodes that move, in insertion order; of a partially clamped node, its other units do."""
        still = self.deterministic | fully_clamped(self.clamps)
        return [name for name in self.network.nodes if name not in still]

    def free_units(self, name: str) -> Tensor:
        """Which units of a node move, bool, (batch, *shape)."""
        given = self.clamps.get(name)
        if given is None:
            return torch.ones(self.batch, *self.network[name].shape, dtype=torch.bool)
        return ~given_units(given)

    @cached_property
    def levels(self) -> Mapping[str, int]:
        """Level of each node that reaches a target (SPEC §2, Arrival)."""
        full = fully_clamped(self.clamps)
        return Clamping(self.network, full, frozenset(self.clamps) - full, self.rule.backprop).levels

    def factors(self, step: int) -> dict[str, float]:
        """What the precision schedule multiplies each node's own precision with at one step."""
        schedule, steps = self.relaxation.precision, self.relaxation.steps
        return {name: schedule.at(step, self.levels.get(name), steps) for name in self.network.nodes}

    def copy(self) -> Case:
        """The same case on a network of its own."""
        return attrs.evolve(self, network=copy.deepcopy(self.network))

    def simulator(self, engine: EngineChoice = "batched") -> Simulator:
        """A simulator of the network by the case's rules."""
        return Simulator(self.network, self.relaxation, self.rule, engine=engine)

    def __repr__(self) -> str:
        from pcsim.verify.source import code_of

        return "\n" + code_of(self.network, self.clamps, self.relaxation, self.rule)


def in_float64(
    network: Network, clamps: Clamps, relaxation: Relaxation | None = None, rule: LearningRule | None = None
) -> Case:
    """A case on a copy of the network in float64 on the CPU, whose modules that draw are in evaluation mode.

    Raises:
        SettingError: nothing is clamped.
    """
    if not clamps:
        raise SettingError("a check needs clamps: nothing is clamped, so the batch size is unknown")
    own = copy.deepcopy(network).to("cpu").double()
    for part in (*own.nodes.values(), *own.edges.values()):
        if part.stochastic:
            part.eval()
    named: NamedClamps = {}
    for node, given in clamps.items():
        name = node.name if isinstance(node, Node) else node
        value, *mask = given if isinstance(given, tuple) else (given,)
        if isinstance(value, Stream):
            raise SettingError(
                f"clamp {name!r}: a stream given, but checks look at one state at a time; give one tensor"
            )
        whole = value.cpu() if name in own and own[name].integers is not None else value.cpu().double()
        named[name] = (whole, mask[0].cpu()) if mask else whole
    batch = len(given_value(next(iter(named.values()))))
    for name, constant in own.constants.items():
        named.setdefault(name, torch.full((batch, *own[name].shape), constant, dtype=torch.float64))
    return Case(
        own, named, Relaxation() if relaxation is None else relaxation, SettledUpdate() if rule is None else rule
    )


def given_value(given: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The value part of a clamp, (batch, *shape)."""
    return given[0] if isinstance(given, tuple) else given


def given_units(given: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Which units a clamp gives, bool, (batch, *shape)."""
    value = given_value(given)
    return given[1].expand_as(value) if isinstance(given, tuple) else torch.ones_like(value, dtype=torch.bool)


def fully_clamped(clamps: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> frozenset[str]:
    """Names of the nodes of which every unit is given."""
    return frozenset(name for name, given in clamps.items() if not isinstance(given, tuple))

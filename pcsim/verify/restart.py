"""Starting a relaxation from any state, through nothing but the public interface of a simulator.

A relaxation starts feed-forward, except that a node on a cycle can start from the values of the run before. So every
latent node of a copy is given a silent edge to itself, a first run of no steps leaves the wished values, and a second
one takes them up.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor, nn

from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import SettledUpdate
from pcsim.dynamics.precision import Constant, PrecisionSchedule
from pcsim.graph.combining import Sum
from pcsim.graph.network import Network
from pcsim.simulator import Simulator
from pcsim.verify.case import Case, EngineChoice, NamedClamps, fully_clamped, given_units, given_value
from pcsim.verify.oracle import own_precision


@attrs.frozen
class Horizon(PrecisionSchedule):
    """A schedule of ``steps`` steps, whatever the length of the relaxation that it is used in.

    Args:
        schedule: the schedule.
        steps: T as the schedule is told.
    """

    schedule: PrecisionSchedule
    steps: int

    def at(self, step: int, level: int | None, steps: int) -> float:
        """The schedule's π(t) for T = ``self.steps``."""
        return self.schedule.at(step, level, self.steps)


class _Silent(nn.Module):
    """Contributes zeros, whatever it reads."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, value: Tensor) -> Tensor:
        return value.new_zeros(len(value), *self.shape)


class _Always(nn.Module):
    """Contributes the same, whatever it reads."""

    def __init__(self, what: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.what, self.shape = what, shape

    def forward(self, value: Tensor) -> Tensor:
        return self.what.to(value.dtype).expand(len(value), *self.shape)


class _WithoutLast(nn.Module):
    """Combines all contributions but the last."""

    def __init__(self, combine: nn.Module) -> None:
        super().__init__()
        self.combine = combine

    def forward(self, *contributions: Tensor) -> Tensor:
        combined: Tensor = self.combine(*contributions[:-1])
        return combined


def restartable(case: Case, factors: Mapping[str, float]) -> Network:
    """The same network, modules shared, in which every free latent node is on a cycle and precision stands still.

    Args:
        case: the network, and which of its nodes are clamped.
        factors: the schedule's factor on each node's own precision.
    """
    network = Network()
    full = fully_clamped(case.clamps)
    for node in case.network.nodes.values():
        precision = factors[node.name] * own_precision(case.network, node.name)
        loops = not node.deterministic and node.name not in full
        combine: nn.Module | None = node.combine
        if loops and type(combine) is not Sum:
            combine = _WithoutLast(node.combine) if node.incoming else None
        network.add_node(
            node.name,
            node.shape,
            # A prior is a prediction as it is; on the edge that replaces it, it must not meet the transfer.
            transfer=node.transfer if node.incoming else None,
            combine=combine,
            energy=node.energy_function,
            energy_weight=node.energy_weight,
            precision=precision.detach() if isinstance(precision, Tensor) else precision,
            deterministic=node.deterministic,
            prior=None if loops else node.prior,
        )
    for edge in case.network.edges.values():
        network.add_edge(edge.source_name, edge.target_name, edge.module, gain=edge.gain, name=edge.name)
    for node in case.network.nodes.values():
        if node.deterministic or node.name in full:
            continue
        if node.incoming:
            network.add_edge(
                node.name, node.name, _Silent(node.incoming[0].contribution_shape), name=f"{node.name} silent"
            )
        elif node.prior is not None:
            network.add_edge(node.name, node.name, _Always(node.prior.detach(), node.shape), name=f"{node.name} prior")
    return network


class OneStep:
    """Takes plain gradient steps from any state.

    Args:
        case: the network, which of its nodes are clamped, and the rate.
        factors: the schedule's factor on each node's own precision.
        engine: what takes the step.
    """

    def __init__(self, case: Case, factors: Mapping[str, float], engine: EngineChoice) -> None:
        self._still = Relaxation(0, case.relaxation.rate, precision=Constant(), start="previous")
        self._simulator = Simulator(restartable(case, factors), self._still, SettledUpdate(), engine=engine)

    def values_after(self, state: Mapping[str, Tensor], clamps: NamedClamps) -> dict[str, Tensor]:
        """Values of all nodes one step after ``state``, each (batch, *shape).

        Args:
            state: v_n of every node, (batch, *shape).
            clamps: what is given, of the nodes that the case clamps.
        """
        network = self._simulator.network
        self._simulator.relaxation = self._still
        self._simulator.infer({name: state[name] for name, node in network.nodes.items() if not node.deterministic})
        self._simulator.relaxation = attrs.evolve(self._still, steps=1)
        self._simulator.infer(clamps)
        return {name: node.value.clone() for name, node in network.nodes.items()}


def random_state(case: Case, seed: int) -> dict[str, Tensor]:
    """Standard normal values of all nodes, clamped or not, (batch, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (case.batch, *node.shape) for name, node in case.network.nodes.items()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def clamped_onto(case: Case, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with the clamped units as they are given."""
    onto = dict(state)
    for name, given in case.clamps.items():
        onto[name] = torch.where(given_units(given), given_value(given), state[name])
    return onto


def plain(case: Case, steps: int) -> Relaxation:
    """The first steps of the case's relaxation, without momentum and tolerance."""
    horizon = Horizon(case.relaxation.precision, case.relaxation.steps)
    still = attrs.evolve(case.relaxation, momentum=0.0, nesterov=False, tolerance=None, temperature=0.0)
    return attrs.evolve(still, steps=steps, precision=horizon, multipliers=0.0)


def trajectory(case: Case, engine: EngineChoice) -> list[dict[str, Tensor]]:
    """Values of all nodes before each step of the case's relaxation by plain gradient descent, and after the last.

    Args:
        case: what is run; its momentum and its tolerance are left out.
        engine: what runs it.
    """
    states = []
    # A rule that learns as errors arrive refuses to stop before they have.
    rule = SettledUpdate() if case.rule.at_arrival else case.rule
    for steps in range(case.relaxation.steps + 1):
        Simulator(case.network, plain(case, steps), rule, engine=engine).infer(case.clamps)
        states.append({name: node.value.clone() for name, node in case.network.nodes.items()})
    return states

"""Starting a relaxation from any state, and the states through which one passes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import SettledUpdate
from pcsim.dynamics.precision import Constant, PrecisionSchedule
from pcsim.errors import PrecisionWarning
from pcsim.simulator import Simulator
from pcsim.verify.case import Case, EngineChoice, NamedClamps, given_units, given_value


@attrs.frozen
class Horizon(PrecisionSchedule):
    """A part of a schedule of ``steps`` steps, whatever the length of the relaxation that it is used in.

    Args:
        schedule: the schedule.
        steps: T as the schedule is told.
        first: the step of the schedule that is the relaxation's first.
    """

    schedule: PrecisionSchedule
    steps: int
    first: int = 0

    def at(self, step: int, level: int | None, steps: int) -> float:
        """The schedule's π(t) for T = ``self.steps``."""
        return self.schedule.at(self.first + step, level, self.steps)


class OneStep:
    """Takes plain gradient steps from any state.

    Args:
        case: the network, which of its nodes are clamped, and the relaxation.
        step: whose precision counts; None for 1 throughout.
        engine: what takes the step.
    """

    def __init__(self, case: Case, step: int | None, engine: EngineChoice) -> None:
        self._case, one = case, attrs.evolve(plain(case, 1), start="zeros", hold_predictions=False)
        if step is None or not one.relaxes_errors:
            whole = case.relaxation
            schedule = Constant() if step is None else Horizon(whole.precision, whole.steps, step)
            one = attrs.evolve(one, precision=schedule)
        self._simulator = Simulator(case.network, one, SettledUpdate(), engine=engine)

    def values_after(self, state: Mapping[str, Tensor], clamps: NamedClamps) -> dict[str, Tensor]:
        """Values of all nodes one step after ``state``, each (batch, *shape).

        Args:
            state: v_n of every node, (batch, *shape).
            clamps: what is given, of the nodes that the case clamps.
        """
        with warnings.catch_warnings():
            # A part of a schedule may delay otherwise than the whole, of which the user is warned.
            warnings.simplefilter("ignore", PrecisionWarning)
            self._simulator.infer(clamps, init={name: state[name] for name in self._case.free})
        return {name: node.value.clone() for name, node in self._case.network.nodes.items()}


def random_state(case: Case, seed: int) -> dict[str, Tensor]:
    """Standard normal values of all nodes, clamped or not, (batch, *shape); integers of those that hold such."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, node in case.network.nodes.items():
        shape = (case.batch, *node.shape)
        if node.integers is None:
            found[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            found[name] = torch.randint(node.integers, shape, generator=generator)
    return found


def clamped_onto(case: Case, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with the clamped units as they are given."""
    onto = dict(state)
    for name, given in case.clamps.items():
        onto[name] = torch.where(given_units(given), given_value(given), state[name])
    return onto


def plain(case: Case, steps: int) -> Relaxation:
    """The first steps of the case's relaxation, without what makes a step more than rate · descent, and tolerance."""
    still = attrs.evolve(
        case.relaxation,
        steps=steps,
        momentum=0.0,
        nesterov=False,
        tolerance=None,
        temperature=0.0,
        multipliers=0.0,
        least_rate=None,
    )
    if still.relaxes_errors:  # whose precision does not depend on the step
        return still
    return attrs.evolve(still, precision=Horizon(case.relaxation.precision, case.relaxation.steps))


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

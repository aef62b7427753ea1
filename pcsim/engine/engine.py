"""What every engine is given (a problem), what it leaves behind (a state), and what it can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import LearningRule
from pcsim.errors import DivergenceError
from pcsim.graph.clamping import Clamping
from pcsim.graph.energy import Scale
from pcsim.graph.evaluation import Snapshot
from pcsim.graph.network import Network

Gradients = Mapping[nn.Parameter, Tensor]
"""Gradient by parameter, divided by the batch size; a parameter that no error has reached is left out."""


@attrs.frozen(eq=False)
class Clamp:
    """What is given of one node.

    Args:
        value: (batch, *shape).
        mask: which units are given, bool, (*shape) or (batch, *shape); None for all.
    """

    value: Tensor
    mask: Tensor | None = None

    def onto(self, value: Tensor | None) -> Tensor:
        """The clamped units from here, the others from ``value``."""
        if self.mask is None or value is None:
            return self.value
        return torch.where(self.mask, self.value, value)


@attrs.frozen(eq=False, slots=False)
class Problem:
    """One batch to relax: the network with its clamps, and the rules that move it.

    Args:
        clamping: the network and which of its nodes are clamped.
        clamps: what is given, by node name.
        relaxation: how the free nodes move.
        rule: how the weights learn.
        batch: number of samples.
        dtype: of all values.
        device: of all values.
        snapshot: the network's modules and parameters.
        seed: what the modules' random draws start from; the same throughout the batch.
        record: keep the energy of every node before each step and after the last.
        nudge: how far from their forward prediction to what is given clamped targets are, −1 to 1; 1 is there.
    """

    clamping: Clamping
    clamps: Mapping[str, Clamp]
    relaxation: Relaxation
    rule: LearningRule
    batch: int
    dtype: torch.dtype
    device: torch.device
    snapshot: Snapshot
    seed: int
    record: bool = False
    nudge: float = 1.0

    @property
    def network(self) -> Network:
        """The network to relax."""
        return self.clamping.network

    def scheduled(self, node: str, step: int) -> float:
        """The schedule's factor on a node's own precision at a step."""
        return self.relaxation.precision.at(step, self.clamping.levels.get(node), self.relaxation.steps)

    def precision(self, node: str, step: int) -> Scale:
        """π_n(t): a number, 0-d or (*shape)."""
        base = self.network.nodes[node].base_precision
        return self.scheduled(node, step) * (base.detach() if isinstance(base, Tensor) else base)

    def scale(self, node: str, step: int) -> Scale:
        """π_n(t) w_n: a number, 0-d or (*shape)."""
        return self.network.nodes[node].weight * self.precision(node, step)

    def scales(self, step: int) -> dict[str, Scale]:
        """π_n(t) w_n of every node with an energy."""
        return {name: self.scale(name, step) for name in self.clamping.energetic}

    def normaliser(self, node: str) -> Tensor | float:
        """−½ w log π summed over units and samples, where the precision is learned (SPEC §3); 0 elsewhere."""
        own = self.network.nodes[node]
        if own.log_precision is None:
            return 0.0
        units = own.log_precision.detach().expand(own.shape).sum()
        return -0.5 * own.weight * self.batch * units

    def origin(self, node: str, previous: State | None) -> Tensor:
        """Where a node starts that no forward pass reaches (SPEC §2, Start), (batch, *shape)."""
        shape = (self.batch, *self.network.nodes[node].shape)
        if self.relaxation.start == "previous" and previous is not None:
            before = previous.value.get(node)
            if before is not None and before.shape == shape:
                return before.to(self.device, self.dtype, copy=True)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def settled(self, largest_update: float, step: int) -> bool:
        """Whether the relaxation may stop: its updates are small, and every error has arrived."""
        tolerance = self.relaxation.tolerance
        return tolerance is not None and largest_update < tolerance and step >= max(self.arrivals.values(), default=0)

    @property
    def arrivals(self) -> dict[str, int]:
        """Level by name of the nodes with an energy that reach a target."""
        levels = self.clamping.levels
        return {name: levels[name] for name in self.clamping.energetic if name in levels}


class Record(NamedTuple):
    """What is recorded of one state."""

    energies: Tensor
    """E_n before precision, (nodes with an energy, batch)."""
    error_norms: Tensor
    """‖ε_n‖, (nodes with an energy, batch)."""
    free_energy: Tensor
    """F_t, 0-d."""

    @classmethod
    def of(cls, rows: Sequence[tuple[Tensor, Tensor]], total: Tensor, batch: int) -> Record:
        """From E_n and ‖ε_n‖ of each node."""
        if not rows:
            return cls(total.new_zeros(0, batch), total.new_zeros(0, batch), total)
        return cls(torch.stack([energy for energy, _ in rows]), torch.stack([norm for _, norm in rows]), total)


@attrs.define(eq=False)
class State:
    """Where a run has left the network; every tensor is (batch, *shape), by node name.

    Args:
        problem: what was run.
        value: v_n at the end, of every node.
        forward_value: v_n at the start.
        forward_prediction: u_n at the start, of every node that is predicted.
        steps: inference steps taken.
        energies: E_n before precision, (steps + 1, nodes with an energy, batch), if asked for.
        error_norms: ‖ε_n‖, of the same shape, if asked for.
        free_energies: F_t from the same states, (steps + 1,), if asked for.
    """

    problem: Problem
    value: dict[str, Tensor]
    forward_value: dict[str, Tensor]
    forward_prediction: dict[str, Tensor]
    steps: int = 0
    energies: Tensor | None = None
    error_norms: Tensor | None = None
    free_energies: Tensor | None = None
    counted: bool = False
    """Whether the running statistics have taken this batch in."""

    def keep(self, records: Sequence[Record]) -> None:
        """Take over what was recorded, state by state."""
        energies, norms, totals = zip(*records, strict=True)
        self.energies, self.error_norms, self.free_energies = (torch.stack(rows) for rows in (energies, norms, totals))

    @property
    def last_step(self) -> int:
        """The step whose precision weighs what is read from this state: the last one taken."""
        return max(self.steps - 1, 0)


def divergence(problem: Problem, node: str, step: int | None) -> DivergenceError:
    """The error for a latent that was lost at a step, or in the forward pass if that is None."""
    if step is None:
        return DivergenceError(
            f"node {node!r} is NaN or infinite after the forward pass, before any inference step; look at the weights, "
            "which a smaller learning rate usually keeps finite"
        )
    return DivergenceError(
        f"node {node!r} became NaN or infinite at inference step {step}; a smaller rate than "
        f"{problem.relaxation.rate:g} usually helps, or less momentum, or smaller weights or precisions"
    )


class Engine(ABC):
    """Base class of engines: one network, any number of problems on it."""

    name: ClassVar[str]

    def __init__(self, network: Network) -> None:
        self.network = network
        self.kept: State | None = None
        """The state that nodes and edges show; no later run may touch its tensors before another takes its place."""

    @abstractmethod
    def forward(self, problem: Problem) -> State:
        """Values after the feed-forward start alone (SPEC §2, Start)."""

    @abstractmethod
    def relax(
        self,
        problem: Problem,
        previous: State | None = None,
        learn: Callable[[Gradients], None] | None = None,
    ) -> State:
        """Start feed-forward, then take T inference steps (SPEC §2).

        Args:
            problem: what to relax.
            previous: state whose values ``start="previous"`` begins with.
            learn: called after every inference step with the gradients of F_t at the state before it (SPEC §4,
                incremental); None leaves the weights alone.

        Raises:
            DivergenceError: a latent became NaN or infinite.
        """

    @abstractmethod
    def gradients(self, state: State) -> Gradients:
        """Gradients of the problem's learning rule at a relaxed state (SPEC §4)."""

    @abstractmethod
    def update_statistics(self, state: State) -> None:
        """Let normalising modules take the batch into their running statistics: once, at the weight update (Eq. 6)."""

"""What every engine is given: a task, known before any tensor exists, and a batch; and what it leaves: a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import attrs
import torch
from torch import Tensor, nn

from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import LearningRule
from pcsim.engine.probe import Probe, Recording
from pcsim.graph.clamping import Clamping
from pcsim.graph.energy import Scale
from pcsim.graph.fingerprint import Fingerprint
from pcsim.graph.network import Network
from pcsim.graph.node import Node

Gradients = Mapping[nn.Parameter, Tensor]
"""Gradient by parameter, divided by the batch size; a parameter that no error has reached is left out."""


@attrs.frozen(cache_hash=True)
class Task:
    """What to compute, whatever the numbers: the graph, which of its nodes are clamped, and the rules that move it.

    Tasks are equal where they hold the same objects, so that plans and programs are kept by them.

    Args:
        clamping: the network and which of its nodes are clamped.
        fingerprint: the network's modules and parameters; another one once anything about them has changed.
        relaxation: how the free nodes move.
        rule: how the weights learn.
        learns_each_step: the weights learn during the relaxation.
        record: keep the energy of every node before each step and after the last.
        nudged: targets are clamped only a part of the way to what is given.
        target_weight: factor on the targets' energies.
        probes: what of single nodes is recorded at every step.
        streams: clamped nodes that are given anew during the relaxation, with the steps that each frame lasts.
        weighed: nodes whose own precision comes with the batch.
    """

    clamping: Clamping
    fingerprint: Fingerprint
    relaxation: Relaxation
    rule: LearningRule
    learns_each_step: bool = False
    record: bool = False
    nudged: bool = False
    target_weight: float = 1.0
    probes: tuple[Probe, ...] = ()
    streams: tuple[tuple[str, int], ...] = ()
    weighed: frozenset[str] = frozenset()

    @property
    def network(self) -> Network:
        """The network to relax."""
        return self.clamping.network

    @property
    def unwatched(self) -> Task:
        """The same, of which nothing is recorded."""
        return attrs.evolve(self, record=False, probes=())

    @property
    def held(self) -> bool:
        """Whether predictions and Jacobians stay those of the forward pass."""
        return self.relaxation.hold_predictions

    @property
    def following(self) -> tuple[str, ...]:
        """Free nodes whose values follow from their errors, which are what moves; none where values move."""
        return self.clamping.following if self.relaxation.relaxes_errors else ()

    @property
    def watched(self) -> bool:
        """Whether the energy is evaluated at every step, so that every prediction is up to date there."""
        return self.record or self.relaxation.least_rate is not None

    @property
    def probed(self) -> tuple[str, ...]:
        """Nodes whose prediction is up to date at every step, since it, or what follows from it, is recorded."""
        following = self.clamping.deterministic.union(self.following)
        return tuple(p.node for p in self.probes if p.node in following or set(p.of or ()) - {"value"})

    @property
    def closes(self) -> bool:
        """Whether predictions are brought up to date with the last step."""
        return self.watched or self.relaxation.relaxes_errors or self.relaxation.multipliers > 0

    @property
    def learns_forward(self) -> bool:
        """Whether what the weights learn from is taken from the forward pass, and the errors from their values."""
        return self.rule.at_forward or self.held

    @property
    def reads_forward(self) -> bool:
        """Whether the activity that the weights learn from is that of the forward pass."""
        return self.learns_forward or self.rule.at_arrival

    @property
    def between_steps(self) -> list[str]:
        """What is done between two steps."""
        relaxation = self.relaxation
        kinds = {
            "energies are recorded": self.record,
            "single nodes are recorded": self.probes,
            "frames follow each other": self.streams,
            "the weights learn": self.learns_each_step,
            "a tolerance may stop the relaxation": relaxation.tolerance is not None,
            "a step may be taken back (least_rate)": relaxation.least_rate is not None,
            "noise is drawn (temperature)": relaxation.temperature > 0,
            "multipliers grow": relaxation.multipliers > 0,
        }
        return [kind for kind, there in kinds.items() if there]

    def scheduled(self, node: str, step: int) -> float:
        """The schedule's factor on a node's own precision at a step."""
        return self.relaxation.precision.at(step, self.clamping.levels.get(node), self.relaxation.steps)

    def number(self, node: str) -> float | None:
        """The node's own precision where it is a number in every run of the task."""
        part = self.network.nodes[node]
        own = part.own_precision if part.log_precision is None and node not in self.weighed else None
        return own if isinstance(own, float) else None

    def precision(self, node: str, step: int, batch: Batch) -> Scale:
        """π_n(t) at the node's present own precision: a number, 0-d, (*shape), or (batch, ...) where it is given so."""
        given = batch.precision.get(node)
        own = self.network.nodes[node].own_precision if given is None else given
        return self.scheduled(node, step) * (own.detach() if isinstance(own, Tensor) else own)

    def weight(self, node: str) -> float:
        """w_n, of a target with the factor on its energy."""
        own = self.network.nodes[node].energy_weight
        return own if self.target_weight == 1 or node not in self.clamping.targets else own * self.target_weight

    def scale(self, node: str, step: int, batch: Batch) -> Scale:
        """π_n(t) w_n: a number, 0-d, (*shape) or (batch, ...)."""
        return self.weight(node) * self.precision(node, step, batch)

    def changing(self, step: int) -> tuple[str, ...]:
        """Clamped nodes whose next frame takes its place once a step has been taken."""
        last = step + 1 >= self.relaxation.steps
        return () if last else tuple(name for name, every in self.streams if (step + 1) % every == 0)

    def settled(self, largest_update: float, step: int) -> bool:
        """Whether the relaxation may stop: its updates are small, every error has arrived, and so has every frame."""
        tolerance, last = self.relaxation.tolerance, self.relaxation.steps - 1
        shown = (last - last % every for _, every in self.streams)
        settled = tolerance is not None and largest_update < tolerance
        return settled and step >= max([*self.arrivals.values(), *shown], default=0)

    @property
    def arrivals(self) -> dict[str, int]:
        """Level by name of the nodes with an energy that reach a target."""
        levels = self.clamping.levels
        return {name: levels[name] for name in self.clamping.energetic if name in levels}


@attrs.frozen(eq=False)
class Clamp:
    """What is given of one node.

    Args:
        value: (batch, *shape).
        mask: which units are given, bool, (*shape) or (batch, *shape); None for all.
        frames: what takes the value's place in turn, itself first, (frames, batch, *shape); None where it stays.
        every: inference steps for which each frame stays.
    """

    value: Tensor
    mask: Tensor | None = None
    frames: Tensor | None = None
    every: int = 1

    def at(self, step: int) -> Clamp:
        """What is given at a step."""
        return self if self.frames is None else attrs.evolve(self, value=self.frames[step // self.every])

    def onto(self, value: Tensor | None) -> Tensor:
        """The clamped units from here, the others from ``value``."""
        if self.mask is None or value is None:
            return self.value
        return torch.where(self.mask, self.value, value)


@attrs.frozen(eq=False)
class Unread:
    """Whether what is given is finite, as the device knows it; reading it would wait for the device.

    Args:
        sizes: 0-d, not negative, one for each clamp, and not finite where the clamp is not.
        refuse: looks at each clamp, and raises a ClampError that names the node.
    """

    sizes: tuple[Tensor, ...]
    refuse: Callable[[], None]


def all_finite(norms: Sequence[Tensor], unread: Unread | None = None) -> bool:
    """Whether norms are finite, 0-d, read together, and once, with what is still unread of the clamps.

    Raises:
        ClampError: a clamp is not finite.
    """
    sizes = [*norms, *(() if unread is None else unread.sizes)]
    if not sizes or math.isfinite((sizes[0] if len(sizes) == 1 else together(sizes).max()).item()):
        return True
    if unread is None:
        return False
    unread.refuse()
    return all_finite(norms)


def together(numbers: Sequence[Tensor]) -> Tensor:
    """Numbers, 0-d, wherever they lie, as one tensor, (numbers,), where the first does."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


@attrs.frozen(eq=False)
class Batch:
    """The numbers of one run.

    Args:
        clamps: what is given, by node name.
        size: number of samples.
        dtype: of all values.
        device: of the values of nodes that are not placed, and of what is summed over nodes.
        seed: what the modules' random draws start from; the same throughout the batch.
        nudge: how far from their forward prediction to what is given clamped targets are, −1 to 1; 1 is there.
        start: where placed nodes start, by name, (batch, *shape); the others of them at zero.
        unread: what is to be read of the clamps together with whether the values are finite; None where that is known.
        late: look whether values are finite once, at the end, also where the weights learn at every step.
        precision: nodes' own precisions in this run, by name, (batch, *shape) or (batch, 1, ...).
    """

    clamps: Mapping[str, Clamp]
    size: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    nudge: float = 1.0
    start: Mapping[str, Tensor] = attrs.field(factory=dict)
    unread: Unread | None = None
    late: bool = False
    precision: Mapping[str, Tensor] = attrs.field(factory=dict)

    def origin(self, node: Node) -> Tensor:
        """Where a placed node starts (SPEC §2, Start), (batch, *shape), in a tensor of its own."""
        if node.name in self.start:
            return self.start[node.name].clone(memory_format=torch.contiguous_format)
        return torch.zeros(self.size, *node.shape, dtype=self.dtype, device=node.device or self.device)

    def at(self, step: int) -> Batch:
        """What is given at a step; the same batch where nothing changes."""
        if all(clamp.frames is None for clamp in self.clamps.values()):
            return self
        return attrs.evolve(self, clamps={name: clamp.at(step) for name, clamp in self.clamps.items()})

    def clamped(self, name: str, value: Tensor) -> Tensor:
        """A node's value with what is given of it put in."""
        clamp = self.clamps.get(name)
        return value if clamp is None else clamp.onto(value)

    def given(self, name: str) -> Tensor | None:
        """Which units of a partially clamped node are given, bool, (*shape) or (batch, *shape); None of any other."""
        clamp = self.clamps.get(name)
        return None if clamp is None else clamp.mask


class Record(NamedTuple):
    """What is recorded of one state."""

    energies: Tensor
    """E_n before precision, (nodes with an energy, batch)."""
    error_norms: Tensor
    """‖ε_n‖, (nodes with an energy, batch)."""
    free_energy: Tensor
    """F_t, 0-d."""


class Values(Mapping[str, Tensor]):
    """Values by node name; of displaced nodes they are formed where they are read.

    Args:
        known: v_n of the other nodes, and where the displaced ones started, (batch, *shape).
        displacement: by how much those have moved, (batch, *shape).
    """

    def __init__(self, known: Mapping[str, Tensor], displacement: Mapping[str, Tensor]) -> None:
        self._known, self._displacement = known, displacement

    def __getitem__(self, name: str) -> Tensor:
        moved = self._displacement.get(name)
        return self._known[name] if moved is None else self._known[name] + moved

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


@attrs.define(eq=False)
class State:
    """Where a run has left the network; every tensor is (batch, *shape), by node name, and the engine's own.

    Args:
        task: what was run.
        batch: on what.
        value: v_n at the end, of every node.
        forward_value: v_n at the start.
        forward_prediction: u_n at the start, of every node that is predicted.
        displacement: v_n − u_n at the start, of nodes that keep it apart: all that they have received.
        error: ε_n of the nodes whose values follow from it, by name.
        multiplier: λ_n of the nodes that carry one, by name.
        steps: inference steps taken.
        energies: E_n before precision, (steps + 1, nodes with an energy, batch), if asked for.
        error_norms: ‖ε_n‖, of the same shape, if asked for.
        free_energies: F_t from the same states, (steps + 1,), if asked for.
        recordings: what the task's probes have seen of them, by node name.
        learned: gradients found during the relaxation, where the rule finds some there.
    """

    task: Task
    batch: Batch
    value: Mapping[str, Tensor]
    forward_value: Mapping[str, Tensor]
    forward_prediction: Mapping[str, Tensor]
    displacement: Mapping[str, Tensor] = attrs.field(factory=dict)
    error: Mapping[str, Tensor] = attrs.field(factory=dict, kw_only=True)
    multiplier: Mapping[str, Tensor] = attrs.field(factory=dict, kw_only=True)
    steps: int = 0
    energies: Tensor | None = None
    error_norms: Tensor | None = None
    free_energies: Tensor | None = None
    recordings: Mapping[str, Recording] = attrs.field(factory=dict)
    learned: Gradients = attrs.field(factory=dict)
    counted: bool = False
    """Whether the running statistics have taken this batch in."""
    altered: bool = False
    """Whether hooks, modes or what learns have been changed since, so that what was computed for it is stale."""

    def keep(self, records: Sequence[Record]) -> None:
        """Take over what was recorded, state by state."""
        energies, norms, totals = zip(*records, strict=True)
        self.energies, self.error_norms, self.free_energies = (torch.stack(rows) for rows in (energies, norms, totals))

    @property
    def last_step(self) -> int:
        """The step whose precision weighs what is read from this state: the last one taken."""
        return max(self.steps - 1, 0)


Compared = Callable[[str], tuple[Tensor, Tensor]]
"""v_n and u_n by node name, (batch, *shape), or the error and zero."""


def record(task: Task, batch: Batch, step: int, compared: Compared) -> Record:
    """Energies and errors of one state, and F_t with this step's precision (SPEC §1)."""
    nodes, names = task.network.nodes, task.clamping.energetic
    free_energy = torch.zeros(batch.size, dtype=batch.dtype, device=batch.device)
    energies, norms = free_energy.new_zeros(len(names), batch.size), free_energy.new_zeros(len(names), batch.size)
    for place, name in enumerate(names):
        now, expected = (tensor.contiguous() for tensor in compared(name))
        unit = nodes[name].energy_function.unit_energy(now, expected)
        energies[place] = _by_sample(unit)
        norms[place] = torch.linalg.vector_norm((now - expected).reshape(batch.size, -1), dim=1)
        free_energy += _weighed(task, batch, name, step, unit).to(batch.device)
    return Record(energies, norms, free_energy.sum())


def free_energies(task: Task, batch: Batch, step: int, compared: Compared) -> Tensor:
    """F_t of each sample with this step's precision, (batch,)."""
    total = torch.zeros(batch.size, dtype=batch.dtype, device=batch.device)
    for name in task.clamping.energetic:
        energy = task.network.nodes[name].energy_function
        unit = energy.unit_energy(*(tensor.contiguous() for tensor in compared(name)))
        total += _weighed(task, batch, name, step, unit).to(batch.device)
    return total


def _weighed(task: Task, batch: Batch, name: str, step: int, unit: Tensor) -> Tensor:
    """π w E_n, with −½ w log π of each unit where the precision is learned (SPEC §3), (batch,)."""
    node, weighed = task.network.nodes[name], _by_sample(task.scale(name, step, batch) * unit)
    if node.log_precision is None:
        return weighed
    return weighed - 0.5 * task.weight(name) * node.log_precision.detach().expand(node.shape).sum()


def _by_sample(unit: Tensor) -> Tensor:
    return unit.reshape(len(unit), -1).sum(1)


def precision_gradient(node: Node, value: Tensor, prediction: Tensor, factor: Scale, weight: float) -> Tensor:
    """∂/∂log π of factor · E − ½ w log π over the units that share the precision, divided by the batch size.

    Args:
        node: a node whose precision is learned.
        value: v_n, (batch, *shape).
        prediction: u_n, (batch, *shape).
        factor: π w, the node's own precision in it: a number, 0-d or (*shape).
        weight: w.
    """
    assert node.log_precision is not None
    unit = factor * node.energy_function.unit_energy(value, prediction) - 0.5 * weight
    return unit.mean(0).sum_to_size(node.log_precision.shape)

"""Relaxation: how the free nodes descend the energy (SPEC §2)."""

from __future__ import annotations

import math
import warnings
import zlib
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from pcsim.dynamics.precision import Constant, PrecisionSchedule
from pcsim.errors import PrecisionWarning, SettingError
from pcsim.graph.clamping import Clamping
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.graph.rewrite import is_auxiliary
from pcsim.messages import is_number, listed


@attrs.frozen
class Relaxation:
    """Gradient descent on the energy, all free nodes together from the same state.

    v ← v + rate · step, with g = −∂F_t/∂v, p ← g + momentum · p, and step = p, or g + momentum · p with Nesterov (as
    ``torch.optim.SGD``); p starts at zero for every batch.

    Args:
        steps: T, at least 0.
        rate: > 0.
        precision: the schedule that multiplies every node's own precision.
        momentum: 0 ≤ momentum < 1.
        nesterov: look ahead along the momentum; needs momentum.
        tolerance: stop once the largest update of any unit falls under it (and every node has been reached); None
            runs all steps.
        start: "zeros" begins with a forward pass, and with zeros where it gives no value (cycles, free roots without a
            prior); "previous" begins every free node where the last run has left it, if that was on a batch of the same
            size, else as "zeros", and so does the run after ``Simulator.forget()``: for streams, whose input changes
            while the network keeps relaxing.
        hold_predictions: the fixed-prediction assumption (arXiv 2006.04182): predictions and Jacobians stay those of
            the forward pass, so that each node compares with a prediction that it keeps. The energy is then quadratic
            in the free values; at its minimum under constant precision the errors are backprop's, on any graph
            without cycles (SPEC §2, Held predictions). Weights learn from activities of the forward pass as well.
        temperature: at least 0; above it free nodes are sampled by Langevin dynamics (Monte-Carlo predictive coding,
            Oliviers et al., PLOS Computational Biology 2024): after each step √(2 · rate · temperature) times standard
            normal numbers are added, drawn from the torch seed. Values come to follow exp(−F / temperature) as the
            rate goes to 0; with momentum they do not.
        multipliers: α, at least 0; above it every free node with a Gaussian energy carries a Lagrange multiplier λ that
            adds to its error in messages, in its own pull and in what weights learn from, and grows by α · ε after
            each step (PC-ALM, arXiv 2605.31022): the latents come to lie on their predictions while λ becomes
            backprop's adjoint. With :class:`SettledUpdate` only.
        least_rate: above 0, at most ``rate``; with it each sample has a rate of its own (Song et al., Nature
            Neuroscience 2024): a step that raises the sample's F is taken back, and one that does not lower it halves
            its rate from then on, down to this. No sample's F ever rises, and none depends on the rest of the batch.
            None keeps the rate. With constant precision and plain steps only.

    Raises:
        SettingError: a value outside its range, or two that do not go together.
    """

    relaxes_errors: ClassVar[bool] = False
    """Whether what moves are the errors, and values follow from them."""

    steps: int = attrs.field(default=20)
    rate: float = attrs.field(default=0.5)
    precision: PrecisionSchedule = attrs.field(factory=Constant, kw_only=True)
    momentum: float = attrs.field(default=0.0, kw_only=True)
    nesterov: bool = attrs.field(default=False, kw_only=True)
    tolerance: float | None = attrs.field(default=None, kw_only=True)
    start: Literal["zeros", "previous"] = attrs.field(default="zeros", kw_only=True)
    hold_predictions: bool = attrs.field(default=False, kw_only=True)
    temperature: float = attrs.field(default=0.0, kw_only=True)
    multipliers: float = attrs.field(default=0.0, kw_only=True)
    least_rate: float | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise SettingError(f"Relaxation.steps: given {self.steps!r}, expected a whole number of at least 0")
        for name in ("rate", "momentum", "temperature", "multipliers", "tolerance", "least_rate"):
            given, optional = getattr(self, name), name in ("tolerance", "least_rate")
            if not (is_number(given) or (given is None and optional)):
                expected = f"a finite number{' or None' if optional else ''}"
                raise SettingError(f"Relaxation.{name}: given {given!r}, expected {expected}")
        if self.rate <= 0:
            raise SettingError(
                f"Relaxation.rate: given {self.rate}, expected a positive number (about 0.05 to 0.8); a negative rate "
                "would climb the energy"
            )
        if not isinstance(self.precision, PrecisionSchedule):
            raise SettingError(
                f"Relaxation.precision: given {self.precision!r}, expected a schedule such as Constant(), Spiking() or "
                "Decaying()"
            )
        if not 0 <= self.momentum < 1:
            raise SettingError(f"Relaxation.momentum: given {self.momentum}, expected 0 <= momentum < 1")
        if self.nesterov and self.momentum == 0:
            raise SettingError("Relaxation.nesterov: needs a momentum above 0; set one, or leave nesterov off")
        if self.tolerance is not None and not self.tolerance > 0:
            raise SettingError(f"Relaxation.tolerance: given {self.tolerance}, expected a positive number or None")
        if self.start not in ("zeros", "previous"):
            raise SettingError(f"Relaxation.start: given {self.start!r}, expected 'zeros' or 'previous'")
        for name in ("temperature", "multipliers"):
            if getattr(self, name) < 0:
                raise SettingError(f"Relaxation.{name}: given {getattr(self, name)}, expected a number of at least 0")
        if not isinstance(self.hold_predictions, bool):
            raise SettingError(f"Relaxation.hold_predictions: given {self.hold_predictions!r}, expected True or False")
        least = self.least_rate
        if least is not None and not 0 < least <= self.rate:
            raise SettingError(f"Relaxation.least_rate: given {least}, expected 0 < least_rate <= rate ({self.rate:g})")
        self._leave_out("multipliers", "hold_predictions", "tolerance", why="multipliers grow by errors that change")
        self._leave_out("temperature", "momentum", "tolerance", why="samples are taken by plain steps, all of them")
        wont = ("momentum", "temperature", "multipliers", "hold_predictions", "tolerance")
        self._leave_out("least_rate", *wont, why="a sample's steps are judged by whether its energy falls")
        if least is not None and not isinstance(self.precision, Constant):
            raise SettingError(
                f"Relaxation.least_rate: given {least:g} with {self.precision}, under which the energy itself changes "
                "from step to step; use Constant(), or leave least_rate out"
            )

    def _leave_out(self, option: str, *others: str, why: str) -> None:
        """Refuse an option together with any of the others."""
        given = next((name for name in others if getattr(self, name)), None)
        if getattr(self, option) and given is not None:
            raise SettingError(
                f"{type(self).__name__}.{option}: given {getattr(self, option):g} with {given}="
                f"{getattr(self, given)!r}, but {why}; leave one of the two"
            )

    def check(self, clamping: Clamping) -> None:
        """Refuse a network that this relaxation cannot be run on; none by default.

        Args:
            clamping: the network, and which of its nodes are clamped.
        """

    @property
    def plain(self) -> bool:
        """Whether a value moves by rate · descent and nothing else: without momentum or a displacement of one's own."""
        usual = type(self).displacement is Relaxation.displacement and self.least_rate is None
        return usual and not (self.momentum or self.temperature)

    def noise(self, like: Tensor, seed: int, node: str, step: int) -> Tensor:
        """What a temperature adds to a node's value after a step, (batch, *shape), the same for the same seed.

        Args:
            like: of the shape, dtype and device to be.
            seed: of the batch.
            node: the node's name.
            step: the step that was taken.
        """
        generator = torch.Generator(like.device).manual_seed(seed ^ zlib.crc32(f"{node} {step}".encode()))
        drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return math.sqrt(2 * self.rate * self.temperature) * drawn

    def displacement(self, descent: Tensor, velocity: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """How far a value moves, and its new momentum; where the descent is zero and has been, it stays.

        Args:
            descent: −∂F_t/∂v, (batch, *shape).
            velocity: momentum p so far, (batch, *shape); None for zero.
        """
        if self.momentum == 0:
            return self.rate * descent, None
        velocity = descent if velocity is None else descent + self.momentum * velocity
        return self.rate * (descent + self.momentum * velocity if self.nesterov else velocity), velocity


@attrs.frozen
class ErrorRelaxation(Relaxation):
    """Gradient descent on the energy in error coordinates (ePC, Goemaere et al., arXiv 2505.20137; SPEC §2).

    What moves are the errors ε of the free nodes; values follow within the step, v = u + ε in topological order, and
    the descent in ε is −π w ε plus all that arrives at v through every later node. Each step so is one forward and one
    backward pass through the whole network: not local in space, but a deep network is reached at its first step, which
    from ε = 0 gives rate · backprop's adjoint. The energy rests where it does in :class:`Relaxation`. Networks without
    cycles only, and rules that learn from the relaxed state, such as :class:`SettledUpdate`.

    Args:
        steps: T, at least 0.
        rate: > 0, of the errors.
        precision: constant; there is no front of errors for a schedule to follow.
        momentum, nesterov, tolerance, start, temperature, least_rate: as of :class:`Relaxation`, for ε in place of v.
        hold_predictions, multipliers: not here.

    Raises:
        SettingError: a value outside its range, or two that do not go together.
    """

    relaxes_errors: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        Relaxation.__attrs_post_init__(self)
        for name in ("hold_predictions", "multipliers"):
            if getattr(self, name):
                raise SettingError(
                    f"ErrorRelaxation.{name}: given {getattr(self, name)!r}, which belongs to values that move by "
                    "their own errors; use Relaxation there, or leave it out"
                )
        if not isinstance(self.precision, Constant):
            raise SettingError(
                f"ErrorRelaxation.precision: given {self.precision}, but an error reaches every node at the first "
                "step, so that there is no arrival to wait for; use Constant()"
            )

    def check(self, clamping: Clamping) -> None:
        """Refuse a cycle, on which no order gives the values.

        Raises:
            SettingError: names the nodes.
        """
        if clamping.cyclic:
            raise SettingError(
                f"ErrorRelaxation: {listed(sorted(clamping.cyclic), 6)} lie on a cycle, so that no order gives their "
                "values from their errors; use Relaxation, or clamp one of them"
            )


STABLE_PRECISION = 0.5
"""A longer chain of identities diverges where rate · weight · precision stays above this."""


def check_delay(network: Network, relaxation: Relaxation) -> None:
    """Warn (:class:`PrecisionWarning`) of delaying nodes under a relaxation in which they do not delay (SPEC §5).

    A delaying node is predicted by an identity and has rate · peak · weight = 1, as auxiliary nodes do (peak is the
    precision at the arrival): those that were made for another rate or peak do not delay. A precision that lasts
    beyond the arrival of the error makes chains of them diverge; with Nesterov momentum the delay is not exact.

    Args:
        network: the graph.
        relaxation: how its free nodes move.
    """
    peak, *later = (relaxation.precision.at(step, 0, 4) for step in range(4))
    spikes = peak > 0 and min(later) <= STABLE_PRECISION * peak
    if not spikes:
        peak = 1.0
    gain, lasts = relaxation.rate * peak, not spikes and min(later) > STABLE_PRECISION
    auxiliary = {
        name: node.energy_weight for name, node in network.nodes.items() if is_auxiliary(node) and _identity(node)
    }
    elsewhere = {name: weight for name, weight in auxiliary.items() if not _hands_on(weight, gain)}
    if elsewhere:
        weight = next(iter(elsewhere.values()))
        warnings.warn(
            f"auxiliary nodes ({listed(elsewhere, 6)}) have weight {weight:g}, which delays an error by one step at "
            f"rate {1 / (weight * peak):g}, but the relaxation has rate {relaxation.rate:g}; give both the same rate"
            + (": " if peak == 1 else " and peak: ")
            + f"balance_paths(net, {relaxation.rate:g}{'' if peak == 1 else f', peak={peak:g}'})",
            PrecisionWarning,
            stacklevel=2,
        )
    if not lasts and not relaxation.nesterov:
        return
    delaying = {name: node for name, node in network.nodes.items() if _delays(node, gain)}
    if not delaying:
        return
    consequence = (
        f"{relaxation.precision} lasts after the error has arrived, so that a chain of them diverges; relax with "
        "Spiking() or Decaying()"
        if lasts
        else "with Nesterov momentum they hand on more than they received; use plain gradient descent, or momentum "
        "without Nesterov"
    )
    warnings.warn(
        f"nodes predicted by an identity with rate * precision * weight = 1 ({listed(delaying, 6)}) delay an error by "
        f"one step. But {consequence}",
        PrecisionWarning,
        stacklevel=2,
    )


def _delays(node: Node, gain: float) -> bool:
    made = node.energy_weight != 1.0 or is_auxiliary(node)
    return made and _hands_on(node.energy_weight, gain) and not node.deterministic and _identity(node)


def _hands_on(weight: float, gain: float) -> bool:
    """Whether a node of this weight moves by its whole error in one step."""
    return math.isclose(gain * weight, 1.0, rel_tol=1e-6)


def _identity(node: Node) -> bool:
    """Whether a node is predicted by an identity of one other."""
    modules = (node.transfer, *(edge.module for edge in node.incoming))
    return len(modules) == 2 and all(type(module) is nn.Identity for module in modules)

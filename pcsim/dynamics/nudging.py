"""Nudging: targets that draw only a little, by their place or by their weight (arXiv 2407.01163; SPEC §9)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import attrs

from pcsim.dynamics.learning import LearningRule
from pcsim.errors import SettingError
from pcsim.graph.clamping import Clamping
from pcsim.messages import is_number

Own = TypeVar("Own", bound="Nudge")


@attrs.frozen
class Nudge(ABC):
    """Base class of the ways in which targets draw only a little.

    Args:
        beta: by how much, not 0; negative pushes away.
        centred: relax with β and with −β, and learn from both; needs β > 0, and a rule that learns after the
            relaxation.

    Raises:
        SettingError: a value outside its range.
    """

    beta: float = attrs.field()
    centred: bool = attrs.field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not is_number(self.beta) or not 0 < abs(self.beta) <= 1:
            kind = type(self).__name__
            raise SettingError(f"{kind}.beta: given {self.beta!r}, expected a number from -1 to 1 other than 0")
        if self.centred and self.beta < 0:
            raise SettingError(
                f"{type(self).__name__}.beta: given {self.beta} with centred=True, expected a positive number; both "
                "signs are used"
            )

    @property
    def place(self) -> float:
        """How far from its forward prediction to what is given a target is clamped; 1 is there."""
        return 1.0

    @property
    def weight(self) -> float:
        """Factor on the targets' energies."""
        return 1.0

    @property
    @abstractmethod
    def factor(self) -> float:
        """By what the weights' gradients are multiplied; with ``centred``, the difference of both."""

    def opposite(self: Own) -> Own:
        """The same with the other sign, to one side."""
        return attrs.evolve(self, beta=-self.beta, centred=False)

    def check_rule(self, rule: LearningRule) -> None:
        """Refuse a rule that leaves nothing to be averaged.

        Raises:
            SettingError: nudging is centred, and the rule learns during the relaxation.
        """
        if self.centred and rule.every_step:
            raise SettingError(
                f"Simulator.nudging: {self} given, but {type(rule).__name__} learns during the relaxation, so that "
                "there are no two to be averaged; nudge to one side, or use another rule"
            )

    def check(self, clamping: Clamping) -> None:
        """Refuse targets of which nudging says nothing.

        Raises:
            SettingError: a target has an outgoing edge, or is none that can be nudged in this way.
        """
        for name in clamping.targets:
            node = clamping.network.nodes[name]
            if node.outgoing:
                reason, mend = f"predicts {node.outgoing[0].target_name!r} from its clamped value", "nudge sinks only"
            elif not (found := self.refusal(clamping, name)):
                continue
            else:
                reason, mend = found
            raise SettingError(f"nudging target {name!r}: it {reason}; {mend}, or leave out nudging=")

    def refusal(self, clamping: Clamping, name: str) -> tuple[str, str] | None:
        """Why a target cannot be nudged, and what mends it; None if it can."""
        return None


@attrs.frozen
class Nudging(Nudge):
    """Clamp a target to u + β (y − u), where y is what is given and u the network's own forward prediction.

    With β > 0 (positive nudging) the target is drawn towards y. With β < 0 (negative nudging) it is pushed away, and
    the gradients of the weights change sign. Centred nudging relaxes twice, with β and with −β, and averages the two:
    its gradients differ from what their direction is in the limit of a small β by the order of β², those of one-sided
    nudging by β. Gradients are not divided by β: they shrink with it, which optimizers such as Adam do not notice.

    The limit is not backprop's gradient where the latents have settled: it is that gradient preconditioned by the
    inverse of S = 1 + Σ of the products of Jacobians at the output (:class:`SoftNudging` has backprop's as its limit).

    Args:
        beta: −1 ≤ β ≤ 1, not 0; 1 is an ordinary clamp.
        centred: average over both signs; needs β > 0, and a rule that learns after the relaxation.

    Raises:
        SettingError: a value outside its range.
    """

    @property
    def place(self) -> float:
        """β."""
        return self.beta

    @property
    def factor(self) -> float:
        """The sign of β; half of it with ``centred``."""
        return 0.5 if self.centred else 1.0 if self.beta > 0 else -1.0

    def refusal(self, clamping: Clamping, name: str) -> tuple[str, str] | None:
        """A target that is clamped in part, or has another energy than the Gaussian."""
        energy = clamping.network.nodes[name].energy_function
        if name in clamping.partial:
            return "is clamped in part", "drop the mask"
        if not energy.gaussian:
            return f"has a {type(energy).__name__} energy, whose prediction is no value", "use the Gaussian energy"
        return None


@attrs.frozen
class SoftNudging(Nudge):
    """Clamp a target to what is given, and weigh its energy by β: equilibrium propagation on the energy of predictive
    coding (arXiv 2606.03584; SPEC §9).

    Gradients are those of F over β; with ``centred`` the difference of those at β and −β, over 2 β. Where the latents
    have settled they tend to backprop's gradient as β → 0, one-sided with an error of the order of β, centred of β².
    The smaller β, the smaller the errors that the latents have to settle to: relax long, and in float64 for tiny ones.

    Args:
        beta: −1 ≤ β ≤ 1, not 0; 1 is an ordinary clamp.
        centred: the difference of both signs; needs β > 0, and a rule that learns after the relaxation. With −β the
            energy falls without end where the target outweighs what holds it: keep β small.

    Raises:
        SettingError: a value outside its range.
    """

    @property
    def weight(self) -> float:
        """β."""
        return self.beta

    @property
    def factor(self) -> float:
        """1/β; half of it with ``centred``."""
        return (0.5 if self.centred else 1.0) / self.beta

"""Nudging: targets that are clamped only a little of the way to what is given (arXiv 2407.01163; SPEC §9)."""

from __future__ import annotations

import attrs

from pcsim.dynamics.learning import LearningRule
from pcsim.errors import SettingError
from pcsim.graph.clamping import Clamping


@attrs.frozen
class Nudging:
    """Clamp a target to u + β (y − u), where y is what is given and u the network's own forward prediction.

    With β > 0 (positive nudging) the target is drawn towards y. With β < 0 (negative nudging) it is pushed away, and
    the gradients of the weights change sign. Centred nudging relaxes twice, with β and with −β, and averages the two:
    its gradients differ from what their direction is in the limit of a small β by the order of β², those of one-sided
    nudging by β. Gradients are not divided by β: they shrink with it, which optimizers such as Adam do not notice.

    Args:
        beta: −1 ≤ β ≤ 1, not 0; 1 is an ordinary clamp.
        centred: average over both signs; needs β > 0, and a rule that learns after the relaxation.

    Raises:
        SettingError: a value outside its range.
    """

    beta: float = attrs.field()
    centred: bool = attrs.field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        known = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not known or not 0 < abs(self.beta) <= 1:
            raise SettingError(f"Nudging.beta: given {self.beta!r}, expected a number from -1 to 1 other than 0")
        if self.centred and self.beta < 0:
            raise SettingError(
                f"Nudging.beta: given {self.beta} with centred=True, expected a positive number; both signs are used"
            )

    @property
    def sign(self) -> int:
        """Sign of the weights' gradients: that of β."""
        return 1 if self.beta > 0 else -1

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
            SettingError: a target has an outgoing edge, is clamped in part, or has no Gaussian energy.
        """
        for name in clamping.targets:
            node = clamping.network.nodes[name]
            if node.outgoing:
                reason, mend = f"predicts {node.outgoing[0].target_name!r} from its clamped value", "nudge sinks only"
            elif name in clamping.partial:
                reason, mend = "is clamped in part", "drop the mask"
            elif not node.energy_function.gaussian:
                reason = f"has a {type(node.energy_function).__name__} energy, whose prediction is no value"
                mend = "use the Gaussian energy"
            else:
                continue
            raise SettingError(f"nudging target {name!r}: it {reason}; {mend}, or leave out nudging=")

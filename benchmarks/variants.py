"""The variants of training: which precision, which learning rule, how many steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.workloads import GRAPH_RATE, RATE, Chain, Graph, Workload


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        name: what tables call it.
        alpha: precision at every step but that of an error's arrival, where it is 1 (1/rate with the arrival rule, so
            that nothing is attenuated); None for 1 at every step.
        rule: what the weights learn from (SPEC §4).
        relaxed: what moves: values; errors, whose values follow (ePC); or values with multipliers (PC-ALM).
        latents: what a value is: of a layer's output, or of its input to the activation, which the next edge applies
            (as pydeepity has it).
        judged_after: training steps after which half squared errors are compared; before they are rounding errors.
    """

    name: str
    alpha: float | None = None
    rule: Literal["settled", "forward", "arrival", "incremental", "backprop"] = "settled"
    relaxed: Literal["values", "errors", "multipliers"] = "values"
    latents: Literal["outputs", "inputs"] = "outputs"
    judged_after: int = 5

    def fits(self, workload: Workload) -> bool:
        """Whether it makes sense there: latents are inputs of activations in plain chains alone."""
        return self.latents == "outputs" or (isinstance(workload, Chain) and not workload.channels)

    def precision(self, step: int, level: int, workload: Workload) -> float:
        """π(t) of a node so many hops from the target (SPEC §3)."""
        return self.peak(workload) if self.alpha is None or step == level else self.alpha

    def peak(self, workload: Workload) -> float:
        """π at the arrival of an error."""
        return 1 / self.rate(workload) if self.rule == "arrival" else 1.0

    def steps(self, workload: Workload) -> int:
        """T: the workload's own with constant precision, the depth with spiking."""
        if self.rule == "backprop":
            return 0
        if self.relaxed == "errors":
            return ERROR_STEPS
        return workload.steps if self.alpha is None or isinstance(workload, Graph) else workload.depth

    def rate(self, workload: Workload) -> float:
        """Of the latents."""
        if isinstance(workload, Graph):
            return GRAPH_RATE
        return RATE if self.alpha is None else workload.spiking_rate


ERROR_STEPS = 5
"""T in error coordinates, where every step reaches every layer."""
MULTIPLIER_RATE = 0.1
"""α by which multipliers grow."""
CONSTANT = Variant("constant")
CONSTANT_INPUTS = Variant("constant, inputs", latents="inputs")
SILENT = Variant("spiking-0", 0.0, "forward")
ARRIVAL = Variant("arrival", 0.0, "arrival")
SPIKING = Variant("spiking-1e-3", 1e-3, "forward")
INCREMENTAL = Variant("incremental", rule="incremental", judged_after=2)
ERRORS = Variant("errors", relaxed="errors")
MULTIPLIERS = Variant("multipliers", relaxed="multipliers")
BACKPROP = Variant("backprop", rule="backprop")
ALL = (CONSTANT, CONSTANT_INPUTS, SILENT, ARRIVAL, SPIKING, INCREMENTAL, ERRORS, MULTIPLIERS, BACKPROP)
VARIANTS = {variant.name: variant for variant in ALL}

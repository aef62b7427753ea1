"""Why is it slow? Time, products and bytes of one batch, by stage, by operation and by node or edge."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

import attrs
import torch
from torch import Tensor

from pcsim import tables
from pcsim.clamps import Clamps
from pcsim.dynamics.precision import Constant
from pcsim.engine.batched.engine import BatchedEngine
from pcsim.engine.batched.measuring import Measurement, clock, count, measured
from pcsim.engine.kernels.chain import edge_chain, transfer_chain
from pcsim.errors import SettingError
from pcsim.random_state import random_state_kept
from pcsim.simulator import Simulator

SHORT_CALL = 2e-5
"""Seconds below which a call costs more to make than to compute."""
MUCH = 0.25
"""Share of the time that is worth a word."""
MANY = 0.01
"""Share of numbers whose squares are subnormal that is: arithmetic on one may take a hundred times as long."""


@attrs.frozen(eq=False)
class Row:
    """A part of what a batch costs.

    Args:
        what: a stage, an operation, a node or an edge.
        calls: of operations.
        seconds: that they took, the median over the runs.
        products: multiplications of numbers in matrix products and convolutions.
        bytes: of the tensors that were read and written.
    """

    what: str
    calls: int
    seconds: float
    products: int
    bytes: int


@attrs.frozen(eq=False)
class Profile:
    """What one batch costs; printed, a table by stage, one of what costs most, and what would help.

    Args:
        measurements: of every operation.
        seconds: that the batch took without being measured, the median over the runs.
        advice: sentences on what would help.
    """

    measurements: Sequence[Measurement]
    seconds: float
    advice: Sequence[str]

    def by_stage(self) -> list[Row]:
        """Rows of the forward pass ("start"), of predictions and messages during the steps, and of learning."""
        return _rows((each.stage, each, 1.0) for each in self.measurements)

    def by_operation(self) -> list[Row]:
        """Rows of each kind of operation, those that take longest first."""
        return _longest(_rows((each.operation, each, 1.0) for each in self.measurements))

    def by_part(self) -> list[Row]:
        """Rows of each node and edge, those that take longest first; what serves several counts in equal parts."""
        return _longest(_rows((m, each, 1 / len(each.members)) for each in self.measurements for m in each.members))

    def __str__(self) -> str:
        """Stages, the ten operations and the ten nodes or edges that take longest, and what would help."""
        inside = sum(each.seconds for each in self.measurements)
        lines = [
            f"one batch: {1e3 * self.seconds:.3g} ms, of which {min(1.0, inside / self.seconds):.0%} in operations"
        ]
        for title, rows in (("stage", self.by_stage()), ("operation", self.by_operation()), ("part", self.by_part())):
            lines += ["", tables.text([title, *HEADINGS], _cells(rows[:10], inside))]
        return "\n".join([*lines, "", *self.advice])

    def _repr_html_(self) -> str:
        inside = sum(each.seconds for each in self.measurements)
        caption = f"one batch: {1e3 * self.seconds:.3g} ms. {' '.join(self.advice)}"
        return tables.html(["operation", *HEADINGS], _cells(self.by_operation(), inside), caption=caption)


HEADINGS = ("time", "ms", "calls", "products", "bytes")


def _cells(rows: Iterable[Row], whole: float) -> list[list[str]]:
    return [
        [
            row.what,
            f"{row.seconds / whole:.0%}",
            f"{1e3 * row.seconds:.3g}",
            f"{row.calls:,}",
            f"{row.products:,}",
            f"{row.bytes:,}",
        ]
        for row in rows
    ]


def _rows(parts: Iterable[tuple[str, Measurement, float]]) -> list[Row]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for what, each, share in parts:
        for place, number in enumerate((each.calls, each.seconds, each.products, each.bytes)):
            sums[what][place] += share * number
    return [
        Row(what, round(calls), seconds, round(products), round(size))
        for what, (calls, seconds, products, size) in sums.items()
    ]


def _longest(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row.seconds)


@random_state_kept()
def profile(simulator: Simulator, clamps: Clamps, *, runs: int = 5) -> Profile:
    """Measure what inferring, and learning where there is a target, costs for one batch.

    Operations are timed one by one, which slows the whole down a little, so the whole is timed by itself; products and
    bytes are counted in a run of their own. Weights, gradients and running statistics stay; the state that nodes and
    edges show is that of the batch. What happens around operations (reading clamps, checks, the optimizer) is in none.

    Args:
        simulator: with the batched engine; the incremental rule's learning during the steps is not measured.
        clamps: what is given.
        runs: that are timed, ≥ 1.

    Raises:
        SettingError: the engine is another one, or runs is not positive.
        PCError: as :meth:`Simulator.infer`.
    """
    if not isinstance(simulator.engine, BatchedEngine):
        raise SettingError(f"profile: the {simulator.engine.name} engine runs no operations; use engine='batched'")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise SettingError(f"profile: runs={runs!r} given, expected a whole number of at least 1")

    def batch() -> float:
        begin = time.perf_counter()
        simulator.infer(clamps)
        if learns:
            simulator.gradients()
        return time.perf_counter() - begin

    learns = False
    batch()
    plan = simulator.plan
    learns = not simulator.rule.every_step and any(
        simulator.network[name].predicted for name in plan.task.clamping.targets
    )
    batch()  # the second of the programs that take turns
    batch()
    engine, whole = simulator.engine, [batch() for _ in range(runs)]
    shown = engine.shown
    assert shown is not None
    programs, steps = engine.programs(shown), shown.steps
    with measured(programs, steps, count) as counted:
        batch()
    times = []
    for _ in range(runs):
        with measured(programs, steps, clock(shown.task.fingerprint.devices(shown.batch.device))) as timed:
            batch()
        times.append({(each.stage, each.operation, each.members): each for each in timed})
    for each in counted:
        key = each.stage, each.operation, each.members
        each.calls = times[-1][key].calls
        each.seconds = statistics.median(one[key].seconds for one in times)
    seconds = statistics.median(whole)
    numbers = [node.error for node in simulator.network.nodes.values() if node.predicted and not node.deterministic]
    numbers += simulator.gradients().values() if learns else ()
    return Profile(counted, seconds, _advice(simulator, counted, seconds, _vanishing(numbers)))


def _vanishing(numbers: Sequence[Tensor]) -> float:
    """Share of numbers on a CPU, other than zero, whose squares are subnormal there, not flushed to zero."""
    count = small = 0
    for each in filter(Tensor.is_floating_point, numbers):
        least = torch.finfo(each.dtype).tiny
        if each.device.type == "cpu" and torch.tensor(least, dtype=each.dtype) / 2 > 0:
            count += each.numel()
            small += int(((each != 0) & (each.abs() < math.sqrt(least))).sum())
    return small / max(1, count)


def _advice(
    simulator: Simulator, measurements: Sequence[Measurement], seconds: float, vanishing: float = 0.0
) -> list[str]:
    """What would help, the most first; one sentence at least."""
    network, inside = simulator.network, sum(each.seconds for each in measurements) or 1.0
    traced = {name: edge.module for name, edge in network.edges.items() if edge_chain(edge) is None}
    traced |= {
        name: node.transfer for name, node in network.nodes.items() if node.incoming and transfer_chain(node) is None
    }
    slow = defaultdict[str, float](float)
    for each in measurements:
        for member in set(each.members) & traced.keys():
            slow[member] += each.seconds / len(each.members)
    said = []
    if sum(slow.values()) > MUCH * inside:
        worst = max(slow, key=slow.__getitem__)
        said.append(
            f"{sum(slow.values()) / inside:.0%} of the time goes through autograd, most of it {worst!r} "
            f"({type(traced[worst]).__name__}), which has no kernel: register one with pcsim.register_kernel, or use a "
            "module that has one."
        )
    if vanishing > MANY:
        said.append(
            f"{vanishing:.0%} of the numbers in errors and gradients are so small that their squares are "
            "subnormal, which takes processors long, here and in optimizers such as Adam: call "
            "torch.set_flush_denormal(True) before anything else, or keep errors larger (Spiking(peak=1 / rate))."
        )
    calls = sum(each.calls for each in measurements)
    short = sum(each.seconds for each in measurements if each.seconds < SHORT_CALL * max(1, each.calls))
    around = max(0.0, seconds - inside)
    if short + around > 2 * MUCH * seconds:
        said.append(
            f"{(short + around) / max(seconds, short + around):.0%} of the time is the making of calls ({calls:,} of "
            "them), not arithmetic: give larger batches, or nodes and edges of the same kind and size, which are "
            "computed together."
        )
    relaxation, stages = simulator.relaxation, _rows((each.stage, each, 1.0) for each in measurements)
    steps = sum(row.seconds for row in stages if row.what in ("predictions", "messages"))
    if steps > 2 * MUCH * inside and isinstance(relaxation.precision, Constant) and not simulator.rule.backprop:
        said.append(
            f"{steps / inside:.0%} is spent on {relaxation.steps} steps at constant precision: fewer steps "
            "(tolerance=), or a schedule that is zero until the error arrives, such as Spiking(alpha=0) with "
            "ForwardUpdate(), of which most is left out."
        )
    longest = _longest(_rows((each.operation, each, 1.0) for each in measurements))
    return said or [
        f"Most of the time, {longest[0].seconds / inside:.0%}, goes into {longest[0].what!r}; nothing stands out."
    ]

"""What an energy or a schedule of a user's own declares, and what the engines take it for, is true."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from scipy.integrate import quad
from torch import Tensor

from pcsim.dynamics.precision import PrecisionSchedule
from pcsim.graph.energy import Energy, Scale
from pcsim.random_state import random_state_kept
from pcsim.verify.comparing import largest

FAR = 1e3
"""How far from a prediction an energy with a minimum must have risen."""


@random_state_kept()
def check_energy(
    energy: Energy,
    shape: tuple[int, ...],
    *,
    values: Tensor | None = None,
    batch: int = 3,
    tolerance: float = 1e-9,
) -> None:
    """An energy is one number per unit, or per sample; each sample's is its own; and what it declares is true.

    Both derivatives are compared with autograd's of ``unit_energy``, for a number and, where energies are per unit, for
    one number per unit as scale. Where it ``rests_at_prediction``, both are exactly zero there; where it
    ``has_minimum``, it has risen far from it; where it is ``normalised``, exp(−π E) √π has the same integral whatever
    the precision (by quadrature, of the first unit).

    Args:
        energy: the energy.
        shape: of a node's value, the batch axis left out.
        values: latent values (batch, *shape) in float64 where not all numbers make sense, such as distributions; by
            default standard normal.
        batch: number of samples, ≥ 2, where no values are given.
        tolerance: relative to the largest number compared, and at least to 1.

    Raises:
        AssertionError: one of these is not so; says which.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    value = drawn if values is None else values.detach().to(torch.float64)
    prediction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    said = repr(energy)
    unit = energy.unit_energy(value, prediction)
    per_unit = unit.shape == value.shape
    if not per_unit and unit.shape != (len(value), *[1] * len(shape)):
        raise AssertionError(
            f"{said}: unit_energy gives {tuple(unit.shape)} for values of {tuple(value.shape)}; expected one number "
            f"per unit, or per sample {(len(value), *[1] * len(shape))}"
        )
    _same(f"{said}: the energy of the first sample, with the others changed", energy.unit_energy(
        torch.cat([value[:1], value.flip(0)[1:]]), torch.cat([prediction[:1], 2 * prediction[1:]])
    )[:1], unit[:1], tolerance)  # fmt: skip
    scales: list[Scale] = [0.7]
    if per_unit:
        scales.append(torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5)
    for scale in scales:
        _derivatives(energy, value, prediction, scale, tolerance)
    _same(f"{said}: sample_energy against the sum of unit_energy",
          energy.sample_energy(value, prediction), unit.flatten(1).sum(1), tolerance)  # fmt: skip
    if energy.rests_at_prediction:
        _rests(energy, prediction)
    if energy.has_minimum and values is None:
        _rises(energy, value, prediction, generator)
    if energy.normalised:
        _normalised(energy, prediction, max(tolerance, 1e-6))


def _derivatives(energy: Energy, value: Tensor, prediction: Tensor, scale: Scale, tolerance: float) -> None:
    for place, (name, method) in enumerate(
        (("value_gradient", energy.value_gradient), ("prediction_gradient", energy.prediction_gradient))
    ):
        leaves = [value.clone().requires_grad_(), prediction.clone().requires_grad_()]
        with torch.enable_grad():
            total = (scale * energy.unit_energy(*leaves)).sum()
        found = torch.autograd.grad(total, leaves[place], allow_unused=True)[0] if total.requires_grad else None
        expected = torch.zeros_like(value) if found is None else found
        _same(f"{energy!r}: {name} against autograd", method(value, prediction, scale), expected, tolerance)


def _rests(energy: Energy, prediction: Tensor) -> None:
    for name, method in (
        ("value_gradient", energy.value_gradient),
        ("prediction_gradient", energy.prediction_gradient),
    ):
        force = method(prediction.clone(), prediction, 1.0)
        if not bool((force == 0).all()):
            raise AssertionError(
                f"{energy!r}: rests_at_prediction is True, but {name} is {force.abs().max().item():g} where value = "
                "prediction; declare it False, or make the derivative exactly zero there"
            )


def _rises(energy: Energy, value: Tensor, prediction: Tensor, generator: torch.Generator) -> None:
    near = energy.sample_energy(value, prediction)
    for _ in range(8):
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        far = energy.sample_energy(prediction + FAR * direction, prediction)
        if not bool((far > near).all()):
            raise AssertionError(
                f"{energy!r}: has_minimum is True, but {FAR:g} away from the prediction the energy is "
                f"{far.min().item():g}, below {near.max().item():g} near it; declare it False, so that free nodes are "
                "warned of"
            )


def _normalised(energy: Energy, prediction: Tensor, tolerance: float) -> None:
    centre, rest = prediction[:1].clone(), prediction[:1].clone()

    def density(at: float, precision: float) -> float:
        moved = rest.clone()
        moved.view(-1)[0] = at
        unit = energy.unit_energy(moved, centre).reshape(-1)[0].item()
        return math.exp(-precision * unit)

    middle = centre.view(-1)[0].item()
    mass = [
        math.sqrt(precision)
        * quad(density, middle - 60, middle + 60, args=(precision,), points=(middle,), limit=400)[0]
        for precision in (1.0, 4.0)
    ]
    if not math.isclose(*mass, rel_tol=tolerance):
        raise AssertionError(
            f"{energy!r}: normalised is True, but √π ∫ exp(−π E) is {mass[0]:.6g} at precision 1 and {mass[1]:.6g} at "
            "4; a precision learned with it would not be the likelihood's; declare it False"
        )


def check_schedule(
    schedule: PrecisionSchedule, *, steps: int = 12, levels: Sequence[int | None] = (None, *range(10))
) -> None:
    """A precision schedule gives finite numbers of at least 0, and the same whenever it is asked.

    The planner asks it before a run, in any order, and keeps what it said: a schedule that counts its calls, draws
    numbers, or reads anything but its arguments would be run by one answer and planned by another.

    Args:
        schedule: the schedule.
        steps: T.
        levels: to ask for.

    Raises:
        AssertionError: it does not; names step and level.
    """
    asked = [(step, level) for level in levels for step in range(steps)]
    first = {place: schedule.at(*place, steps) for place in asked}
    for (step, level), precision in first.items():
        number = isinstance(precision, int | float) and not isinstance(precision, bool)
        if not number or not 0 <= precision < math.inf:
            raise AssertionError(
                f"{schedule!r}: π = {precision!r} at step {step} of {steps}, level {level}; expected a finite "
                "number of at least 0"
            )
    others = [(place, schedule, "asked again in another order") for place in reversed(asked)]
    others += [(place, copy.deepcopy(schedule), "asked of a copy") for place in asked]
    for (step, level), whom, how in others:
        again = whom.at(step, level, steps)
        if again != first[step, level]:
            raise AssertionError(
                f"{schedule!r}: π = {first[step, level]!r} at step {step} of {steps}, level {level}, and {again!r} "
                f"{how}; it has to be a function of these three alone"
            )


def _same(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    apart = float((found - expected).abs().nan_to_num(nan=math.inf).max()) if found.numel() else 0.0
    allowed = tolerance * max(1.0, largest(expected))
    if apart > allowed:
        raise AssertionError(f"{what}: they differ by {apart:.3g}, more than {allowed:.3g}")

"""A small enough step of plain gradient descent does not raise the energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcsim.clamps import Clamps
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import LearningRule
from pcsim.errors import SettingError
from pcsim.graph.network import Network
from pcsim.random_state import random_state_kept
from pcsim.verify.case import Case, EngineChoice, in_float64
from pcsim.verify.oracle import moving_of, total_energy, values_of
from pcsim.verify.restart import OneStep, trajectory
from pcsim.verify.shrinking import report

MARGIN = 0.9
"""Fraction of the rate 2/L that a step is taken with."""
POINTS = 5
"""Points on a step's segment at which the curvature is taken, both ends included."""
MOST_UNITS = 400
"""Free units, over the whole batch, for which a Hessian is computed."""


@random_state_kept()
def check_descent(
    network: Network,
    clamps: Clamps,
    relaxation: Relaxation | None = None,
    rule: LearningRule | None = None,
    *,
    engine: EngineChoice = "batched",
    tolerance: float = 1e-9,
) -> None:
    """A plain gradient step with rate < 2/L does not raise F_t, before and after the same step (SPEC §10).

    L is the largest eigenvalue of the Hessian in what moves, taken at several points of the step's segment. The
    step is taken from every state that the relaxation passes through, at the relaxation's rate where that is small
    enough, else at 0.9 of 2/L.

    Args:
        network: the graph; a copy is used.
        clamps: what is given.
        relaxation: steps, schedule, and the rate at which its states are reached.
        rule: the learning rule; what it does after the relaxation does not matter here.
        engine: what takes the steps.
        tolerance: by how much F_t may rise, relative to its size and at least to 1.

    Raises:
        AssertionError: F_t rose; gives both numbers, and prints the smallest network found that fails, as code that
            fails again.
        SettingError: descent is not promised here (momentum, weights of 1/rate, incremental learning), or there are
            too many free units for a Hessian.
    """
    case = in_float64(network, clamps, relaxation, rule)
    _refuse(case)
    report(_check, case, check_descent, {"engine": engine, "tolerance": tolerance})


def _check(case: Case, engine: EngineChoice, tolerance: float) -> None:
    states = trajectory(case, engine)
    for step in range(case.relaxation.steps):
        _check_step(case, states[step], step, engine, tolerance)


def _refuse(case: Case) -> None:
    if case.relaxation.momentum:
        raise SettingError(
            f"check_descent: momentum {case.relaxation.momentum} given, which may raise the energy; set it to 0"
        )
    if case.rule.every_step:
        raise SettingError(
            f"check_descent: {type(case.rule).__name__} changes the weights during inference, and so the energy; give "
            "another rule"
        )
    for node in case.network.nodes.values():
        if node.energy_weight > 1 and abs(node.energy_weight * case.relaxation.rate - 1) < 1e-9:
            raise SettingError(
                f"check_descent: node {node.name!r} has weight 1/rate, as auxiliary neurons have, whose step is not "
                "small whatever the rate; check a network without them"
            )
    units = sum(int(case.free_units(name).sum()) for name in case.free)
    if units > MOST_UNITS:
        raise SettingError(
            f"check_descent: {units} free units, and a Hessian is computed for {MOST_UNITS} at most; use a smaller "
            "batch or a smaller network"
        )


def _check_step(case: Case, state: Mapping[str, Tensor], step: int, engine: EngineChoice, tolerance: float) -> None:
    energy, start = _energy_of_free_units(case, state, step)
    leaf = start.clone().requires_grad_()
    before = energy(leaf)
    if start.numel() == 0 or not before.requires_grad:
        return
    slope = torch.autograd.grad(before, leaf, allow_unused=True)[0]
    if slope is None:
        return
    descent = -slope
    rate = case.relaxation.rate
    for points in (1, *[POINTS] * 40):  # the start alone gives a first idea of the rate
        curvature = _largest_curvature(energy, start, start + rate * descent, points)
        if rate * curvature > 2 * MARGIN:
            rate = 2 * MARGIN / curvature
        elif points > 1:
            break
    careful = attrs.evolve(case, relaxation=attrs.evolve(case.relaxation, rate=rate))
    moved = OneStep(careful, step, engine).values_after(state, case.clamps)
    with torch.no_grad():
        after = total_energy(case.network, moved, case.deterministic, case.factors(step))
    rise = float(after) - float(before.detach())
    if not rise <= tolerance * max(1.0, abs(float(after))):
        raise AssertionError(
            f"step {step}: F_t rose by {rise:.6g} to {float(after):.17g} in a plain gradient step of rate {rate:.6g}, "
            f"where the largest curvature is {curvature:.6g}\n{case!r}"
        )


def _energy_of_free_units(
    case: Case, state: Mapping[str, Tensor], step: int
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """F_t as a function of all free units in one vector, and that vector at ``state``."""
    places = {name: case.free_units(name).flatten().nonzero().squeeze(1) for name in case.free}
    origin = moving_of(case, state)
    parts = [origin[name].flatten()[where] for name, where in places.items()]
    factors = case.factors(step)

    def energy(units: Tensor) -> Tensor:
        moving, taken = dict(origin), 0
        for name, where in places.items():
            part = units[taken : taken + len(where)]
            moving[name] = origin[name].flatten().index_copy(0, where, part).view_as(origin[name])
            taken += len(where)
        return total_energy(case.network, values_of(case, state, moving), case.deterministic, factors)

    return energy, torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _largest_curvature(energy: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, points: int) -> float:
    """Largest eigenvalue of the Hessian at points between two states, at least 0."""
    found = 0.0
    directions = torch.eye(len(start), dtype=start.dtype)
    for share in torch.linspace(0, 1, points).tolist():
        point = torch.lerp(start, end, share).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # attention has a second derivative in its plain form alone
            slope = torch.autograd.grad(energy(point), point, create_graph=True)[0]
        if slope.requires_grad:
            hessian = torch.autograd.grad(slope, point, directions, is_grads_batched=True)[0]
            found = max(found, float(torch.linalg.eigvalsh(hessian)[-1]))
    return found

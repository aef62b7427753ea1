"""The energy as one function of all free values: where it rests, and how it curves there. Scipy does the work."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcsim.engine.problem import State
from pcsim.errors import ConvergenceError
from pcsim.graph.statistics import frozen_statistics

Vector = npt.NDArray[np.float64]
DENSE_UNITS = 64
"""Free units up to which the whole Hessian is computed."""
NEWTON_STEPS = 8
MOST_ITERATIONS = 20_000


class Landscape:
    """F of the first inference step, as a function of all free units in one vector.

    Args:
        state: the clamps, the rules, and the values from which free nodes start.
    """

    def __init__(self, state: State) -> None:
        self._task, self._batch, self._values = state.task, state.batch, dict(state.value)
        self._units = {name: self._free_units(name) for name in state.task.clamping.free}
        parts = [self._values[name][units].to(self._batch.device) for name, units in self._units.items()]
        self.start: Vector = _numbers(torch.cat(parts)) if parts else np.zeros(0)
        """The free units of the given state, (units,)."""

    def _free_units(self, name: str) -> Tensor:
        value, clamp = self._values[name], self._batch.clamps.get(name)
        if clamp is None or clamp.mask is None:
            return torch.ones_like(value, dtype=torch.bool)
        return ~clamp.mask.expand_as(value)

    def values(self, units: Tensor) -> dict[str, Tensor]:
        """Values of the free nodes by name, (batch, *shape)."""
        found, taken = {}, 0
        for name, free in self._units.items():
            count = int(free.sum())
            own = units[taken : taken + count].to(free.device)
            found[name] = self._values[name].masked_scatter(free, own)
            taken += count
        return found

    def energy(self, units: Tensor) -> Tensor:
        """F, 0-d, differentiable twice where the modules and energies are."""
        task, nodes, clamping = self._task, self._task.network.nodes, self._task.clamping
        value = {**self._values, **self.values(units)}
        prediction: dict[str, Tensor] = {}
        inner = sorted(clamping.deterministic, key=clamping.position.__getitem__)
        for name in (*inner, *clamping.energetic):
            node = nodes[name]
            given = [edge.contribute(value[edge.source_name], self._batch.seed) for edge in node.incoming]
            seed = self._batch.seed
            prediction[name] = node.predict(given, seed) if given else node.predict_from_prior(self._batch.size)
            if name in clamping.deterministic:
                value[name] = prediction[name]
        total = units.new_zeros(())
        for name in clamping.energetic:
            unit = nodes[name].energy_function.unit_energy(value[name], prediction[name])
            total = total + (task.scale(name, 0, self._batch) * unit).sum().to(total.device)
        return total

    def _leaf(self, units: Vector) -> Tensor:
        return torch.as_tensor(units, dtype=self._batch.dtype, device=self._batch.device).requires_grad_()

    def slope(self, units: Vector) -> tuple[float, Vector]:
        """F and ∂F/∂v."""
        with torch.enable_grad(), frozen_statistics(self._task.fingerprint.normalising):
            leaf = self._leaf(units)
            energy = self.energy(leaf)
            found = torch.autograd.grad(energy, leaf, allow_unused=True)[0] if energy.requires_grad else None
        return float(energy.detach()), np.zeros_like(units) if found is None else _numbers(found)

    def hessian(self, units: Vector) -> LinearOperator:
        """∂²F/∂v² as an operator on vectors."""
        # Attention has a second derivative in its plain form alone.
        plainly, frozen = sdpa_kernel(SDPBackend.MATH), frozen_statistics(self._task.fingerprint.normalising)
        with torch.enable_grad(), plainly, frozen:
            leaf = self._leaf(units)
            slope = torch.autograd.grad(self.energy(leaf), leaf, create_graph=True)[0]

        def product(direction: Vector) -> Vector:
            if not slope.requires_grad:
                return np.zeros_like(units)
            along = torch.as_tensor(direction.reshape(-1), dtype=slope.dtype, device=slope.device)
            found = torch.autograd.grad(slope, leaf, along, retain_graph=True, allow_unused=True)[0]
            return np.zeros_like(units) if found is None else _numbers(found)

        return LinearOperator((len(units), len(units)), matvec=product, dtype=np.float64)

    def rest(self, tolerance: float) -> Vector:
        """Where every derivative of F is at most ``tolerance``: Newton's step where F is quadratic, else L-BFGS first.

        Raises:
            ConvergenceError: no such place was found.
        """
        units = self._newton(self.start, tolerance)
        if self._steepest(units) > tolerance:
            options = {"maxiter": MOST_ITERATIONS, "maxfun": 2 * MOST_ITERATIONS, "ftol": 0.0, "gtol": tolerance}
            found = minimize(self.slope, self.start, jac=True, method="L-BFGS-B", options={**options, "maxcor": 30})
            units = self._newton(np.asarray(found.x, np.float64), tolerance)
        steepest = self._steepest(units)
        if not steepest <= tolerance:
            raise ConvergenceError(
                f"no equilibrium: the largest derivative of F is still {steepest:.3g}, more than {tolerance:g}; give a "
                "larger tolerance, values to start from (init=), float64, or energies that have a minimum"
            )
        return units

    def _steepest(self, units: Vector) -> float:
        return float(np.abs(self.slope(units)[1]).max(initial=0.0))

    def _newton(self, units: Vector, tolerance: float) -> Vector:
        """Newton's steps as long as each makes the slope at least ten times smaller."""
        for _ in range(NEWTON_STEPS):
            slope = self.slope(units)[1]
            steepest = float(np.abs(slope).max(initial=0.0))
            if steepest == 0 or not np.isfinite(steepest):
                break
            step, _ = cg(self.hessian(units), -slope, rtol=1e-14, maxiter=MOST_ITERATIONS)
            moved = self._steepest(units + step)
            if not moved < 0.1 * steepest:
                return units + step if moved < steepest else units
            units = units + step
            if moved <= 1e-3 * tolerance:
                break
        return units

    def curvature(self, units: Vector) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of the Hessian."""
        hessian = self.hessian(units)
        if len(units) <= DENSE_UNITS:
            found = np.linalg.eigvalsh(hessian @ np.eye(len(units)))
            return float(found[0]), float(found[-1])
        first = np.random.default_rng(0).standard_normal(len(units))

        def end(which: str) -> float:
            return float(eigsh(hessian, k=1, which=which, v0=first, return_eigenvectors=False, tol=1e-9)[0])

        return end("SA"), end("LA")


def _numbers(tensor: Tensor) -> Vector:
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy())

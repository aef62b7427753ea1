"""Rates by sample: what happens to a sample's steps does not depend on the rest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pcsim.dynamics.inference import Relaxation
from pcsim.engine.problem import Batch


class Rates:
    """Each sample's own rate, halved where a step does not lower the sample's energy (Song et al. 2024).

    Args:
        relaxation: gives the first rate and the least.
        batch: sizes.
    """

    def __init__(self, relaxation: Relaxation, batch: Batch) -> None:
        assert relaxation.least_rate is not None
        self._least = relaxation.least_rate / relaxation.rate
        self.factor = torch.ones(batch.size, dtype=batch.dtype, device=batch.device)
        """On the relaxation's rate, (batch,)."""
        self._energy: Tensor | None = None

    def judge(self, energy: Tensor) -> Tensor | None:
        """Which samples' last step has raised their energy and is to be taken back, bool, (batch,); None for none.

        Args:
            energy: F of each sample after the step, or at the start, (batch,).
        """
        before, self._energy = self._energy, energy
        if before is None:
            return None
        fell, rose = energy < before, ~(energy <= before)  # what is NaN has not fallen
        self.factor = torch.where(fell, self.factor, (self.factor / 2).clamp(min=self._least))
        if not bool(rose.any()):
            return None
        self._energy = torch.where(rose, before, energy)
        return rose

    def scale(self, move: Tensor, axes: int) -> Tensor:
        """A step at the relaxation's rate, (..., batch, *shape) with so many axes after the batch, at each's own."""
        return move * self.factor.to(move.device).view(-1, *(1,) * axes)

    @staticmethod
    def take_back(rose: Tensor, before: Tensor, after: Tensor, axes: int) -> Tensor:
        """``before`` of the samples whose step is taken back, ``after`` of the others, shaped as in :meth:`scale`."""
        return torch.where(rose.to(after.device).view(-1, *(1,) * axes), before, after)

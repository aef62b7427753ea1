"""Comparing numbers of a run, and saying where they differ."""

from __future__ import annotations

import torch
from torch import Tensor

from pcsim.verify.case import Case


def compare(what: str, got: Tensor, expected: Tensor, tolerance: float, size: float, case: Case) -> None:
    """Raise AssertionError where two tensors differ.

    Args:
        what: names the node, edge or parameter, and the quantity.
        got: what the engine gives.
        expected: what it should give, of the same shape.
        tolerance: relative to ``size``, and at least to 1.
        size: the largest number that entered the computation.
        case: printed as code.
    """
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}\n{case!r}")
    if got.numel() == 0:
        return
    # Weights may grow beyond all bounds in a comparison; what is no number on both sides is no difference.
    difference = (got - expected).abs().nan_to_num(nan=float("inf"))
    difference = difference.masked_fill(got.isnan() & expected.isnan(), 0.0)
    allowed = tolerance * max(1.0, size)
    if float(difference.max()) > allowed:
        worst = int(torch.argmax(difference))
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
        numbers = got.flatten()[worst].item(), expected.flatten()[worst].item()
        raise AssertionError(
            f"{what}, at {index}: {numbers[0]:.17g}, expected {numbers[1]:.17g}; "
            f"they differ by {float(difference.max()):.3g}, more than {allowed:.3g}\n{case!r}"
        )


def largest(*tensors: Tensor) -> float:
    """The largest absolute number in any of these tensors; 0 if they are empty."""
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)

"""By which of PyTorch's libraries matrices are multiplied, and hyperbolic tangents taken, on a CPU.

PyTorch's own products call MKL, which leaves half of some AMD processors unused: a batch of 128 by 784x256 took 540 to
1,280 µs there, 128 by 128x128 41 to 55, with oneDNN 230 to 290 and 29 to 37 (one thread). These are 64 operations a
cycle, which Zen 5 (family 26) is the first to have. On Zen 4 (family 25) and on one with AVX2 alone the two tie, and
what oneDNN makes is still to be copied: a whole step takes up to 1.16 times as long with it. On Intel's, MKL is at
home. oneDNN's linear map is private to PyTorch, though its compiler calls it, so it is tried once, and left alone where
it is missing or wrong.

PyTorch's own tanh takes six times as long as its sigmoid (Zen 4: 2.6 ns a unit, one thread). oneDNN's, by PyTorch's
public tensors of that library, takes 0.6, with the copies there and back 1.0, and is as exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

Products: TypeAlias = Literal["auto", "torch", "onednn"]
PRODUCTS: tuple[str, ...] = get_args(Products)
FEWEST = 2**21
"""Multiplications of numbers from which on oneDNN is taken by itself: below, its calls cost what it saves."""
FEWEST_UNITS = 2**17
"""Units from which on oneDNN takes their tanh, and the most that it is given at once: the memory of larger copies would
be had from the system anew, and cleared, at every call.
"""
ZEN_5 = 26
"""Its family, the smaller models for laptops included, at which nobody has looked."""


def by_onednn(products: Products, rows: Tensor, columns: int) -> bool:
    """Whether oneDNN multiplies rows, (rows, features), with a matrix of so many columns; never a stack of them."""
    if products == "torch" or rows.dim() != 2 or rows.device.type != "cpu" or rows.dtype != torch.float32:
        return False
    return (products == "onednn" or (amd_family() >= ZEN_5 and rows.numel() * columns >= FEWEST)) and works()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows · weightᵀ + bias by oneDNN, (rows, out)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def fill_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    """Leave rows · weightᵀ + bias in ``out``, by oneDNN."""
    out.copy_(linear(rows, weight, bias))


def fill_product(rows: Tensor, weight: Tensor, factor: float = 1.0, *, out: Tensor) -> None:
    """Leave factor · rows · weight in ``out``, by oneDNN."""
    torch.mul(linear(rows, weight.mT), factor, out=out)


def add_product(rows: Tensor, weight: Tensor, factor: float, *, out: Tensor) -> None:
    """Add factor · rows · weight to ``out``, by oneDNN."""
    out.add_(linear(rows, weight.mT), alpha=factor)


def tanh_by_onednn(products: Products, value: Tensor, out: Tensor) -> bool:
    """Whether oneDNN takes the hyperbolic tangent of so many units, which lie one after the other (images do not)."""
    if products == "torch" or value.device.type != "cpu" or value.dtype != torch.float32:
        return False
    if not (products == "onednn" or (amd_family() > 0 and value.numel() >= FEWEST_UNITS)):
        return False
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and value.is_contiguous() and out.is_contiguous()


def in_parts(units: Tensor) -> tuple[Tensor, ...]:
    """The units of a contiguous tensor, in parts of about the size that oneDNN is given at once."""
    return units.view(-1).tensor_split(-(-units.numel() // FEWEST_UNITS) or 1)


def fill_tanh(parts: Sequence[Tensor], *, out: Sequence[Tensor]) -> None:
    """Leave the hyperbolic tangent of each part in the one of ``out``, by oneDNN."""
    for part, goal in zip(parts, out, strict=True):
        goal.copy_(part.to_mkldnn().tanh_().to_dense())


FILLING = (fill_linear, fill_product, add_product, fill_tanh)
"""Those that leave all they make in ``out``, as torch's own functions do."""


@lru_cache
def amd_family() -> int:
    """The family of an AMD processor with AVX-512, where Linux tells it; 0 of any other."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return 0
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return 0
    family = re.search(r"^cpu family\s*:\s*(\d+)", told, re.MULTILINE)
    return int(family[1]) if "AuthenticAMD" in told and family is not None else 0


@lru_cache
def works() -> bool:
    """Whether this PyTorch has oneDNN's linear map under the name known here, and its answer is right."""
    draw = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(*size, generator=draw) for size in ((5, 7), (3, 7), (3,)))
    try:
        found = linear(rows, weight, bias)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, functional.linear(rows, weight, bias), rtol=1e-5, atol=1e-6)

"""By which of PyTorch's libraries matrices are multiplied on a CPU.

PyTorch's own products call MKL, which leaves half of some AMD processors unused: a batch of 128 by 784x256 took 540 to
1,280 µs there, 128 by 128x128 41 to 55, with oneDNN 230 to 290 and 29 to 37 (one thread). These are 64 operations a
cycle, which Zen 5 (family 26) is the first to have. On Zen 4 (family 25) and on one with AVX2 alone the two tie, and
what oneDNN makes is still to be copied: a whole step takes up to 1.16 times as long with it. On Intel's, MKL is at
home. oneDNN's linear map is private to PyTorch, though its compiler calls it, so it is tried once, and left alone where
it is missing or wrong.
"""

from __future__ import annotations

import re
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
ZEN_5 = 26


def by_onednn(products: Products, rows: Tensor, columns: int) -> bool:
    """Whether oneDNN multiplies rows, (rows, features), with a matrix of so many columns; never a stack of them."""
    if products == "torch" or rows.dim() != 2 or rows.device.type != "cpu" or rows.dtype != torch.float32:
        return False
    return (products == "onednn" or (favoured() and rows.numel() * columns >= FEWEST)) and works()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows · weightᵀ + bias by oneDNN, (rows, out)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


@lru_cache
def favoured() -> bool:
    """Whether this is a processor on which oneDNN is the faster: AMD's with whole AVX-512 units, Zen 5 or later."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    family = re.search(r"^cpu family\s*:\s*(\d+)", told, re.MULTILINE)
    return "AuthenticAMD" in told and family is not None and int(family[1]) >= ZEN_5


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

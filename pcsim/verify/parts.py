"""The parts that random networks are made of: shapes, transfers, precisions and modules, and factories of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pcsim.graph.energy import LearnedPrecision

T = TypeVar("T")

Shape = tuple[int, ...]

NodeFactory = Callable[[Shape], st.SearchStrategy[Mapping[str, Any]] | Mapping[str, Any] | None]
"""From a node's shape to keyword arguments of :meth:`Network.add_node` (transfer, energy_weight, precision, energy), or
to a strategy for them; None for the default, where a user's own does not suit the shape."""

EdgeFactory = Callable[[Shape, Shape], st.SearchStrategy[nn.Module] | nn.Module | None]
"""From the shapes of a source and of a contribution to a new module between them, or to a strategy for one; None for
the default, where a user's own does not fit the shapes."""

SEEDS = st.integers(0, 2**16)


@cache
def shapes() -> st.SearchStrategy[Shape]:
    """Shapes of one, two or three axes, of at most four units or so."""
    one = st.tuples(st.integers(1, 4))
    two = st.tuples(st.integers(1, 2), st.integers(1, 2))
    three = st.tuples(st.integers(1, 2), st.just(2), st.integers(1, 2))
    return st.one_of(one, one, two, three)


@cache
def transfers(shape: Shape) -> st.SearchStrategy[nn.Module | None]:
    """Smooth transfers for a shape, among them one with parameters of its own; None for none."""
    makers: tuple[Callable[[], nn.Module | None], ...] = (
        lambda: None,
        nn.Tanh,
        lambda: nn.GELU(approximate="tanh"),
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(shape[-1], shape[-1])),
    )
    return st.sampled_from(makers).map(lambda make: make())


@cache
def precisions(shape: Shape, learned: bool = True) -> st.SearchStrategy[float | Tensor | LearnedPrecision]:
    """One precision for a node, one per unit, or learned ones."""
    number = st.sampled_from((1.0, 1.0, 0.5, 2.0, 0.0))
    per_unit = SEEDS.map(
        lambda seed: 0.25 + 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    asked = st.sampled_from((LearnedPrecision(), LearnedPrecision(per_unit=True)))
    return st.one_of(number, number, per_unit, *([asked] if learned else []))


@cache
def node_options(shape: Shape, *, learned_precision: bool = True) -> st.SearchStrategy[Mapping[str, Any]]:
    """The default node factory: a transfer, a weight and a precision."""
    weights = st.sampled_from((1.0, 1.0, 1.0, 0.5, 3.0, 0.0))
    drawn = st.tuples(transfers(shape), weights, precisions(shape, learned_precision))
    return drawn.map(lambda options: dict(zip(("transfer", "energy_weight", "precision"), options, strict=True)))


@cache
def linear_node_options(shape: Shape) -> st.SearchStrategy[Mapping[str, Any]]:
    """A node factory without transfers, for linear Gaussian networks; precisions are positive."""
    return precisions(shape, learned=False).map(lambda p: {"precision": p if isinstance(p, Tensor) or p else 1.5})


@cache
def linear_edge_modules(source: Shape, contribution: Shape) -> st.SearchStrategy[nn.Module]:
    """Affine modules between two shapes: dense, convolutional, or the identity where that fits."""
    kinds = ["dense"]
    if source == contribution:
        kinds.append("identity")
    if len(source) == len(contribution) in (2, 3) and source[1:] == contribution[1:]:
        kinds.append("convolution")
    if source[:-1] == contribution[:-1]:
        kinds.append("linear")
    drawn = st.tuples(st.sampled_from(kinds), st.booleans())
    return drawn.map(lambda kind_and_bias: _module(*kind_and_bias, source, contribution))


@cache
def edge_modules(source: Shape, contribution: Shape) -> st.SearchStrategy[nn.Module]:
    """The default edge factory: an affine module, now and then with a nonlinearity before it."""
    affine = linear_edge_modules(source, contribution)
    return st.one_of(affine, affine, affine.map(lambda module: nn.Sequential(nn.Tanh(), module)))


def _module(kind: str, bias: bool, source: Shape, contribution: Shape) -> nn.Module:
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(source[-1], contribution[-1], bias=bias)
    if kind == "convolution":
        convolution = nn.Conv1d if len(source) == 2 else nn.Conv2d
        return convolution(source[0], contribution[0], 3, padding=1, bias=bias)
    dense = nn.Linear(math.prod(source), math.prod(contribution), bias=bias)
    before = [nn.Flatten()] if len(source) > 1 else []
    after = [nn.Unflatten(1, contribution)] if len(contribution) > 1 else []
    return nn.Sequential(*before, dense, *after) if before or after else dense


def from_factory(
    draw: st.DrawFn, made: st.SearchStrategy[T] | T | None, otherwise: Callable[[], st.SearchStrategy[T]]
) -> T:
    """What a factory has made, drawn where it is a strategy, and of the default where it is None."""
    if made is None:
        return draw(otherwise())
    return draw(made) if isinstance(made, st.SearchStrategy) else made

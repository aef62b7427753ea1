"""The floor: the bare matrix products and convolutions that a training step cannot do without (SPEC §7).

What is left is derived here for chains from SPEC §7 alone, without pcsim's planner, and each product is called alone,
into a tensor that is there already where PyTorch can do that. No bias, no activation, no pooling, no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.contender import CPU, FLOOR, Local
from benchmarks.plain import CHANNELS_LAST
from benchmarks.variants import Variant
from benchmarks.workloads import Chain

Product: TypeAlias = tuple[Literal["forward", "message", "weight"], int]
"""What is multiplied, and in which layer, counted from 1: the one that predicts the node of that number."""


def needed_products(depth: int, steps: int, variant: Variant) -> list[Product]:
    """The products of one training step of a chain, in order."""
    products: list[Product] = [("forward", layer) for layer in range(1, depth + 1)]
    if variant.rule == "backprop":
        products += [("message", layer) for layer in range(depth, 1, -1)]
        return products + [("weight", layer) for layer in range(depth, 0, -1)]
    if variant.relaxed == "errors":  # the first layer reads what is clamped, and so is evaluated once
        again: list[Product] = [("forward", layer) for layer in range(2, depth + 1)]
        back: list[Product] = [("message", layer) for layer in range(depth, 1, -1)]
        products += [*back, *(again + back) * (steps - 1), *again]
        return products + [("weight", layer) for layer in range(depth, 0, -1)]
    moved, stale = {depth}, set[int]()
    incremental = variant.rule == "incremental"
    for step in range(steps):
        pushing = [node for node in _live(moved, depth) if variant.alpha != 0 or step == depth - node]
        products += [("forward", node) for node in pushing if node in stale]
        products += [("message", node) for node in pushing if node > 1]
        products += [("weight", node) for node in pushing if incremental]
        moving = {near for node in pushing for near in (node - 1, node) if 1 <= near < depth}
        moved |= moving
        stale = (stale - set(pushing)) | {node + 1 for node in moving} | (set(pushing) if incremental else set())
    if variant.rule == "settled":
        products += [("forward", node) for node in _live(moved, depth) if node in stale]
        products += [("weight", node) for node in _live(moved, depth)]
    elif variant.rule in ("forward", "arrival"):
        products += [("weight", node) for node in sorted(moved)]
    return products


def _live(moved: set[int], depth: int) -> list[int]:
    """Nodes whose error may differ from zero: they, or what predicts them, have moved."""
    return [node for node in range(1, depth + 1) if node in moved or node - 1 in moved]


def floor(chain: Chain, variant: Variant, layout: str, device: torch.device = CPU) -> Local:
    """The needed products of a training step, one after the other."""
    calls = [_bare(chain, layer, layout, device) for layer in range(1, chain.depth + 1)]
    products = needed_products(chain.depth, variant.steps(chain), variant)
    operations = [calls[layer - 1][kind] for kind, layer in products]

    @torch.no_grad()
    def run() -> None:
        for operation in operations:
            operation()

    return Local(variant.name, FLOOR, run, layout=layout, device=device)


def _bare(chain: Chain, layer: int, layout: str, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The three products of one layer."""
    torch.manual_seed(layer)
    weight = torch.randn(chain.weight_shapes()[layer - 1], device=device) / 100
    source = torch.randn(chain.batch, *[chain.shape, *chain.latent_shapes()][layer - 1], device=device)
    if weight.dim() == 2:
        source = source.flatten(1)
        delta = torch.randn(chain.batch, len(weight), device=device)
        return {
            "forward": partial(torch.mm, source, weight.t(), out=torch.empty_like(delta)),
            "message": partial(torch.mm, delta, weight, out=torch.empty_like(source)),
            "weight": partial(torch.mm, delta.t(), source, out=torch.empty_like(weight)),
        }
    delta = torch.randn(chain.batch, len(weight), *source.shape[2:], device=device)
    if layout == CHANNELS_LAST:
        weight, source, delta = (image.to(memory_format=torch.channels_last) for image in (weight, source, delta))

    def back(*wanted: bool) -> Tensor:
        geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, not transposed, groups
        found = torch.ops.aten.convolution_backward(delta, source, weight, None, *geometry, list(wanted))
        result: Tensor = found[0] if wanted[0] else found[1]
        return result

    return {
        "forward": lambda: functional.conv2d(source, weight, padding=1),
        "message": lambda: back(True, False, False),
        "weight": lambda: back(False, True, False),
    }

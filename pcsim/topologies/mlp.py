"""Multilayer perceptrons, plain and residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from pcsim.errors import GraphError
from pcsim.graph.energy import Energy
from pcsim.graph.network import Network


def mlp(
    sizes: Sequence[int],
    *,
    activation: Callable[[], nn.Module] = nn.Tanh,
    latents: Literal["after", "before"] = "after",
    bias: bool = True,
    energy: Energy | None = None,
) -> Network:
    """A chain of linear layers: nodes "input", "hidden1", ..., "output".

    Weights start N(0, 1/fan_in) and biases 0, so that activity keeps its scale with depth (SPEC §8).

    Args:
        sizes: units of each node, input first, output last; at least two.
        activation: makes the nonlinearity of the hidden layers.
        latents: "after" the activation, v = act(W v' + b), or "before" it, v = W act(v') + b. The output has none.
        bias: whether the linear layers have one.
        energy: of the output node; Gaussian by default.

    Raises:
        GraphError: fewer than two sizes, or an unknown place for the latents.
    """
    if len(sizes) < 2:
        raise GraphError(f"mlp: sizes {list(sizes)} given, expected at least an input and an output size")
    if latents not in ("after", "before"):
        raise GraphError(f"mlp: latents={latents!r} given, expected 'after' or 'before'")
    net = Network()
    previous = net.add_node("input", (sizes[0],))
    for depth, (before, after) in enumerate(pairwise(sizes), start=1):
        last = depth == len(sizes) - 1
        linear = _scaled_linear(before, after, bias)
        activated = latents == "before" and depth > 1
        node = net.add_node(
            "output" if last else f"hidden{depth}",
            (after,),
            transfer=activation() if latents == "after" and not last else None,
            energy=energy if last else None,
        )
        net.add_edge(previous, node, nn.Sequential(activation(), linear) if activated else linear)
        previous = node
    return net


def residual_mlp(
    features: int,
    width: int,
    classes: int,
    *,
    blocks: int,
    activation: Callable[[], nn.Module] = nn.Tanh,
    gain: float = 1.0,
    energy: Energy | None = None,
) -> Network:
    """A stack of residual blocks of two layers, with a deterministic sum after each (SPEC §5).

    Latents are pre-activations. Block k reads the sum z of the block before it: node "main{k}a" is predicted from
    act(z), "main{k}b" from act(main{k}a), and "sum{k}" = main{k}b + z, by the identity edge "skip{k}". That skip path
    is two latent hops shorter than the main path.

    Args:
        features: units of the "input" node.
        width: units of all hidden nodes.
        classes: units of the "output" node.
        blocks: number of blocks, at least 1.
        activation: makes the nonlinearity before each linear layer.
        gain: factor on what the second layer of every branch gives; 1/√blocks keeps the activity's scale with depth.
        energy: of the output node; Gaussian by default.

    Raises:
        GraphError: fewer than one block.
    """
    if blocks < 1:
        raise GraphError(f"residual_mlp: {blocks} blocks given, expected at least 1")
    net = Network()
    z = net.add_node("input", (features,))
    stem = net.add_node("stem", (width,))
    net.add_edge(z, stem, _scaled_linear(features, width, bias=True))
    z = stem
    for k in range(1, blocks + 1):
        first, second = net.add_node(f"main{k}a", (width,)), net.add_node(f"main{k}b", (width,))
        total = net.add_node(f"sum{k}", (width,), deterministic=True)
        net.add_edge(z, first, _activated_linear(activation, width, width))
        net.add_edge(first, second, _activated_linear(activation, width, width), gain=gain)
        net.add_edge(second, total)
        net.add_edge(z, total, name=f"skip{k}")
        z = total
    output = net.add_node("output", (classes,), energy=energy)
    net.add_edge(z, output, _activated_linear(activation, width, classes))
    return net


def _activated_linear(activation: Callable[[], nn.Module], before: int, after: int) -> nn.Sequential:
    return nn.Sequential(activation(), _scaled_linear(before, after, bias=True))


def _scaled_linear(before: int, after: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(before, after, bias=bias)
    nn.init.normal_(linear.weight, std=1 / math.sqrt(before))
    if bias:
        nn.init.zeros_(linear.bias)
    return linear

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

Parametrisation = Literal["standard", "mupc"]


def mlp(
    sizes: Sequence[int],
    *,
    activation: Callable[[], nn.Module] = nn.Tanh,
    latents: Literal["after", "before"] = "after",
    bias: bool = True,
    energy: Energy | None = None,
    parametrisation: Parametrisation = "standard",
) -> Network:
    """A chain of linear layers: nodes "input", "hidden1", ..., "output".

    Weights start N(0, 1/fan_in) and biases 0, so that activity keeps its scale with depth (SPEC §8). With muPC they
    start N(0, 1), and gains of the edges do the scaling, so that good rates carry over from one width and depth to
    another (Innocenti et al., arXiv 2505.13124; SPEC §9): 1/√N_in on the first edge, 1/√(N · edges) on hidden ones,
    each beside an identity edge "skip{k}" past it, and 1/N on the last. Latents are before the activation there.

    Args:
        sizes: units of each node, input first, output last; at least two.
        activation: makes the nonlinearity of the hidden layers.
        latents: "after" the activation, v = act(W v' + b), or "before" it, v = W act(v') + b. The output has none.
        bias: whether the linear layers have one; gains multiply it as well.
        energy: of the output node; Gaussian by default.
        parametrisation: "standard" or "mupc".

    Raises:
        GraphError: fewer than two sizes, an unknown place for the latents, an unknown parametrisation, or muPC with
            hidden layers of different sizes.
    """
    _check_parametrisation("mlp", parametrisation)
    if parametrisation == "mupc":
        return _mupc_mlp(sizes, activation, bias, energy)
    if len(sizes) < 2:
        raise GraphError(f"mlp: sizes {list(sizes)} given, expected at least an input and an output size")
    if latents not in ("after", "before"):
        raise GraphError(f"mlp: latents={latents!r} given, expected 'after' or 'before'")
    net = Network()
    previous = net.add_node("input", (sizes[0],))
    for depth, (before, after) in enumerate(pairwise(sizes), start=1):
        last = depth == len(sizes) - 1
        linear = linear_layer(before, after, bias)
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


def _mupc_mlp(sizes: Sequence[int], activation: Callable[[], nn.Module], bias: bool, energy: Energy | None) -> Network:
    if len(sizes) < 2 or len(set(sizes[1:-1])) > 1:
        raise GraphError(
            f"mlp: sizes {list(sizes)} given, expected an input and an output size, and hidden ones that are equal, "
            "since an identity skips each hidden layer in muPC"
        )
    net, depth = Network(), len(sizes) - 1
    previous = net.add_node("input", (sizes[0],))
    for k, (before, after) in enumerate(pairwise(sizes), start=1):
        last = k == depth
        node = net.add_node("output" if last else f"hidden{k}", (after,), energy=energy if last else None)
        linear = linear_layer(before, after, bias, std=1.0)
        gain = 1 / math.sqrt(before) if k == 1 else 1 / before if last else 1 / math.sqrt(before * depth)
        net.add_edge(previous, node, linear if k == 1 else nn.Sequential(activation(), linear), gain=gain)
        if 1 < k < depth:
            net.add_edge(previous, node, name=f"skip{k}")
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
    parametrisation: Parametrisation = "standard",
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
        parametrisation: "standard", weights N(0, 1/fan_in); or "mupc" (arXiv 2505.13124; SPEC §9), weights N(0, 1) and
            edges with gains: 1/√features into the stem, 1/√width and 1/√(width · blocks) on the two layers of a branch,
            1/width into the output.

    Raises:
        GraphError: fewer than one block, or an unknown parametrisation.
    """
    _check_parametrisation("residual_mlp", parametrisation)
    if blocks < 1:
        raise GraphError(f"residual_mlp: {blocks} blocks given, expected at least 1")
    std, gains = None, (1.0, 1.0, gain, 1.0)
    if parametrisation == "mupc":
        inner, outer = 1 / math.sqrt(width), gain * (1 / math.sqrt(width * blocks))
        std, gains = 1.0, (1 / math.sqrt(features), inner, outer, 1 / width)

    def activated(after: int) -> nn.Sequential:
        return nn.Sequential(activation(), linear_layer(width, after, True, std))

    net = Network()
    z = net.add_node("input", (features,))
    stem = net.add_node("stem", (width,))
    net.add_edge(z, stem, linear_layer(features, width, True, std), gain=gains[0])
    z = stem
    for k in range(1, blocks + 1):
        first, second = net.add_node(f"main{k}a", (width,)), net.add_node(f"main{k}b", (width,))
        total = net.add_node(f"sum{k}", (width,), deterministic=True)
        net.add_edge(z, first, activated(width), gain=gains[1])
        net.add_edge(first, second, activated(width), gain=gains[2])
        net.add_edge(second, total)
        net.add_edge(z, total, name=f"skip{k}")
        z = total
    output = net.add_node("output", (classes,), energy=energy)
    net.add_edge(z, output, activated(classes), gain=gains[3])
    return net


def _check_parametrisation(function: str, given: str) -> None:
    if given not in ("standard", "mupc"):
        raise GraphError(f"{function}: parametrisation={given!r} given, expected 'standard' or 'mupc'")


def linear_layer(before: int, after: int, bias: bool, std: float | None = None) -> nn.Linear:
    """Weights N(0, std²), with 1/fan_in by default, and zero biases."""
    linear = nn.Linear(before, after, bias=bias)
    nn.init.normal_(linear.weight, std=1 / math.sqrt(before) if std is None else std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear

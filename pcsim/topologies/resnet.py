"""Residual networks in the style for small images (He et al., arXiv 1512.03385; arXiv 2506.23800; SPEC §5 and §9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pcsim.errors import GraphError
from pcsim.graph.energy import Energy
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.topologies.vgg import Activation, checked_image, scaled_width, tanh_gelu

RESNET_DESIGNS: Mapping[str, tuple[int, ...]] = {"ResNet10": (1, 1, 1, 1), "ResNet18": (2, 2, 2, 2)}
"""Blocks of each stage, by name."""

STEM_CHANNELS = 64


def resnet(
    design: str | Sequence[int],
    *,
    image: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    width: float = 1.0,
    batch_norm: bool = False,
    activation: Activation = tanh_gelu,
    energy: Energy | None = None,
) -> Network:
    """A ResNet of blocks of two convolutions; its nodes and edges are named as those of ``residual_mlp``.

    Latents are pre-activations. "stem" is a 3x3 convolution of "input". Block k reads the sum z of the block before it
    (or the stem): node "main{k}a" is predicted from act(z), "main{k}b" from act(main{k}a), both by 3x3 convolutions,
    and the deterministic "sum{k}" = main{k}b + the edge "skip{k}", which is the identity of z, or a 1x1 convolution of
    it where the block changes stride or channels. "output" is linear in the mean of act(z) over the image. No
    convolution has a bias. Stage i has 64 · 2^i channels; each but the first starts with a stride of 2.

    These are the plain residual paths, two latent hops shorter than the main ones; the paper's network with auxiliary
    nodes is ``balance_paths(resnet(...), rate)``.

    Weights and biases start U(±1/√fan_in), PyTorch's default.

    Args:
        design: "ResNet10" or "ResNet18", or the number of blocks of each stage.
        image: channels, height and width of the "input" node; any size fits.
        classes: units of the "output" node.
        width: factor on the channels of all stages (at least 1 is left).
        batch_norm: normalise after both 3x3 convolutions of a block, not after the stem or a 1x1 convolution.
        activation: makes the nonlinearity before each 3x3 convolution of a block and before the output.
        energy: of the output node; Gaussian by default.

    Raises:
        GraphError: the name is unknown, or a number is out of its range.
    """
    stages = _stages(design)
    size = checked_image("resnet", image, classes, width)
    net = Network()
    pixels, channels = net.add_node("input", size), scaled_width(STEM_CHANNELS, width)
    z = net.add_node("stem", (channels, *size[1:]))
    net.add_edge(pixels, z, nn.Conv2d(size[0], channels, 3, padding=1, bias=False))
    block = 0
    for stage, blocks in enumerate(stages):
        channels = scaled_width(STEM_CHANNELS * 2**stage, width)
        for place in range(blocks):
            block += 1
            z = _add_block(net, z, block, channels, 2 if stage and place == 0 else 1, batch_norm, activation)
    output = net.add_node("output", (classes,), energy=energy)
    net.add_edge(
        z, output, nn.Sequential(activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    )
    return net


def _stages(design: str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(design, str):
        if design not in RESNET_DESIGNS:
            names = ", ".join(RESNET_DESIGNS)
            raise GraphError(f"resnet: {design!r} is unknown; choose one of {names}, or give the blocks of each stage")
        return RESNET_DESIGNS[design]
    if not design or min(design) < 1:
        raise GraphError(f"resnet: blocks {list(design)} given, expected at least one stage of at least one block each")
    return tuple(design)


def _add_block(
    net: Network, z: Node, k: int, channels: int, stride: int, batch_norm: bool, activation: Activation
) -> Node:
    before, height, width = z.shape
    # A padded 3x3 and a plain 1x1 convolution both leave every stride-th pixel, the first one included.
    shape = channels, -(-height // stride), -(-width // stride)

    def add_main(name: str, source: Node, stride: int) -> Node:
        # Normalisation is the node's transfer, as in vgg. With one edge into the node that equals normalising on the
        # edge, and leaves the edge as it is without normalisation.
        node = net.add_node(name, shape, transfer=nn.BatchNorm2d(channels) if batch_norm else None)
        convolution = nn.Conv2d(source.shape[0], channels, 3, stride=stride, padding=1, bias=False)
        net.add_edge(source, node, nn.Sequential(activation(), convolution))
        return node

    first = add_main(f"main{k}a", z, stride)
    second = add_main(f"main{k}b", first, 1)
    total = net.add_node(f"sum{k}", shape, deterministic=True)
    net.add_edge(second, total)
    changes = stride != 1 or before != channels
    skip = nn.Conv2d(before, channels, 1, stride=stride, bias=False) if changes else nn.Identity()
    net.add_edge(z, total, skip, name=f"skip{k}")
    return total

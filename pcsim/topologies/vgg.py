"""VGG networks: a chain of 3x3 convolutions, pooled now and then, and a linear head (arXiv 2506.23800; SPEC §9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import attrs
from torch import nn

from pcsim.errors import GraphError
from pcsim.graph.energy import Energy
from pcsim.graph.network import Network

Activation = Callable[[], nn.Module]
"""Makes a nonlinearity; called once for every place that needs one."""

tanh_gelu: Activation = partial(nn.GELU, approximate="tanh")
"""GELU in its tanh approximation, the nonlinearity of the paper's convolutional networks."""

KERNEL = 3
POOL = 2


@attrs.frozen
class Convolution:
    """One 3x3 convolution with stride 1, and what follows it before the latent.

    Args:
        channels: of its output, at least 1.
        pool: whether the activation is followed by a 2x2 max-pooling.
        padding: zeros around the image, at least 0.

    Raises:
        GraphError: a number is out of its range.
    """

    channels: int
    pool: bool = False
    padding: int = 1

    def __attrs_post_init__(self) -> None:
        if self.channels < 1 or self.padding < 0:
            raise GraphError(f"{self}: expected at least 1 channel and a padding of at least 0")


@attrs.frozen
class VGGDesign:
    """Layers of a VGG: its convolutions, and the widths of the linear layers between them and the classes."""

    convolutions: tuple[Convolution, ...]
    hidden: tuple[int, ...] = ()

    @classmethod
    def parse(cls, convolutions: str, *hidden: int) -> VGGDesign:
        """The paper's notation: channels of each convolution, then p for pooling and ° for no padding."""
        return cls(
            tuple(
                Convolution(int(word.rstrip("p°")), pool="p" in word, padding=0 if "°" in word else 1)
                for word in convolutions.split()
            ),
            hidden,
        )


VGG_DESIGNS: Mapping[str, VGGDesign] = {
    "VGG5": VGGDesign.parse("128p 256p 512p 512p"),
    "VGG7": VGGDesign.parse("128p 128 256p 256° 512p 512°"),
    "VGG9": VGGDesign.parse("64p 128 128p 256 256p 512 512p 512"),
    "VGG10": VGGDesign.parse("64 128 128p 128 256p 256 256p 256 512p"),
    "VGG11": VGGDesign.parse("64 128 128p 128 256p 256 256p 256 512p 512"),
    "VGG13": VGGDesign.parse("128 128 128p 128 256p 256 256p 256 512p 512 512p 512"),
    "VGG15": VGGDesign.parse("64 64p 128 128p 256 256 256p 512 512 512p 512 512 512p", 4096),
    "VGG19": VGGDesign.parse("64 64p 128 128p 256 256 256 256p 512 512 512 512p 512 512 512 512p"),
}
"""The paper's networks by name."""


def vgg(
    design: str | VGGDesign | Sequence[Convolution],
    *,
    image: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    width: float = 1.0,
    batch_norm: bool = False,
    activation: Activation = tanh_gelu,
    energy: Energy | None = None,
) -> Network:
    """A VGG: nodes "input", "conv1", "conv2", ..., "output", and "linear1", ... before the output where there are any.

    The convolution (with bias) is the edge's module, and normalisation, activation and pooling, in this order, are the
    node's transfer, so that latents are post-activation. The output is linear. Weights and biases start U(±1/√fan_in),
    PyTorch's default (arXiv 2506.23800; SPEC §6 and §9).

    Args:
        design: one of the paper's ("VGG5", 7, 9, 10, 11, 13, 15, 19), or layers of your own.
        image: channels, height and width of the "input" node.
        classes: units of the "output" node.
        width: factor on the channels of all convolutions and the units of hidden linear layers (at least 1 is left).
        batch_norm: normalise between each convolution and its activation.
        activation: makes the nonlinearity of all layers but the output.
        energy: of the output node; Gaussian by default.

    Raises:
        GraphError: the name is unknown, a number is out of its range, or the image is too small for the layers.
    """
    found = _design(design)
    channels, height, wide = checked_image("vgg", image, classes, width)
    net = Network()
    previous = net.add_node("input", (channels, height, wide))
    for place, layer in enumerate(found.convolutions, start=1):
        name = f"conv{place}"
        before, (height, wide) = (height, wide), (_size_after(layer, height), _size_after(layer, wide))
        if min(height, wide) < 1:
            least = _least_size(found.convolutions)
            raise GraphError(
                f"vgg: node {name!r} ({layer}) has nothing left of the {before[0]}x{before[1]} that reach it; an image "
                f"of {image[1]}x{image[2]} is given, and at least {least}x{least} is needed"
            )
        after = scaled_width(layer.channels, width)
        parts = [
            *([nn.BatchNorm2d(after)] if batch_norm else []),
            activation(),
            *([nn.MaxPool2d(POOL)] if layer.pool else []),
        ]
        node = net.add_node(name, (after, height, wide), transfer=nn.Sequential(*parts) if len(parts) > 1 else parts[0])
        net.add_edge(previous, node, nn.Conv2d(channels, after, KERNEL, padding=layer.padding))
        previous, channels = node, after
    features, flatten = channels * height * wide, [nn.Flatten()]
    for place, units in enumerate(found.hidden, start=1):
        after = scaled_width(units, width)
        node = net.add_node(f"linear{place}", (after,), transfer=activation())
        net.add_edge(previous, node, nn.Sequential(*flatten, nn.Linear(features, after)))
        previous, features, flatten = node, after, []
    output = net.add_node("output", (classes,), energy=energy)
    net.add_edge(previous, output, nn.Sequential(*flatten, nn.Linear(features, classes)))
    return net


def checked_image(function: str, image: Sequence[int], classes: int, width: float) -> tuple[int, int, int]:
    """Channels, height and width of the images; GraphError if one of the three arguments makes no sense."""
    if len(image) != 3 or min(image) < 1:
        raise GraphError(f"{function}: image {tuple(image)} given, expected (channels, height, width), each at least 1")
    if classes < 1:
        raise GraphError(f"{function}: {classes} classes given, expected at least 1")
    if not 0 < width < float("inf"):
        raise GraphError(f"{function}: width {width} given, expected a positive factor on the channels")
    return image[0], image[1], image[2]


def scaled_width(channels: int, width: float) -> int:
    """The nearest whole number to width · channels, at least 1."""
    return max(1, round(width * channels))


def _design(design: str | VGGDesign | Sequence[Convolution]) -> VGGDesign:
    if isinstance(design, VGGDesign):
        return design
    if not isinstance(design, str):
        return VGGDesign(tuple(design))
    if design not in VGG_DESIGNS:
        raise GraphError(f"vgg: {design!r} is unknown; choose one of {', '.join(VGG_DESIGNS)}, or give a VGGDesign")
    return VGG_DESIGNS[design]


def _size_after(layer: Convolution, size: int) -> int:
    size += 2 * layer.padding - (KERNEL - 1)
    return size // POOL if layer.pool else size


def _least_size(layers: Sequence[Convolution]) -> int:
    size = 1
    for layer in reversed(layers):
        size = max(1, (POOL * size if layer.pool else size) + KERNEL - 1 - 2 * layer.padding)
    return size

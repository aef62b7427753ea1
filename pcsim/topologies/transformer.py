"""Transformers: a decoder of tokens, and an encoder of images cut into patches (Vaswani et al., arXiv 1706.03762)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pcsim.errors import GraphError
from pcsim.graph.combining import Attention
from pcsim.graph.energy import CrossEntropy, Energy
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.topologies.mlp import linear_layer


class Patches(nn.Module):
    """Cuts images into square patches, row by row.

    Args:
        size: height and width of a patch, of which those of the images are multiples.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, value: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, patches, channels · size²)."""
        return nn.functional.unfold(value, self.size, stride=self.size).transpose(1, 2)

    def extra_repr(self) -> str:
        """The size, for printing."""
        return f"size={self.size}"


class Positions(nn.Module):
    """Adds to each position a vector of its own, which is learned.

    Args:
        length: number of positions.
        width: of the vectors, which start N(0, 1), as those of ``nn.Embedding`` do.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length, self.width = length, width
        self.weight = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.weight)

    def forward(self, value: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        return value + self.weight

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"length={self.length}, width={self.width}"


def transformer(
    *,
    vocabulary: int | None = None,
    length: int | None = None,
    image: Sequence[int] | None = None,
    patch: int | None = None,
    classes: int | None = None,
    width: int = 128,
    heads: int = 4,
    blocks: int = 4,
    hidden: int | None = None,
    activation: Callable[[], nn.Module] = nn.GELU,
    norm_first: bool = True,
    energy: Energy | None = None,
) -> Network:
    """A transformer: of tokens, of which each predicts the one that follows; or of an image's patches.

    With ``vocabulary`` and ``length`` it is a decoder: "input" holds integers, (length,), which are clamped; attention
    is causal; and "output" holds logits at every position, (length, vocabulary), to be clamped to the tokens that
    follow, one-hot. With ``image``, ``patch`` and ``classes`` it is an encoder: "input" holds an image, every patch
    attends to all, and "output", (classes,), is linear in their mean.

    "stem" embeds tokens or patches, with a learned vector for each position. Block k reads z, the sum of the block
    before it or the stem: latents "query{k}", "key{k}" and "value{k}" are linear in "norm{k}a", the deterministic
    LayerNorm of z; "attention{k}" combines the three (:class:`pcsim.Attention`), with a linear transfer; and the
    deterministic "sum{k}a" = attention{k} + z, by the identity edge "skip{k}a". In the same way "norm{k}b", the latent
    "mlp{k}", with two linear layers and the activation on its edge, and "sum{k}b", with "skip{k}b". "norm" comes before
    the output. The skips are two latent hops and one shorter than the paths beside them;
    ``balance_paths(transformer(...), rate)`` puts three auxiliary neurons into each block.

    Weights of linear layers start N(0, 1/fan_in), of the last before a sum N(0, 1/(2 · blocks · fan_in)), and biases 0;
    embeddings and positions N(0, 1).

    Args:
        vocabulary: number of tokens, of a decoder.
        length: of the sequence, of a decoder.
        image: channels, height and width, of an encoder.
        patch: height and width of a patch, of an encoder; the image's are multiples of it.
        classes: units of the "output" node, of an encoder.
        width: features of each position.
        heads: of attention; the width is a multiple of it.
        blocks: number of blocks, at least 1.
        hidden: units between the two linear layers of "mlp{k}", at each position; four times the width by default.
        activation: makes the nonlinearity between them.
        norm_first: normalise before attention and before the mlp, as above; False normalises each sum instead, as the
            transfer of its node (both as in ``nn.TransformerEncoderLayer``), and has no "norm" nodes.
        energy: of the output node; cross-entropy along the last axis by default.

    Raises:
        GraphError: the arguments are those of neither or both kinds, or a number is out of its range.
    """
    _check_kind(vocabulary, length, image, patch, classes)
    hidden = 4 * width if hidden is None else hidden
    given = {"vocabulary": vocabulary, "length": length, "patch": patch, "classes": classes, "blocks": blocks}
    _check_sizes({**given, "width": width, "heads": heads, "hidden": hidden})
    if width % heads:
        raise GraphError(f"transformer: width {width} and {heads} heads given, expected a multiple of the heads")
    net = Network()
    if image is None:
        assert vocabulary is not None
        assert length is not None
        positions = length
        read = net.add_node("input", (length,))
        embedding: nn.Module = nn.Embedding(vocabulary, width)
        parts = [embedding]
    else:
        assert patch is not None
        channels, height, across = _checked_image(image, patch)
        positions = (height // patch) * (across // patch)
        read = net.add_node("input", (channels, height, across))
        parts = [Patches(patch), linear_layer(channels * patch**2, width, True)]
    z = net.add_node("stem", (positions, width))
    net.add_edge(read, z, nn.Sequential(*parts, Positions(positions, width)))
    for k in range(1, blocks + 1):
        z = _add_block(net, z, k, Attention(heads, image is None), hidden, activation, norm_first, blocks)
    z = _normalised(net, z, "norm") if norm_first else z
    head = vocabulary if classes is None else classes
    assert head is not None
    linear = linear_layer(width, head, True)
    entropy = CrossEntropy(axis=-1) if energy is None else energy
    output = net.add_node("output", (head,) if classes is not None else (positions, head), energy=entropy)
    mean = nn.AdaptiveAvgPool2d((1, None)), nn.Flatten()
    net.add_edge(z, output, nn.Sequential(*mean, linear) if classes is not None else linear)
    return net


def _add_block(
    net: Network,
    z: Node,
    k: int,
    attention: Attention,
    hidden: int,
    activation: Callable[[], nn.Module],
    norm_first: bool,
    blocks: int,
) -> Node:
    width = z.shape[-1]

    def last_layer(features: int) -> nn.Linear:
        return linear_layer(features, width, True, 1 / math.sqrt(2 * blocks * features))

    def add_sum(half: str, branch: Node, z: Node) -> Node:
        norm = None if norm_first else nn.LayerNorm(width)
        total = net.add_node(f"sum{k}{half}", z.shape, transfer=norm, deterministic=True)
        net.add_edge(branch, total)
        net.add_edge(z, total, name=f"skip{k}{half}")
        return total

    read = _normalised(net, z, f"norm{k}a") if norm_first else z
    parts = [net.add_node(f"{name}{k}", z.shape) for name in ("query", "key", "value")]
    attended = net.add_node(f"attention{k}", z.shape, combine=attention, transfer=last_layer(width))
    for part in parts:
        net.add_edge(read, part, linear_layer(width, width, True))
        net.add_edge(part, attended)
    z = add_sum("a", attended, z)
    read = _normalised(net, z, f"norm{k}b") if norm_first else z
    mlp = net.add_node(f"mlp{k}", z.shape)
    net.add_edge(read, mlp, nn.Sequential(linear_layer(width, hidden, True), activation(), last_layer(hidden)))
    return add_sum("b", mlp, z)


def _normalised(net: Network, z: Node, name: str) -> Node:
    """A deterministic node, so that what reads it shares one normalisation."""
    norm = net.add_node(name, z.shape, deterministic=True)
    net.add_edge(z, norm, nn.LayerNorm(z.shape[-1]))
    return norm


def _check_kind(
    vocabulary: int | None, length: int | None, image: Sequence[int] | None, patch: int | None, classes: int | None
) -> None:
    decoder, encoder = (vocabulary, length), (image, patch, classes)
    if [None not in decoder, any(part is not None for part in encoder)] == [True, False]:
        return
    if [None not in encoder, any(part is not None for part in decoder)] == [True, False]:
        return
    raise GraphError(
        f"transformer: vocabulary={vocabulary}, length={length}, image={image}, patch={patch}, classes={classes} "
        "given, expected vocabulary and length alone, of a decoder, or image, patch and classes alone, of an encoder"
    )


def _check_sizes(sizes: dict[str, int | None]) -> None:
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise GraphError(f"transformer: {name}={size!r} given, expected a whole number of at least 1")


def _checked_image(image: Sequence[int], patch: int) -> tuple[int, int, int]:
    if len(image) != 3 or min(image) < 1 or image[1] % patch or image[2] % patch:
        raise GraphError(
            f"transformer: image {tuple(image)} and patch {patch} given, expected positive channels, height and width, "
            f"the last two multiples of {patch}"
        )
    channels, height, width = image
    return channels, height, width

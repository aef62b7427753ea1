"""Chains: what an edge or a transfer computes, as kernels one after the other, where all its modules have one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import nn

from pcsim.engine.kernels.activation import Activation
from pcsim.engine.kernels.elementwise import Gain
from pcsim.engine.kernels.images import MaxPool2d
from pcsim.engine.kernels.kernel import Kernel, changed, kernel_for
from pcsim.engine.kernels.pooled import PooledActivation
from pcsim.graph.combining import Sum
from pcsim.graph.edge import Edge
from pcsim.graph.node import Node
from pcsim.graph.probing import parameters_of, probe, tensor_options, zeros_for


class Link(NamedTuple):
    """One module of a chain, with its kernel."""

    kernel: Kernel[Any]
    module: nn.Module

    @property
    def in_place(self) -> bool:
        """Whether an error can be pulled back over itself: unit by unit, and no weights learn from the error."""
        return self.kernel.elementwise and next(self.module.parameters(), None) is None


def chain_of(module: nn.Module, shape: tuple[int, ...]) -> list[Link] | None:
    """A module as a chain of kernels; None if one of its parts has none.

    Args:
        module: an edge's, or a transfer.
        shape: of a value, the batch axis left out.
    """
    if type(module) is not nn.Sequential or changed(module):
        kernel = kernel_for(module, shape)
        if kernel is None:
            return None
        return [] if kernel.identity else [Link(kernel, module)]
    chain: list[Link] = []
    for place, child in enumerate(module):
        links = chain_of(child, shape)
        if links is None:
            return None
        chain += links
        if place < len(module) - 1 and links:
            shape = shape_after(child, shape, module)
    return chain


def _joined(links: Sequence[Link]) -> list[Link]:
    """A chain with each activation and the max-pooling that follows it as one link."""
    if len(links) < 2:
        return list(links)
    joined: list[Link] = []
    for link in links:
        before = joined[-1].kernel if joined else None
        if type(link.kernel) is MaxPool2d and isinstance(before, Activation):
            both = nn.Sequential(joined.pop().module, link.module)
            link = Link(PooledActivation(before, link.kernel), both)
        joined.append(link)
    return joined


def shape_after(child: nn.Module, shape: tuple[int, ...], whole: nn.Module) -> tuple[int, ...]:
    """The shape of what a part of a module makes of a value, batch axes left out."""
    dtype, device = tensor_options(child, whole)
    return tuple(probe(child, [zeros_for(child, shape, dtype, device)]).shape[1:])


def shapes_in(chain: Sequence[Link], shape: tuple[int, ...], whole: nn.Module) -> list[tuple[int, ...]]:
    """The shape of every place of a chain, the batch axis left out: of the first link's input, and of all outputs."""
    shapes = [shape]
    for link in chain:
        shapes.append(shape_after(link.module, shapes[-1], whole))
    return shapes


def fills(chain: Sequence[Link], shares: Sequence[int], place: int) -> bool:
    """Whether all that write to a place, in chain order, do so into what they are given."""
    return all(chain[link].kernel.fills_out for link in range(max(shares.index(place) - 1, 0), place))


def shared_places(chain: Sequence[Link], first: int) -> list[int]:
    """For each of a chain's places, the later place whose tensor it shares because a kernel works in place.

    Args:
        chain: place i is the input of link i, the last place the output.
        first: the first place that may be overwritten.
    """
    shares = list(range(len(chain) + 1))
    for place in reversed(range(first, len(chain))):
        needed_before = place > 0 and chain[place - 1].kernel.reads == "output"
        if chain[place].in_place and chain[place].kernel.reads != "input" and not needed_before:
            shares[place] = shares[place + 1]
    return shares


def signature(chain: Sequence[Link]) -> Hashable:
    """Equal for chains that may be computed together."""
    return tuple(
        (
            type(link.kernel),
            link.kernel.signature(link.module),
            tuple(p.requires_grad for p in parameters_of(link.module)),
        )
        for link in chain
    )


def edge_chain(edge: Edge) -> list[Link] | None:
    """What an edge contributes, as a chain; None where it goes through autograd."""
    chain = chain_of(edge.module, edge.source.shape)
    if chain is None:
        return None
    return _joined(chain) if edge.gain == 1.0 else [*_joined(chain), Link(Gain(edge.gain), nn.Identity())]


def transfer_chain(node: Node) -> list[Link] | None:
    """What makes a prediction of the sum of contributions, as a chain; None where it, or the sum, is autograd's."""
    if type(node.combine) is not Sum or changed(node.combine) or node.prior is not None:
        return None
    chain = chain_of(node.transfer, inlet_shape(node))
    return None if chain is None else _joined(chain)


def inlet_shape(node: Node) -> tuple[int, ...]:
    """The shape of what edges contribute to a node, the batch axis left out."""
    return next((edge.contribution_shape for edge in node.incoming), node.shape)

"""Probes: what of a node is recorded at every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import attrs
import torch
from torch import Tensor

from pcsim.errors import SettingError
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.messages import listed

PARTS = ("value", "prediction", "error")
Units = tuple[tuple[int, ...], ...]


def _parts(of: object) -> tuple[str, ...] | None:
    if of is None:
        return None
    parts = (of,) if isinstance(of, str) else tuple(of) if isinstance(of, Iterable) else ()
    if not parts or not set(parts) <= set(PARTS):
        raise SettingError(f"Probe: of={of!r} given, expected some of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in parts)


def _units(units: object) -> Units | None:
    if units is None:
        return None
    try:
        places = torch.as_tensor(units)
    except (TypeError, ValueError, RuntimeError):
        places = torch.empty(0)
    if places.dtype == torch.bool:
        places = places.nonzero()
    if places.dim() == 1:
        places = places.unsqueeze(1)
    if places.dim() != 2 or not places.numel() or places.is_floating_point():
        raise SettingError(
            f"Probe: units={units!r} given, expected numbers of units, such as [0, 3], one tuple each where values "
            "have several axes, or a boolean tensor that marks at least one"
        )
    return tuple(tuple(place) for place in places.tolist())


def _name(node: str | Node) -> str:
    return node.name if isinstance(node, Node) else node


@attrs.frozen
class Probe:
    """What is recorded of one node, in the state before each step and after the last.

    Recording a prediction, or an error, has it evaluated at every step; nothing else is computed or kept for it.

    Args:
        node: the node, or its name.
        units: which of its units: their numbers, a tuple of numbers each where the node's shape has several axes, or a
            boolean tensor of its shape; None for all.
        of: "value", "prediction", "error", or several of them; by default all that the node has.

    Raises:
        SettingError: an argument is none of these.
    """

    node: str = attrs.field(converter=_name)
    units: Units | None = attrs.field(default=None, converter=_units, kw_only=True)
    of: tuple[str, ...] | None = attrs.field(default=None, converter=_parts, kw_only=True)

    def on(self, network: Network) -> Probe:
        """The same, with what the node of a network has of its parts; SettingError where it has not."""
        if self.node not in network.nodes:
            raise SettingError(f"record: no node {self.node!r}; the network has {listed(network.nodes)}")
        node = network.nodes[self.node]
        for place in self.units or ():
            inside = all(-size <= at < size for at, size in zip(place, node.shape, strict=False))
            if len(place) != len(node.shape) or not inside:
                shown = place[0] if len(place) == 1 else place
                raise SettingError(
                    f"record: unit {shown} of node {self.node!r} given, but its values have the shape {node.shape}"
                )
        if not node.predicted and set(self.of or ()) - {"value"}:
            raise SettingError(
                f"record: {' and '.join(self.of or ())} of node {self.node!r} asked for, but no edge leads into it and "
                "it has no prior, so it has neither prediction nor error; record its value"
            )
        return attrs.evolve(self, of=self.of or (PARTS if node.predicted else PARTS[:1]))

    def chosen(self, tensor: Tensor) -> Tensor:
        """The recorded units of (batch, *shape), (batch, units), or all of them, in a tensor of its own."""
        if self.units is None:
            return tensor.clone(memory_format=torch.contiguous_format)
        places = torch.tensor(self.units, device=tensor.device)
        return tensor.movedim(0, -1)[places.unbind(1)].movedim(-1, 0)


class Recording(NamedTuple):
    """What was recorded of one node: (steps + 1, batch, *shape), or (steps + 1, batch, units); None what was not."""

    value: Tensor | None = None
    """v_n."""
    prediction: Tensor | None = None
    """u_n."""
    error: Tensor | None = None
    """ε_n."""
    units: Units | None = None
    """Which units of the node these are, one tuple of numbers each; None where they are all."""


Probed = Mapping[str, Mapping[str, Tensor]]
"""What is recorded of one state, by node name and part."""


def recordings(probes: Iterable[Probe], states: list[Probed]) -> dict[str, Recording]:
    """What was recorded state by state, by node name."""
    return {
        probe.node: Recording(
            **{part: torch.stack([state[probe.node][part] for state in states]) for part in probe.of or ()},
            units=probe.units,
        )
        for probe in probes
    }

"""What is given for a run, read and checked before any work starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pcsim.engine.problem import Clamp, Unread
from pcsim.errors import ClampError
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.messages import listed

Given = Tensor | tuple[Tensor, Tensor]
Clamps = Mapping[str, Given] | Mapping[Node, Given] | Mapping[str | Node, Given]
"""What is given, by node or its name: (batch, *shape), or a pair of that and a boolean mask of the given units."""


def read(
    network: Network, clamps: Clamps, options: tuple[torch.dtype, torch.device] | None
) -> tuple[dict[str, Clamp], Unread | None]:
    """What is given, by node name, and whether it is finite, where that is still to be read from the device.

    On a CPU, where reading costs nothing, what is not finite is refused at once.

    Args:
        network: whose nodes are clamped.
        clamps: as the user gave them.
        options: dtype and device of the network's parameters; None if it has none.

    Raises:
        ClampError: a clamp does not fit; names the node.
    """
    named = _by_name(network, clamps)
    values = (given[0] if isinstance(given, tuple) and given else given for given in named.values())
    some = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    dtype, device = options or network.tensor_options(otherwise=some)
    late = not reads_freely(device)
    fits = {name: _clamp(network, name, given, dtype, device, late) for name, given in named.items()}
    if not fits:
        raise ClampError("nothing is clamped, so the batch size is unknown; clamp at least one node")
    sizes = {name: len(clamp.value) for name, clamp in fits.items()}
    batch = next(iter(sizes.values()))
    for name, size in sizes.items():
        if size != batch:
            raise ClampError(
                f"clamp {name!r}: batch of {size} given, but {next(iter(sizes))!r} has {batch}; clamp all nodes with "
                "the same number of samples"
            )
    return fits, _unread(fits) if late else None


def reads_freely(device: torch.device) -> bool:
    """Whether reading a number waits for nothing."""
    return device.type == "cpu"


def _unread(fits: Mapping[str, Clamp]) -> Unread:
    def refuse() -> None:
        for name, clamp in fits.items():
            if not bool(torch.isfinite(clamp.value).all()):
                raise _unfinite(name, masked=clamp.mask is not None)

    return Unread(tuple(clamp.value.sum().abs() for clamp in fits.values()), refuse)


def _unfinite(name: str, *, masked: bool) -> ClampError:
    if masked:
        return ClampError(f"clamp {name!r}: a given unit is NaN or infinite; clean the data, or mask it as well")
    return ClampError(f"clamp {name!r}: holds NaN or infinity; clean the data, or mask the unknown units")


def read_start(
    network: Network, start: Mapping[str | Node, Tensor], clamps: Mapping[str, Clamp], unread: Unread | None
) -> tuple[dict[str, Tensor], Unread | None]:
    """Where free nodes start, by node name, and what is still to be read, as of :func:`read`.

    Args:
        network: whose nodes they are.
        start: as the user gave it.
        clamps: what is given beside it.
        unread: of those; None where all is read at once.

    Raises:
        ClampError: a value does not fit, or its node is none that moves; names the node.
    """
    first = next(iter(clamps.values())).value
    found = {}
    for name, value in _by_name(network, start, "init").items():
        if name not in network.nodes:
            raise ClampError(f"init {name!r}: no such node; the network has {listed(network.nodes)}")
        node = network.nodes[name]
        full = name in clamps and clamps[name].mask is None
        if full or node.deterministic:
            why = "is clamped" if full else "is deterministic, so that its value is its prediction"
            raise ClampError(f"init {name!r}: the node {why}; leave it out")
        found[name] = _value(name, value, node.shape, first.dtype, first.device, "init").detach()
        if len(found[name]) != len(first):
            raise ClampError(
                f"init {name!r}: batch of {len(found[name])} given, but {next(iter(clamps))!r} is clamped for "
                f"{len(first)}; give the same number of samples"
            )

    def refuse() -> None:
        if unread is not None:
            unread.refuse()
        for name, value in found.items():
            if not bool(torch.isfinite(value).all()):
                raise ClampError(f"init {name!r}: holds NaN or infinity; give finite values")

    if unread is None:
        refuse()
        return found, None
    return found, Unread((*unread.sizes, *(value.sum().abs() for value in found.values())), refuse)


def _by_name(network: Network, clamps: Clamps, kind: str = "clamp") -> dict[str, Given]:
    if not isinstance(clamps, Mapping) or not all(isinstance(node, str | Node) for node in clamps):
        what = "clamps" if kind == "clamp" else kind
        raise ClampError(
            f"{what}: {type(clamps).__name__} given, expected a dictionary from nodes or their names to tensors, such "
            "as {'input': images, 'output': targets}"
        )
    named = {}
    for node, given in clamps.items():
        name = node if isinstance(node, str) else node.name
        if not isinstance(node, str) and node not in network:
            raise ClampError(f"{kind} {name!r}: that node belongs to another network; pass this one's, or its name")
        if name in named:
            raise ClampError(f"{kind} {name!r}: given twice, by name and by node; give it once")
        named[name] = given
    return named


def _clamp(network: Network, name: str, given: Given, dtype: torch.dtype, device: torch.device, late: bool) -> Clamp:
    known = network.nodes
    if name not in known:
        raise ClampError(f"clamp {name!r}: no such node; the network has {listed(known)}")
    if isinstance(given, tuple) and len(given) != 2:
        raise ClampError(f"clamp {name!r}: a tuple of {len(given)} given, expected a pair of values and a mask")
    value, mask = given if isinstance(given, tuple) else (given, None)
    value = _value(name, value, known[name].shape, dtype, device)
    # The sum tells at a fraction of the cost; only where it overflows does every unit have to be looked at.
    finite = late or math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())
    if mask is None:
        if not finite:
            raise _unfinite(name, masked=False)
        return Clamp(value.detach())
    shape = known[name].shape
    if not isinstance(mask, Tensor):
        raise ClampError(f"clamp {name!r}: a mask of type {type(mask).__name__} given, expected a boolean tensor")
    if mask.dtype != torch.bool or tuple(mask.shape) not in (shape, tuple(value.shape)):
        raise ClampError(
            f"clamp {name!r}: mask of {mask.dtype} and shape {tuple(mask.shape)} given, expected torch.bool of shape "
            f"{shape} or {tuple(value.shape)}; True marks the units that are given"
        )
    mask = mask.to(device)
    if late:  # the same without asking whether it has to be done
        value = torch.where(mask | torch.isfinite(value).all(), value, 0)
    elif not finite:
        value = torch.where(mask, value, 0)
        if not bool(torch.isfinite(value).all()):
            raise _unfinite(name, masked=True)
    return Clamp(value.detach(), mask)


def _value(
    name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: str = "clamp"
) -> Tensor:
    expected = f"(batch, {', '.join(map(str, shape))})"
    if not isinstance(value, Tensor):
        raise ClampError(f"{kind} {name!r}: {type(value).__name__} given, expected a tensor {expected}")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise ClampError(
            f"{kind} {name!r}: a tensor of layout {value.layout} given, expected a dense one; use to_dense()"
        )
    if value.dim() == 0 or tuple(value.shape[1:]) != shape or len(value) == 0:
        classes = value.dim() == len(shape) == 1 and not value.is_floating_point()
        one_hot = "class numbers have to be made one-hot (torch.nn.functional.one_hot)"
        mend = one_hot if classes else "the batch is the first axis"
        raise ClampError(
            f"{kind} {name!r}: shape {tuple(value.shape)} given, expected {expected} with at least one sample; {mend}"
        )
    if value.dtype != dtype:
        raise ClampError(f"{kind} {name!r}: dtype {value.dtype} given, expected {dtype} as the network; convert it")
    if value.device != device:
        raise ClampError(f"{kind} {name!r}: on device {value.device}, expected {device} as the network; move one")
    return value.clone() if value.is_inference() else value

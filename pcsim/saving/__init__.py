"""A whole network in one file: graph, modules and weights as plain data, from which all is built anew, without pickle.

A module is kept as the name of its class and the arguments of its constructor. Classes of ``torch.nn`` and pcsim's own
are known; others are made known by :func:`register_module`. A file can only name classes that are known here, and the
activations of torch, so that reading one runs no code of anyone else's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pcsim import io
from pcsim.errors import FileError
from pcsim.graph.network import Network
from pcsim.saving.reading import Reader, form
from pcsim.saving.registry import RECIPES, register_module
from pcsim.saving.writing import Writer

__all__ = ["load_network", "register_module", "save_network"]

KIND = "network"

WRONG = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)
"""What a tree that does not describe a network leads to."""


def save_network(net: Network, path: str | os.PathLike[str]) -> None:
    """Write a network to one file: its graph, and its modules with weights, buffers and modes.

    Parameters and modules that are shared stay shared. What belongs to a run (states, gradients, the optimizer) is not
    kept; neither is what a subclass of Network adds. Before anything is written the network is built anew from what
    would be, and compared; its tensors are not copied for that.

    Args:
        net: the network; it stays as it is.
        path: of the file, which replaces an older one only once it is whole.

    Raises:
        FileError: a module or energy is of a class that is not known (:func:`register_module`), does not come back
            alike from its arguments, or has hooks or parametrizations; or the file cannot be written.
    """
    writer = Writer(net)
    try:
        _compare(writer, net)
    except FileError:
        raise
    except WRONG as error:
        raise FileError(f"the network cannot be built anew from what would be kept: {error}") from error
    io.save(path, KIND, writer.tree)


def load_network(path: str | os.PathLike[str]) -> Network:
    """The network of a file that :func:`save_network` wrote, on the CPU; the random state stays as it is.

    Args:
        path: of the file.

    Raises:
        FileError: it is missing, damaged, of another program, holds something else, or names a class that is not known
            here; nothing is imported for it.
    """
    tree = io.load(path, KIND)
    try:
        return Reader(tree).network
    except FileError as error:
        raise FileError(f"{path}: {error}") from error
    except WRONG as error:
        raise FileError(f"{path}: does not describe a network ({error}); give a file of save_network") from error


def _compare(writer: Writer, net: Network) -> None:
    """Build the network anew from what would be kept, and refuse what does not come back alike."""
    reader = Reader(writer.tree)
    pairs: list[tuple[str, object, object]] = [
        (f"{record['place']}{'.' if part else ''}{part}", before.get_submodule(part), after.get_submodule(part))
        for record, before, after in zip(writer.tree["modules"], writer.originals, reader.modules, strict=True)
        for part in record["training"]
    ]
    for name, node in net.nodes.items():
        if not isinstance(node.energy_function, nn.Module):
            pairs.append((f"node {name!r}: its energy", node.energy_function, reader.network[name].energy_function))
    for place, before, after in pairs:
        difference = _difference(before, after)
        if difference is not None:
            raise FileError(
                f"{place} cannot be kept, since it does not come back alike from its arguments: {difference}; register "
                "its class with a config that says all of it"
            )
    inventories = [
        {name: form(tensor) for name, tensor in (*one.named_parameters(), *one.named_buffers())}
        for one in (net, reader.network)
    ]
    places = {f"{kind}.{name}.where" for kind in ("nodes", "edges") for name in getattr(net, kind)}
    for name in sorted((inventories[0].keys() ^ inventories[1].keys()) - places):
        raise FileError(f"{name!r} belongs to no node and no edge, so it would not be kept; remove it from the network")


def _difference(before: object, after: object) -> str | None:
    if repr(before) != repr(after) and isinstance(before, nn.Module):
        return f"{before!r} became {after!r}"
    found = _said(after)
    for name, value in _said(before).items():
        again = found.get(name)
        if not _alike(value, again):
            return f"{name} was {value!r} and became {again!r}"
    return None


def _said(thing: object) -> Mapping[str, object]:
    """What a thing says of itself: its config, or its public attributes where its class is torch's or pcsim's."""
    if type(thing) in RECIPES:
        return RECIPES[type(thing)].config(thing)
    if not isinstance(thing, nn.Module) or type(thing).__module__.partition(".")[0] not in ("torch", "pcsim"):
        return {}  # pcsim's own energies have no arguments, and of a part of another's class nothing is known
    return {name: value for name, value in vars(thing).items() if not name.startswith("_") and name != "training"}


def _alike(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, nn.Module) and isinstance(other, nn.Module):
        return True  # each was compared in its own place
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return bool(one == other) or (one != one and other != other)

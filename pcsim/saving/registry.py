"""Which classes can be kept in a file, under which name, and how one of them is made anew from plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
from torch import nn

from pcsim.arguments import constructor_arguments
from pcsim.errors import FileError, SettingError
from pcsim.graph.combining import Attention, Concatenate, Product, Sum
from pcsim.graph.energies import Bernoulli, CorrelatedGaussian, Huber, Laplace, StudentT
from pcsim.graph.energy import CrossEntropy, Energy, Gaussian
from pcsim.saving.transformers import COPYING
from pcsim.topologies.transformer import Patches, Positions

T = TypeVar("T", bound=nn.Module | Energy)

CONTAINERS: dict[str, type[nn.Module]] = {
    f"torch.nn.{kind.__name__}": kind for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
}
"""Modules that are kept as a list of others."""

UNKNOWN = ("Module", "DataParallel", "Container", "NLLLoss2d")
"""Classes of ``torch.nn`` that are not kept: the base, what belongs to a machine, and two that torch has deprecated."""

MODULE = "module"
"""Stands where an energy is named, for one that is a module as well."""


@attrs.frozen(eq=False)
class Recipe:
    """How things of one class are kept and built."""

    name: str
    kind: type
    config: Callable[[Any], Mapping[str, Any]]
    build: Callable[..., Any]
    registered: bool = True


RECIPES: dict[type, Recipe] = {}


def register_module(
    kind: type[T],
    *,
    config: Callable[[T], Mapping[str, Any]] | None = None,
    build: Callable[..., T] | None = None,
    name: str | None = None,
) -> type[T]:
    """Let modules (or energies) of a class of your own be kept in files; before saving, and again before loading.

    ``build(**config(module))`` has to give a module of the same class with parameters and buffers of the same names and
    shapes; their values are put into it afterwards. Without ``config`` and ``build``, where the constructor's arguments
    are kept as attributes of the same names, this may stand over the class as a decorator.

    Example:
        >>> @register_module
        ... class Scale(nn.Module):
        ...     def __init__(self, units: int) -> None:
        ...         super().__init__()
        ...         self.units = units
        ...         self.factor = nn.Parameter(torch.ones(units))

    Args:
        kind: the class, of ``nn.Module`` or :class:`Energy`; exactly this one, not those derived from it. One of
            ``torch.nn`` is kept in this way from then on.
        config: from a module to the keyword arguments of ``build``: plain values, tensors and modules, in lists, tuples
            and dictionaries. A module among them is kept by its own class, and stays one object where it is shared.
        build: makes a module from them; the class itself by default.
        name: what files call the class; its module and qualified name by default. Keep it when the class is moved.

    Returns:
        The class.

    Raises:
        SettingError: it is no such class, or another class has that name.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module | Energy)):
        raise SettingError(f"register_module: {kind!r} given, expected a class of nn.Module or pcsim.Energy")
    known = _known_name(kind)
    if known is None and (name or "").startswith(("torch.nn.", "pcsim.")):
        raise SettingError(f"register_module: name {name!r} is one of torch's or pcsim's own; give another one")
    recipe = Recipe(name or known or _full_name(kind), kind, config or _arguments, build or kind)
    for other in [*RECIPES.values()]:
        if other.name == recipe.name and other.kind is not kind:
            if _full_name(other.kind) != _full_name(kind):
                raise SettingError(
                    f"register_module: name {recipe.name!r} is that of {_full_name(other.kind)}; give another one"
                )
            del RECIPES[other.kind]  # the same class, defined a second time in a session
    RECIPES[kind] = recipe
    return kind


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _known_name(kind: type) -> str | None:
    """The name of a class that needs no registration."""
    if kind in _OWN.values():
        return f"pcsim.{kind.__name__}"
    found = vars(nn).get(kind.__name__)
    of_torch = found is kind and issubclass(kind, nn.Module) and kind.__name__ not in UNKNOWN
    return f"torch.nn.{kind.__name__}" if of_torch else None


_ENERGIES = (Gaussian, CrossEntropy, Laplace, Huber, StudentT, Bernoulli, CorrelatedGaussian)
_OWN: dict[str, type] = {
    kind.__name__: kind for kind in (Sum, Product, Concatenate, Attention, Patches, Positions, *_ENERGIES)
}


def recipe_of(kind: type, place: str) -> Recipe:
    """How things of a class are kept; FileError names the place of one that cannot be."""
    if kind in RECIPES:
        return RECIPES[kind]
    name = _known_name(kind)
    if name is None:
        raise FileError(
            f"{place} is a {_full_name(kind)}, which cannot be kept: register it with pcsim.register_module"
        )
    return _known_recipe(name, kind)


def recipe_named(name: str, place: str) -> Recipe:
    """The same by the name in a file; nothing is imported for a name that is not known."""
    for recipe in RECIPES.values():
        if recipe.name == name:
            return recipe
    room, _, own = name.rpartition(".")
    kind = {"torch.nn": vars(nn), "pcsim": _OWN}.get(room, {}).get(own)
    if not isinstance(kind, type) or _known_name(kind) != name:
        raise FileError(
            f"{place} is a {name}, which is not known here: register it with pcsim.register_module before loading, if "
            "you trust it"
        )
    return _known_recipe(name, kind)


def _known_recipe(name: str, kind: type) -> Recipe:
    config, build = COPYING.get(kind, (_arguments, kind))
    return Recipe(name, kind, config, build, registered=False)


def _arguments(thing: object) -> dict[str, Any]:
    """Constructor arguments by name, from the attributes of the same names; defaults are left out."""
    placed, named = constructor_arguments(thing)
    if placed:
        raise FileError("its class takes arguments by position only, and a file keeps them by name")
    return named

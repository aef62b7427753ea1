"""From plain values and tensors to a network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pcsim.arguments import FUNCTIONS
from pcsim.errors import FileError
from pcsim.graph.energy import LearnedPrecision
from pcsim.graph.network import Network
from pcsim.random_state import random_state_kept
from pcsim.saving.parts import held_tensors, own_parts
from pcsim.saving.registry import CONTAINERS, MODULE, Recipe, recipe_named


class Reader:
    """Builds a network from a :class:`pcsim.saving.writing.Writer`'s tree."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        with random_state_kept():
            self._read(tree)

    def _read(self, tree: Mapping[str, Any]) -> None:
        records = tree["modules"]
        for record in records:  # all of them before any is built
            if record["class"] not in CONTAINERS:
                recipe_named(record["class"], record["place"])
        self._tensors = [_as_it_was(record) for record in tree["tensors"]]
        self.modules: list[nn.Module] = []
        """In the order of their table, each after those that it needs."""
        for record in records:
            self.modules.append(self._module(record))
        self.network = Network()
        for record in tree["nodes"]:
            self._add_node(record)
        for record in tree["edges"]:
            edge = self.network.add_edge(
                record["source"],
                record["target"],
                self.modules[record["module"]],
                gain=record["gain"],
                name=record["name"],
            )
            edge.training = record["training"]
        for record in tree["nodes"]:
            node = self.network[record["name"]]
            node.training = record["training"]
        self.network.training = tree["training"]
        self.network.nodes.training = self.network.edges.training = tree["training"]

    def _add_node(self, record: Mapping[str, Any]) -> None:
        kind, precision = record["precision"]
        learned = self._tensors[precision] if kind == "learned" else None
        if kind == "tensor":
            precision = self._tensors[precision]
        node = self.network.add_node(
            record["name"],
            record["shape"],
            transfer=self.modules[record["transfer"]],
            combine=self.modules[record["combine"]],
            energy=self._energy(record["energy"], f"node {record['name']!r}: its energy"),
            energy_weight=record["weight"],
            precision=precision if learned is None else LearnedPrecision(per_unit=learned.dim() > 0),
            deterministic=record["deterministic"],
            prior=None if record["prior"] is None else self._tensors[record["prior"]],
            constant=record.get("constant"),
        )
        if learned is not None:
            node.log_precision = learned

    def _energy(self, record: tuple[str, Any], place: str) -> Any:
        name, kept = record
        return self.modules[kept] if name == MODULE else self._built(recipe_named(name, place), kept, place, {})

    def _module(self, record: Mapping[str, Any]) -> nn.Module:
        place, given = record["place"], dict[int, nn.Module]()
        if "children" in record:
            module = CONTAINERS[record["class"]]()
            for name, number in record["children"]:
                module.add_module(name, self.modules[number])
                given |= {id(part): part for part in self.modules[number].modules()}
        else:
            module = self._built(recipe_named(record["class"], place), record["config"], place, given)
        parts = own_parts(module, given)
        if parts.keys() != record["training"].keys():
            raise FileError(f"{place}: {record['class']} is built with other modules inside than it had")
        self._fill(parts, record)
        for name, part in parts.items():
            part.training = record["training"][name]
        return module

    def _fill(self, parts: Mapping[str, nn.Module], record: Mapping[str, Any]) -> None:
        """Put the parameters and buffers themselves in the place of those that were made, so that they stay shared."""
        holders = {name: (part, own) for name, part, own, _ in held_tensors(parts)}
        made = {name: form(tensor) for name, *_, tensor in held_tensors(parts)}
        kept = {name: self._tensors[number] for name, number in record["tensors"].items()}
        for name in {**made, **kept}:
            expected, found = made.get(name, "nothing"), form(kept[name]) if name in kept else "nothing"
            if expected != found:
                raise FileError(
                    f"{record['place']}: {record['class']} is built from its arguments with {expected} as {name!r}, "
                    f"where {found} is kept; register the class with a config that says all of it"
                )
        for name, (part, own) in holders.items():
            setattr(part, own, kept[name])

    def _built(self, recipe: Recipe, config: Any, place: str, given: dict[int, nn.Module]) -> Any:
        arguments = self._unpacked(config, given)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its arguments it warned when it was made
                # Values are put in afterwards; what is known to hold nothing else needs none to begin with.
                with _values_kept(given.values()) if recipe.registered else torch.device("meta"):
                    made = recipe.build(**arguments)
        except Exception as error:
            raise FileError(f"{place}: no {recipe.name} can be built from its arguments: {error}") from error
        if type(made) is not recipe.kind:
            raise FileError(f"{place}: a {type(made).__name__} was built, expected a {recipe.name}; mend its build")
        return made

    def _unpacked(self, value: Any, given: dict[int, nn.Module]) -> Any:
        if isinstance(value, Mapping) and "module" in value:
            module = self.modules[value["module"]]
            given |= {id(part): part for part in module.modules()}
            return module
        if isinstance(value, Mapping) and "function" in value:
            return FUNCTIONS[value["function"]]
        if isinstance(value, Mapping) and "size" in value:
            return torch.Size(value["size"])
        if isinstance(value, Mapping):
            return {key: self._unpacked(item, given) for key, item in value["mapping"].items()}
        if isinstance(value, list | tuple):
            return type(value)(self._unpacked(item, given) for item in value)
        return value


@contextmanager
def _values_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What modules hold stays, though a constructor that is given them may initialise them anew."""
    parts = {str(place): module for place, module in enumerate(modules)}
    before = [(tensor, tensor.detach().clone()) for *_, tensor in held_tensors(parts)]
    try:
        yield
    finally:
        for tensor, value in before:
            if not torch.equal(tensor, value):
                tensor.detach().copy_(value)


def _as_it_was(record: Mapping[str, Any]) -> Tensor:
    value: Tensor = record["value"]
    if record["parameter"]:
        return nn.Parameter(value, requires_grad=record["requires_grad"])
    return value.requires_grad_() if record["requires_grad"] else value


def form(tensor: Tensor) -> str:
    """What two tensors have to have in common to stand for each other."""
    return f"{'a parameter' if isinstance(tensor, nn.Parameter) else 'a buffer'} of shape {tuple(tensor.shape)}"

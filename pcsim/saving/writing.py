"""From a network to plain values and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from pcsim.arguments import function_name
from pcsim.errors import FileError
from pcsim.graph.energy import Energy
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.saving.parts import held_tensors, own_parts
from pcsim.saving.registry import CONTAINERS, MODULE, RECIPES, Recipe, recipe_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Writer:
    """From a network to a tree of plain values and tensors: tables of tensors, modules, nodes and edges."""

    def __init__(self, net: Network) -> None:
        self.originals: list[nn.Module] = []
        """Modules in the order of their table."""
        self._numbers: dict[int, int] = {}
        self._owners: dict[int, str] = {}
        self._tensors: list[Tensor] = []
        self._tensor_numbers: dict[int, int] = {}
        self._views: dict[tuple[object, ...], str] = {}
        self.tree: dict[str, Any] = {"tensors": [], "modules": [], "nodes": [], "edges": [], "training": net.training}
        for name, module in net.named_modules():
            _refuse_changes(module, name or "the network")
        for node in net.nodes.values():
            self.tree["nodes"].append(self._node(node))
        for edge in net.edges.values():
            number = self._module(edge.module, f"edge {edge.name!r}: its module")
            self.tree["edges"].append(
                {
                    "name": edge.name,
                    "source": edge.source_name,
                    "target": edge.target_name,
                    "module": number,
                    "gain": edge.gain,
                    "training": edge.training,
                }
            )

    def _node(self, node: Node) -> dict[str, Any]:
        place = f"node {node.name!r}"
        given, learned = (node.own_precision if node.log_precision is None else 1.0), node.log_precision
        if learned is not None:
            precision: tuple[str, Any] = "learned", self._tensor(learned, f"{place}: its precision")
        elif isinstance(given, Tensor):
            precision = "tensor", self._tensor(given, f"{place}: its precision")
        else:
            precision = "number", given
        return {
            "name": node.name,
            "shape": list(node.shape),
            "transfer": self._module(node.transfer, f"{place}: its transfer"),
            "combine": self._module(node.combine, f"{place}: its combine"),
            "energy": self._energy(node.energy_function, f"{place}: its energy"),
            "weight": node.energy_weight,
            "precision": precision,
            "deterministic": node.deterministic,
            "prior": None if node.prior is None else self._tensor(node.prior, f"{place}: its prior"),
            "constant": node.constant,
            "training": node.training,
        }

    def _energy(self, energy: Energy, place: str) -> tuple[str, Any]:
        if isinstance(energy, nn.Module):
            return MODULE, self._module(energy, place)
        recipe = recipe_of(type(energy), place)
        return recipe.name, self._packed(self._config(recipe, energy, place), place, {})

    def _module(self, module: nn.Module, place: str) -> int:
        if id(module) in self._numbers:
            return self._numbers[id(module)]
        if id(module) in self._owners:
            raise FileError(
                f"{place} is also a part of {self._owners[id(module)]}, which builds its own; have that class "
                "registered with a config that gives it"
            )
        record: dict[str, Any] = {"place": place}
        given: dict[int, nn.Module] = {}
        if type(module) in CONTAINERS.values() and type(module) not in RECIPES:
            record["class"] = f"torch.nn.{type(module).__name__}"
            children = [(name, child) for name, child in module._modules.items() if child is not None]
            record["children"] = [[name, self._module(child, f"{place}.{name}")] for name, child in children]
            given |= {id(part): part for _, child in children for part in child.modules()}
        else:
            recipe = recipe_of(type(module), place)
            record["class"] = recipe.name
            record["config"] = self._packed(self._config(recipe, module, place), place, given)
        parts = own_parts(module, given)
        for part in parts.values():
            if id(part) in self._numbers or id(part) in self._owners:
                raise FileError(
                    f"{place}: a part of it, {part!r}, is also one of another module; have its class registered with a "
                    "config that gives it"
                )
        self._owners |= {id(part): place for part in parts.values()}
        record["training"] = {name: part.training for name, part in parts.items()}
        record["tensors"] = {name: self._tensor(tensor, f"{place}: {name}") for name, *_, tensor in held_tensors(parts)}
        self._numbers[id(module)] = len(self.originals)
        self.originals.append(module)
        self.tree["modules"].append(record)
        return self._numbers[id(module)]

    def _config(self, recipe: Recipe, thing: object, place: str) -> Mapping[str, Any]:
        try:
            config = recipe.config(thing)
        except Exception as error:
            raise FileError(
                f"{place} is a {recipe.name}, whose arguments cannot be told: {error}; register the class with a config"
            ) from error
        if not isinstance(config, Mapping):
            raise FileError(f"{place}: the config of {recipe.name} gave {config!r}, expected the arguments by name")
        return config

    def _packed(self, value: Any, place: str, given: dict[int, nn.Module]) -> Any:
        """A config as a tree, modules by their numbers; notes which modules are in it."""
        if isinstance(value, nn.Module):
            given |= {id(part): part for part in value.modules()}
            return {"module": self._module(value, place)}
        if isinstance(value, Mapping):
            return {"mapping": {key: self._packed(item, f"{place}.{key}", given) for key, item in value.items()}}
        if isinstance(value, np.generic):
            value = value.item()  # which is equal to it, and prints alike within a module
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if callable(value) and function_name(value) is not None:
            return {"function": function_name(value)}
        if isinstance(value, list | tuple):
            packed = [self._packed(item, f"{place}[{number}]", given) for number, item in enumerate(value)]
            return tuple(packed) if isinstance(value, tuple) else packed
        if value is None or isinstance(value, bool | int | float | str | Tensor):
            return value
        raise FileError(
            f"{place} has {value!r} among its arguments, expected a plain value, a tensor, a module or an activation "
            "of torch.nn.functional; give such, a module in the place of a function, or register the class with a "
            "config that does"
        )

    def _tensor(self, tensor: Tensor, place: str) -> int:
        if id(tensor) in self._tensor_numbers:
            return self._tensor_numbers[id(tensor)]
        if is_lazy(tensor):
            raise FileError(f"{place} has no shape yet; run the network once before it is saved")
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
            raise FileError(f"{place} is a {type(tensor).__name__} on {tensor.device}, expected a dense tensor")
        view = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and view in self._views:
            raise FileError(
                f"{place} has the same memory as {self._views[view]}, but is another tensor, so that they would not "
                "stay tied; share the tensor itself"
            )
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise FileError(f"{place} has a hook, which cannot be kept; remove it before saving")
        self._views[view] = place
        number = self._tensor_numbers[id(tensor)] = len(self._tensors)
        self._tensors.append(tensor)  # kept, so that no other tensor gets its id
        self.tree["tensors"].append(
            {
                "value": tensor.detach(),
                "parameter": isinstance(tensor, nn.Parameter),
                "requires_grad": tensor.requires_grad,
            }
        )
        return number


def _refuse_changes(module: nn.Module, place: str) -> None:
    if is_parametrized(module):
        raise FileError(
            f"{place} has parametrizations, which cannot be kept; remove them before saving "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    if any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module):
        raise FileError(
            f"{place} ({type(module).__name__}) has hooks or a replaced forward, which cannot be kept; remove them "
            "before saving"
        )

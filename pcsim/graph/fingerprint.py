"""Whether anything about a network has changed that a plan or a program was made for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, compress, count
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from pcsim.graph.part import Part
from pcsim.graph.probing import integers_taken
from pcsim.graph.statistics import normalises

if TYPE_CHECKING:
    from pcsim.graph.network import Network

OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What every module has; all else in it is a setting of its class or something that was put there."""
GLOBAL_HOOKS = [
    value for name, value in vars(torch_module).items() if name.startswith("_global_") and isinstance(value, dict)
]
_training, _requires_grad = attrgetter("training"), attrgetter("requires_grad")


class Fingerprint:
    """What a network consists of: its graph, modules, parameters, modes, hooks and settings, but not its weights.

    Looking whether it still holds is a few passes over flat lists, so that it can be done before every run.

    Args:
        network: to look at.
    """

    def __init__(self, network: Network) -> None:
        self._network, self._revision = network, network.revision
        modules = list(network.modules())
        self.parameters = list({id(p): p for m in modules for p in m._parameters.values() if p is not None}.values())
        """All parameters, each once."""
        self.normalising = [module for module in modules if normalises(module)]
        """Modules of torch that keep running statistics."""
        parts = [module for module in modules if isinstance(module, Part)]
        self.stochastic = any(part.stochastic for part in parts)
        """Whether any part may draw random numbers."""
        self.moving = [part for part in parts if part.moves]
        """Parts whose buffers move as they are evaluated."""
        self._placed = [node for node in network.nodes.values() if node.device is not None]
        self.integers: dict[str, int] = {}
        """Nodes that hold integers, by name, and how many each may hold, from 0 on."""
        for edge in network.edges.values():
            taken = integers_taken(edge.module)
            if taken is not None:
                self.integers[edge.source_name] = min(taken, self.integers.get(edge.source_name, taken))
        users = [module for module in modules if not isinstance(module, Part)]
        self._modules, self._attributes = modules, [vars(module) for module in users]
        owners: list[dict[str, Any]] = [o for m in modules for o in (m._parameters, m._modules)]
        self._owners = [owner for owner in owners if owner]
        self._empty = [owner for owner in owners if not owner]
        self._hooks = [
            *GLOBAL_HOOKS,
            *(
                h
                for m in users
                for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            ),
        ]
        self._settings = [vars(module) for module in users if _has_settings(module)]
        self._members = self._look_at_members()
        self._flags, self._kept = self._look_at_flags(), self._look_at_settings()

    def _look_at_members(self) -> list[object]:
        return [*chain.from_iterable(map(dict.values, self._owners))]

    def _look_at_flags(self) -> tuple[list[bool], list[bool], list[int], list[int]]:
        return (
            [*map(_training, self._modules)],
            [*map(_requires_grad, self.parameters)],
            [*map(len, self._attributes)],
            [*compress(count(), self._hooks)],
        )

    def _look_at_settings(self) -> list[object]:
        return [*chain.from_iterable(map(dict.values, self._settings))]

    @property
    def counts(self) -> bool:
        """Whether anything in the network keeps something of the batches that it has seen."""
        return bool(self.normalising or self.moving)

    @property
    def tensor_options(self) -> tuple[torch.dtype, torch.device] | None:
        """Dtype and device of the first floating parameter; None if there is none."""
        return next(((p.dtype, p.device) for p in self.parameters if p.is_floating_point()), None)

    def devices(self, otherwise: torch.device) -> list[torch.device]:
        """Where each node lies, by the network's order; all at ``otherwise`` where nodes are not placed."""
        return [node.device or otherwise for node in self._placed] or [otherwise]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self.consists_of_the_same() and (
            self._flags == self._look_at_flags() and _identical(self._kept, self._look_at_settings())
        )

    def consists_of_the_same(self) -> bool:
        """Whether the graph, its modules and parameters are the same, whatever their modes, hooks and settings."""
        same = self._revision == self._network.revision and _identical(self._members, self._look_at_members())
        return same and not any(self._empty)


def _identical(before: list[object], now: list[object]) -> bool:
    return len(before) == len(now) and all(map(is_, before, now))


def _has_settings(module: nn.Module) -> bool:
    """Whether a module of torch's has settings that its weights do not tell; of a linear layer these tell all.

    Those of a user's own are not looked at: they count only when the module is called.
    """
    told = type(module) in (nn.Linear, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    ours = type(module).__module__.startswith("torch.nn.modules.")
    return ours and not told and not vars(module).keys() <= OWN_ATTRIBUTES


def identity_of(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """Which modules these are, with all that they hold, the shapes of their parameters, and what else a call of them
    does or moves: hooks, a forward of their own, buffers; kept to see changes.
    """
    identity: list[int] = []
    for module in modules:
        for part in module.modules() if module._modules else (module,):
            held, attributes = part._parameters, part.__dict__
            # The keys of hooks are numbers, none of which is given twice.
            identity += id(part), len(part._buffers), *part._forward_hooks, *part._forward_pre_hooks
            for parameter in held.values():
                if parameter is not None and not is_lazy(parameter):
                    identity += parameter.shape
            if "forward" in attributes:
                identity.append(id(attributes["forward"]))
    return tuple(identity)

"""The parameters of a group of edges: each edge's own, or stacked where a kernel takes several at once."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from pcsim.engine.batched.groups import EdgeGroup
from pcsim.engine.batched.places import Arena, Named, Operation, run_of
from pcsim.engine.kernels.chain import Link
from pcsim.engine.kernels.kernel import Call
from pcsim.engine.planning.wiring import Positions

_version = attrgetter("_version")


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by name."""
    return dict(module.named_parameters())


class Weights:
    """What the kernels of a group of edges are called on.

    Args:
        group: the edges.
        arena: where stacks come from.
        key: names the group in the arena.
    """

    def __init__(self, group: EdgeGroup, arena: Arena, key: Hashable) -> None:
        self._group, self._arena, self._key = group, arena, key
        self._calls: dict[tuple[int, tuple[int, int]], Call] = {}
        self.stacks: dict[tuple[int, str], Stack] = {}
        """Those that operations read, by link and name of the parameter."""

    def call(self, link: int, rows: Positions, operations: list[Operation]) -> Call:
        """What a link's kernel is called on for these rows: one module itself, or several with stacked weights."""
        run = run_of(rows)
        if run is None:
            return self._make_call(link, rows, operations)
        if (link, run) not in self._calls:
            self._calls[link, run] = self._make_call(link, rows, operations)
        return self._calls[link, run]

    def _make_call(self, link: int, rows: Positions, operations: list[Operation]) -> Call:
        module, run = self._link(link, int(rows[0])).module, run_of(rows)
        weights: dict[str, Tensor] = dict(weights_of(module))
        for name in weights if len(rows) > 1 else ():
            stack = self._stack(link, name)
            if run is not None:
                weights[name] = stack[slice(*run)]
                continue
            index = torch.as_tensor(rows, device=self._arena.device)
            weights[name] = scratch = self._arena.scratch((self._key, "gathered weights", link, name), stack, len(rows))
            gather = partial(torch.index_select, stack, 0, index, out=scratch)
            operations.append(Operation("gather weights", gather, Named(self._group.names, rows)))
        return self._called(link, module, weights)

    def gradient_call(self, link: int, rows: Positions) -> Call:
        """The same for weight gradients, of a stack without the weights, which they do not read."""
        module = self._link(link, int(rows[0])).module
        return self._called(link, module, dict(weights_of(module)) if len(rows) == 1 else {})

    def _called(self, link: int, module: nn.Module, weights: dict[str, Tensor]) -> Call:
        saved = self._arena.kept((self._key, "saved", link), dict[str, Tensor])
        return Call(module, weights, saved, self._arena.products)

    def _link(self, link: int, row: int) -> Link:
        assert self._group.chains is not None
        return self._group.chains[row][link]

    def _stack(self, link: int, name: str) -> Tensor:
        if (link, name) not in self.stacks:
            column = self._group.column(link, name)
            tensor = self._arena.kept(
                (self._key, "stacked", link, name), lambda: column[0].new_empty(len(column), *column[0].shape)
            )
            self.stacks[link, name] = Stack(column, tensor)
        return self.stacks[link, name].tensor


class Stack:
    """Equal parameters in one tensor.

    Args:
        parameters: one by row.
        tensor: (rows, *shape).
    """

    def __init__(self, parameters: list[nn.Parameter], tensor: Tensor) -> None:
        self.parameters, self.tensor = parameters, tensor
        self._versions: list[int] = []

    def bring(self) -> None:
        """Copy all of them in: what has changed a weight since the last run does not always leave a sign."""
        self._copy(0, len(self.parameters))

    def bring_learned(self, learned: Collection[nn.Parameter]) -> None:
        """Copy in what has changed within a run, where nothing but an optimizer's step changes weights."""
        changed = [
            row
            for row, (parameter, version) in enumerate(zip(self.parameters, self._versions, strict=True))
            if parameter in learned or parameter._version != version
        ]
        if changed:
            self._copy(changed[0], changed[-1] + 1)

    def _copy(self, first: int, after: int) -> None:
        parameters: list[Tensor] = list(self.parameters[first:after])
        if self.tensor.dim() == 1:
            torch.stack(parameters, out=self.tensor[first:after])
        else:
            torch.cat(parameters, out=self.tensor[first:after].flatten(0, 1))
        self._versions = [*map(_version, self.parameters)]

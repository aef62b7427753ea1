"""All tensors of a program: which group holds what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcsim.engine.batched.edges import Activity, EdgeMemory
from pcsim.engine.batched.groups import Groups
from pcsim.engine.batched.nodes import NodeMemory
from pcsim.engine.batched.places import Arena
from pcsim.engine.kernels.kernel import Kernel
from pcsim.engine.planning.plan import Plan
from pcsim.engine.planning.wiring import Mask, Positions
from pcsim.engine.problem import Batch
from pcsim.engine.rates import Rates


class Memory:
    """All tensors of a program.

    Args:
        plan: what to compute.
        groups: which nodes and edges are computed together.
        arena: scratch; programs that never hold a state at the same time may share it.
    """

    def __init__(self, plan: Plan, groups: Groups, arena: Arena) -> None:
        self.plan, self.task, self.wiring, self.arena = plan, plan.task, plan.wiring, arena
        self.batch: Batch | None = None
        self.step = 0
        """The step that is being taken."""
        self.rates: Rates | None = None
        """Each sample's own rate, where they differ."""
        self.activity: Activity = "forward" if plan.task.held else "present"
        """What edges read during the relaxation, for their predictions and Jacobians."""
        layout, filled = _layouts(groups), _filled(groups)
        self.nodes = [
            NodeMemory(
                group,
                plan,
                arena.on(group.nodes[0].device),
                ("node", place),
                layout[place],
                self.at_hand,
                filled=place in filled,
            )
            for place, group in enumerate(groups.nodes)
        ]
        self.edges = [
            EdgeMemory(group, self.nodes[group.source], self.nodes[group.target], ("edge", place), self._seed)
            for place, group in enumerate(groups.edges)
        ]
        nowhere = np.zeros(len(plan.wiring.nodes), bool)
        self.waiting: Mask = nowhere
        """Nodes whose own error moves them once all steps are over."""
        self.sloped: Mask = nowhere
        """Nodes at whose δ the precision and the transfer's derivative lie until what they receive is multiplied in."""
        self.rows = {name: (memory, row) for memory in self.nodes for row, name in enumerate(memory.names)}
        """Where each node lies, by name."""

    def at_hand(self) -> Batch:
        """The batch that the program runs on."""
        assert self.batch is not None
        return self.batch

    def _seed(self) -> int:
        return self.at_hand().seed

    def node_rows(self, mask: Mask) -> Iterator[tuple[NodeMemory, Positions]]:
        """Each group of nodes with those of its rows that are in a mask."""
        for memory in self.nodes:
            rows = memory.group.rows(mask)
            if len(rows):
                yield memory, rows

    def edge_rows(self, mask: Mask) -> Iterator[tuple[EdgeMemory, Positions]]:
        """Each group of edges with those of its rows that are in a mask, in parts that fit a cache.

        Those whose sources keep what they receive apart come by whether the sources have moved: a value that has not
        is that of the forward pass.
        """
        for memory in self.edges:
            rows, source = memory.group.rows(mask), memory.source
            moved = source.moved[memory.group.source_rows[rows]]
            alike = [rows[moved], rows[~moved]] if source.group.received else [rows]
            for some in alike:
                if len(some):
                    for part in memory.parts(some):
                        yield memory, part

    def compile_after(self, moved: Mask, *, fresh: bool = False) -> None:
        """Say which nodes have moved where what is compiled next runs, and whether displacements are still empty."""
        for node in self.nodes:
            node.moved = moved[node.group.positions]
            node.fresh["displacement"] = ~node.moved & (fresh and node.group.received)


def _layouts(groups: Groups) -> list[torch.memory_format]:
    """How the images of each group of nodes lie: as a kernel that reads or makes them wants them."""
    wanted = [torch.contiguous_format] * len(groups.nodes)
    for group in groups.edges:
        for link in (group.chains or [[]])[0]:
            kernel: Kernel[Any] = link.kernel
            if kernel.memory_format is not torch.contiguous_format:
                wanted[group.source] = wanted[group.target] = kernel.memory_format
    return wanted


def _filled(groups: Groups) -> set[int]:
    """Places of the groups of nodes that an edge predicts whose last kernel fills the tensor that it is given."""
    chains = ((group.target, group.chains[0]) for group in groups.edges if group.chains)
    return {target for target, chain in chains if chain and chain[-1].kernel.fills_out}


class Views(Mapping[str, Tensor]):
    """Tensors of nodes by name, (batch, *shape): views, made where they are first read.

    Args:
        rows: the tensor of a node's group, and its row in it.
    """

    def __init__(self, rows: Mapping[str, tuple[Tensor, int]]) -> None:
        self._rows = rows
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            stack, row = self._rows[name]
            self._made[name] = stack[row]
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

"""The tensors of a group of edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pcsim.engine.batched.groups import EdgeGroup
from pcsim.engine.batched.nodes import NodeMemory
from pcsim.engine.batched.places import Cell, Named, Operation, Part, cross, read, run_of
from pcsim.engine.batched.weights import Weights
from pcsim.engine.kernels.autograd import Traced
from pcsim.engine.kernels.chain import Link, fills, shapes_in, shared_places
from pcsim.engine.planning.wiring import Positions

Activity: TypeAlias = Literal["start", "present", "forward"]
"""Which values edges read: as they start, as they are now, or those of the forward pass."""
GATHERED_BYTES = 2**21
"""Rows that have to be gathered are computed in parts of about this size, which stay in a core's cache."""


class EdgeMemory:
    """The tensors of one group of edges.

    Args:
        group: the edges.
        source: tensors of the nodes that they read.
        target: tensors of the nodes that they predict.
        key: names the group in the arena.
        seed: gives the seed of random draws.
    """

    def __init__(
        self,
        group: EdgeGroup,
        source: NodeMemory,
        target: NodeMemory,
        key: Hashable,
        seed: Callable[[], int],
    ) -> None:
        self.group, self.source, self.target = group, source, target
        self._arena, self._key = target.arena, key
        self.crosses = source.arena is not target.arena
        """Whether what the edges read, and the messages that they send, go from one device to another."""
        self.names = group.names
        edge = group.edges[0]
        self.trace: Traced | None = None
        if group.chains is None:
            self.trace = Traced(lambda inputs: edge.contribute(inputs[0], seed()), list(edge.module.parameters()))
        self.chain: list[Link] = group.chains[0] if group.chains else []
        self._shares = shared_places(self.chain, 1) if self.chain else [0]
        self.length = 1 if self.trace is not None else len(self.chain)
        needs_output = bool(self.chain) and self.chain[-1].kernel.reads == "output" and target.overwrites_inlet
        self.direct = len(edge.target.incoming) == 1 and target.trace is None and not needs_output
        """Whether contributions go straight to the target's inlet; otherwise they are kept here, to be combined."""
        units = max(math.prod(source.node.shape), math.prod(target.node.shape))
        sample = units * self._arena.dtype.itemsize
        self._most_gathered = max(1, GATHERED_BYTES // (self._arena.batch * sample))
        self.weights = Weights(group, self._arena, key)

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return shapes_in(self.chain, self.source.node.shape, self.group.edges[0])

    def _shape(self, place: int) -> tuple[int, ...]:
        """The shape of a place of the chain, the batch axis left out; only those within have to be asked for."""
        if place in (0, self.length):
            return self.group.edges[0].contribution_shape if place else self.source.node.shape
        return self._shapes[place]

    def _kept(self, name: Hashable, make: Callable[[], Any]) -> Any:
        return self._arena.kept((self._key, name), make)

    def activity(self, activity: Activity, rows: Positions) -> Part:
        """What these edges read of their sources."""
        source, name, origins = self.source, "value", self.group.source_rows[rows]
        if activity == "start" and (source.reads_prediction_at_start or source.group.received):
            name = "prediction"
        elif source.group.received and not source.moved[origins[0]]:
            activity = "forward"
        if activity == "forward" and not source.group.deterministic:
            name = "forward_value"
        return source.part(name, origins, reader=self._key)

    def reads(self, activity: Activity, rows: Positions, operations: list[Operation], *, needed: bool = True) -> Cell:
        """What these edges read, where they are computed, with the operations that bring it there if it is needed."""
        names, place = Named(self.names, rows), self.activity(activity, rows)
        if self.crosses:
            wanted = operations if needed else []
            return cross(read(place, wanted, names), self._arena, (self._key, "read", int(rows[0])), wanted, names)
        return read(place, operations, names) if needed else place.cell

    def contribution(self, rows: Positions, activity: Activity, operations: list[Operation]) -> Cell:
        """What these edges contribute, once evaluated; an identity contributes the activity itself."""
        if not self.length:
            return self.reads(activity, rows, operations)
        return read(self.place(self.length, rows), operations, Named(self.names, rows))

    def sent(self, cell: Cell, operations: list[Operation], rows: Positions) -> Cell:
        """A message that lies in a cell where it was computed, where the sources are."""
        if not self.crosses:
            return cell
        return cross(cell, self.source.arena, (self._key, "sent"), operations, Named(self.names, rows))

    def place(self, link: int, rows: Positions) -> Part | Cell:
        """Place ``link`` of the chain: above 0, the output of link ``link − 1``; the last is the contribution."""
        share = self._shares[link] if self.chain else link
        if share == self.length and self.direct:
            return self.target.place(0, self.group.target_rows[rows])
        name, count = ("inner", share), len(self.group.edges)
        if count == 1:
            filled = self.trace is None and fills(self.chain, self._shares, share)
            return self._arena.cell((self._key, name), partial(self._shape, share), filled=filled)
        shape = self._shape(share)
        stack: Tensor = self._kept(name, lambda: self._arena.new(count, shape, torch.contiguous_format))
        return self._arena.part((self._key, name), stack, rows)

    @cached_property
    def _pulled_over(self) -> list[int]:
        """Whose message cell each link uses: one that works in place that of the link after it.

        Not after a link that may leave a view there, as a flattening does: it would write over what it is a view of.
        """
        places = list(range(self.length))
        for link in reversed(range(len(self.chain) - 1)):
            if self.chain[link].in_place and self.chain[link + 1].kernel.fills_out:
                places[link] = places[link + 1]
        return places

    def message_cell(self, link: int, rows: Positions) -> Cell:
        """Where the error pulled back through links ``link`` and later goes.

        What only the source is sent is used at once, so that all edges of one shape leave it in the same place, which
        stays in a core's cache.
        """
        place, shape = self._pulled_over[link], partial(self._shape, link)
        filled = bool(self.chain) and all(
            writer.kernel.fills_out for writer, goal in zip(self.chain, self._pulled_over, strict=True) if goal == place
        )
        at_once = filled and place == self._pulled_over[0]
        owner: Hashable = "all" if at_once else (self._key, place)
        if len(self.group.edges) == 1:
            owner = ("all", shape()) if at_once else owner
            return self._arena.cell(("message", owner), shape, filled=filled)
        count = self._most_gathered if len(rows) <= self._most_gathered else len(self.group.edges)
        count = min(count, len(self.group.edges))
        scratch: Tensor = self._arena.kept(
            ("message", owner, count, *shape()), lambda: self._arena.new(count, shape(), torch.contiguous_format)
        )
        return Cell(scratch[0] if len(rows) == 1 else scratch[: len(rows)])

    def parts(self, rows: Positions) -> list[Positions]:
        """These rows, in parts small enough for a cache where their ends have to be gathered and scattered."""
        ends = (self.group.source_rows[rows], self.group.target_rows[rows])
        if all(run_of(end) is not None for end in ends):
            return [rows]
        return np.array_split(rows, -(-len(rows) // self._most_gathered))

"""The tensors of a group of nodes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcsim.engine.batched.groups import NodeGroup
from pcsim.engine.batched.places import Arena, Cell, Part, run_of
from pcsim.engine.batched.weights import weights_of
from pcsim.engine.kernels.autograd import Traced
from pcsim.engine.kernels.chain import Link, fills, inlet_shape, shapes_in, shared_places
from pcsim.engine.kernels.kernel import Call
from pcsim.engine.planning.plan import Plan
from pcsim.engine.planning.wiring import Positions
from pcsim.engine.problem import Batch


class NodeMemory:
    """The tensors of one group of nodes, each (k, batch, *shape).

    Args:
        group: the nodes.
        plan: of which they are part.
        arena: where scratch tensors come from, and where the nodes lie.
        key: names the group in the arena.
        layout: of images.
        batch: the batch at hand.
        filled: whether some edge into the nodes fills the tensor that it is given.
    """

    def __init__(
        self,
        group: NodeGroup,
        plan: Plan,
        arena: Arena,
        key: Hashable,
        layout: torch.memory_format,
        batch: Callable[[], Batch],
        *,
        filled: bool,
    ) -> None:
        self.group, self.arena, self._key, self._layout, self._batch = group, arena, key, layout, batch
        self.node = node = group.nodes[0]
        self.names = group.names
        clamping = plan.task.clamping
        self.partial = node.name in clamping.partial
        self.streamed = bool(plan.wiring.streamed[group.positions[0]])
        self.starts_forward = node.predicted and not group.given and node.name not in clamping.placed
        self.energy_weight, self.own_precision = (
            own[group.positions] for own in (plan.wiring.energy_weight, plan.wiring.own_precision)
        )
        self.tensors: dict[str, Tensor] = {}
        if node.predicted:
            separate = bool(plan.rewritten[group.positions].any()) or group.deterministic
            self.tensors["prediction"] = self._scratch("prediction") if separate else self._new()
            self.tensors["forward_prediction"] = self._new() if separate else self.tensors["prediction"]
        if group.received:
            self.tensors["displacement"] = self._new()  # the value is put together where it is read, and not kept
        else:
            self.tensors["value"] = self.tensors["prediction"] if group.deterministic else self._new()
        if group.following:
            self.tensors["error"] = self._new()
        self.moved = np.zeros(len(group.nodes), bool)
        """Of what is compiled now: rows that have moved before."""
        self.fresh = {name: np.zeros(len(group.nodes), bool) for name in ("displacement", "delta")}
        """Of what is compiled now: rows of a tensor that hold nothing yet, so that what comes first is written."""
        self.copies: list[tuple[Tensor, Tensor]] = []
        """What is kept of the start, and what it is copied from."""
        if node.predicted and self.tensors["forward_prediction"] is not self.tensors["prediction"]:
            self.copies.append((self.tensors["forward_prediction"], self.tensors["prediction"]))
        if group.given and not self.streamed:
            self.tensors["forward_value"] = self.tensors["value"]
        elif self.starts_forward and not self.partial:
            self.tensors["forward_value"] = self.tensors["forward_prediction"]
        else:
            self.tensors["forward_value"] = self._new()
            self.copies.append((self.tensors["forward_value"], self.tensor("value")))
        self.chain: list[Link] = group.chain or []
        self.trace: Traced | None = None
        if node.predicted and group.chain is None:
            own = [parameter for parameter in node.parameters() if parameter is not node.log_precision]
            self.trace = Traced(self._evaluate, own)
        self.calls = [
            Call(link.module, weights_of(link.module), self._kept(("saved", place), dict[str, Tensor]), arena.products)
            for place, link in enumerate(self.chain)
        ]
        self._shares = shared_places(self.chain, 0)
        single = len(group.nodes) == 1
        if single and self._shares[0] != len(self.chain):
            self._shares[0] = 0  # the inlet of a single node has a place of its own, to which edges may add
        self.takes_any_tensor = single and len(node.incoming) == 1 and not filled
        """Whether what arrives before the transfer may be any tensor."""
        self._parts: dict[Hashable, Part] = {}
        self.outlets: dict[int, Cell] = {}
        """Errors pulled back to each edge's contribution, by edge position, where the node goes through autograd."""

    @property
    def free(self) -> bool:
        """Whether the nodes move."""
        return not (self.group.given or self.group.deterministic)

    @property
    def reads_prediction_at_start(self) -> bool:
        """Whether the nodes' forward prediction serves as their value until the start is over."""
        group = self.group
        return self.starts_forward and not (group.deterministic or group.received or self.partial)

    @property
    def changes(self) -> bool:
        """Whether the present prediction lies apart from that of the start, since it may be evaluated again."""
        return self.tensors["prediction"] is not self.tensors["forward_prediction"]

    def compared(self, row: int) -> tuple[Tensor, Tensor]:
        """Value and prediction of a node, (batch, *shape); its error and zero where that is kept apart."""
        prediction = self.tensors["prediction"][row].contiguous()
        if self.keeps_error:
            error = self.tensors["error"][row].contiguous()
            return error, torch.zeros_like(error)
        if not self.group.received:
            return self.tensors["value"][row].contiguous(), prediction
        error = self.tensors["displacement"][row].contiguous()
        if self.changes:
            error = error + (self.tensors["forward_prediction"][row] - prediction)
        return error, torch.zeros_like(error)

    def present(self, part: str, row: int) -> Tensor:
        """Value, prediction or error of a node as it is now, its prediction being up to date, (batch, *shape)."""
        if part == "value" and self.group.received:
            return self.tensors["forward_prediction"][row] + self.tensors["displacement"][row]
        if part != "error":
            return self.tensors[part][row]
        if self.group.following:
            return self.tensors["error"][row]
        value, prediction = self.compared(row)
        return value - prediction

    @property
    def moving(self) -> str:
        """Name of the tensor that moves as the nodes do."""
        return "error" if self.group.following else "displacement" if self.group.received else "value"

    @property
    def keeps_error(self) -> bool:
        """Whether the nodes' error moves, and is all that their energy knows of them."""
        return self.group.following and self.node.energy_function.gaussian

    def _evaluate(self, inputs: Sequence[Tensor]) -> Tensor:
        if not inputs:
            return self.node.predict_from_prior(self._batch().size)
        return self.node.predict(inputs, self._batch().seed)

    def _kept(self, name: Hashable, make: Callable[[], Any]) -> Any:
        return self.arena.kept((self._key, name), make)

    def _new(self) -> Tensor:
        dtype = torch.long if self.group.integers else self.arena.dtype
        return self.arena.new(len(self.group.nodes), self.node.shape, self._layout, dtype)

    def _scratch(self, name: str) -> Tensor:
        found: Tensor = self._kept(name, self._new)
        return found

    def tensor(self, name: str) -> Tensor:
        """One of the group's tensors; what is not kept of a run is made when first asked for."""
        if name not in self.tensors:
            self.tensors[name] = self._scratch(name)
        return self.tensors[name]

    def part(self, name: str, rows: Positions, reader: Hashable = None) -> Part:
        """Rows of one of the group's tensors; gathered rows lie in scratch of the reader's own, if it is named."""
        return self._part(name, self.tensor(name), rows, reader)

    def _part(self, name: Hashable, stack: Tensor, rows: Positions, reader: Hashable = None) -> Part:
        run = run_of(rows)
        if run is None:
            return self.arena.part((self._key, name, reader), stack, rows)
        if (name, run) not in self._parts:
            self._parts[name, run] = self.arena.part((self._key, name), stack, rows)
        return self._parts[name, run]

    def load(self, batch: Batch, plan: Plan) -> None:
        """Take over a batch: clamped values, and the start of what no forward pass reaches."""
        if self.group.given:
            self.show()
        elif not self.starts_forward and not self.group.deterministic:
            for row, node in enumerate(self.group.nodes):
                self.tensor("value")[row].copy_(batch.origin(node))
            if self.partial:
                self.clamp()
        if self.free and not plan.task.relaxation.plain:
            self.tensor("velocity").zero_()  # another program of the same arena may have left its own in it

    def show(self) -> None:
        """Put what is given of these nodes in the place of their values."""
        if not self.group.given:
            self.clamp()
            return
        for row, name in enumerate(self.names):
            self.tensor("value")[row].copy_(self._batch().clamps[name].value)

    def clamp(self) -> None:
        """Put the given units of partially clamped nodes back."""
        for row, name in enumerate(self.names):
            value = self.tensor("value")[row]
            value.copy_(self._batch().clamped(name, value))

    def place(self, link: int, rows: Positions) -> Part | Cell:
        """Place ``link`` of the transfer's chain: 0 what the edges contribute, the last one the prediction."""
        share = self._shares[link]
        if share == len(self.chain):
            return self.part("prediction", rows)
        if len(self.group.nodes) > 1:
            return self.part(f"inlet {share}", rows)
        if share > 0 or self.takes_any_tensor:
            filled = share > 0 and fills(self.chain, self._shares, share)
            return self.arena.cell((self._key, "place", share), partial(self._shape, share), filled=filled)
        return self._part("inlet", self._combined(), rows)

    def _combined(self) -> Tensor:
        """The sum of what the edges contribute to a single node, (1, batch, ...)."""
        shape = self.node.incoming[0].contribution_shape
        found: Tensor = self._kept("inlet", lambda: self.arena.new(1, shape, self._layout))
        return found

    def inlet(self, rows: Positions) -> Part:
        """What several edges contribute to, as a part that can be added to; a row may occur twice."""
        if len(self.group.nodes) == 1 and self._shares[0] != len(self.chain):
            return self._part("inlet", self._combined(), rows)
        place = self.place(0, rows)
        assert isinstance(place, Part)
        return place

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return shapes_in(self.chain, inlet_shape(self.node), self.node)

    def _shape(self, place: int) -> tuple[int, ...]:
        return self._shapes[place]

    @property
    def overwrites_inlet(self) -> bool:
        """Whether what the edges contribute is lost once the transfer has run."""
        return bool(self.chain) and self._shares[0] != 0

    def pulled(self, rows: Positions, edge: int) -> Part | Cell:
        """Where the error, pulled back to what the edges contribute, is found."""
        if self.trace is not None:
            outlet: Cell = self.outlets.setdefault(edge, self._kept(("outlet", edge), Cell))
            return outlet
        return self.delta(rows, 0)

    def delta(self, rows: Positions, link: int) -> Part | Cell:
        """Where the error, pulled back to place ``link`` of the transfer's chain, is found."""
        for later in range(link, len(self.chain)):
            if not self.chain[later].in_place:
                filled = self.chain[later].kernel.fills_out
                return self.arena.cell((self._key, "pulled", later), partial(self._shape, later), filled=filled)
        return self.part("delta", rows)

    def pulled_cells(self, rows: Positions) -> list[Cell]:
        """Where errors pulled back through the transfer are found that are new tensors each time."""
        places = (self.delta(rows, link) for link in range(len(self.chain)))
        cells = {id(place): place for place in places if isinstance(place, Cell) and not place.fixed}
        return list(cells.values())

"""What the stages of a step compile to: operations on the parts of preallocated tensors that a phase concerns.

Within a step there are four that depend on each other: predict, error, message, move. All that one of them does is
local: a node, its edges, and their other ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pcsim.dynamics.learning import LearningRule
from pcsim.engine import operations as do
from pcsim.engine.buffers import Arena, Bound, EdgeBuffers, NodeBuffers
from pcsim.engine.kernels import Conv2d, Linear
from pcsim.engine.operations import Operation
from pcsim.engine.plan import Mask, Phase, Plan, Positions
from pcsim.engine.stacks import Part, Place, Stacks
from pcsim.graph.energy import Gaussian, Scale
from pcsim.graph.node import Node

Operations: TypeAlias = list[Operation]
Activity: TypeAlias = Literal["start", "present", "forward"]
"""Which values edges read: as they start, as they are now, or those of the forward pass."""


class Stages:
    """The tensors of one plan and one batch size, and each stage as operations on them.

    Args:
        plan: what to compute.
        stacks: which nodes and edges are computed together.
        arena: scratch tensors; programs that never hold a state at the same time may share it.
        message_dtype: of the products in messages; None for that of the values.
    """

    def __init__(self, plan: Plan, stacks: Stacks, arena: Arena, *, message_dtype: torch.dtype | None = None) -> None:
        self.plan, self.problem = plan, plan.problem
        self._wiring, self._arena, self._message_dtype = plan.wiring, arena, message_dtype
        self._bind(stacks)
        self._users = self._wiring.users
        self._gradients: dict[nn.Parameter, Tensor] = {}
        for parameter, users in self._users.items():
            if users > 1:
                self._gradients[parameter] = arena.like(("total gradient", id(parameter)), parameter)
        for own in (buffers.gradients for stacks in (self.edges, self.nodes) for buffers in stacks):
            self._gradients.update({p: g for p, g in own.items() if self._users[p] == 1})
        self.direct_moves = self._may_move_directly()
        self.largest = 0.0
        """The largest update of the present step, where the relaxation may stop by it."""

    def _bind(self, stacks: Stacks) -> None:
        problem, plan = self.problem, self.plan
        rewritten = plan.ever_predicted | plan.learning().predict | (problem.relaxation.tolerance is not None)
        convolved = {
            place
            for stack in stacks.edges
            if any(isinstance(kernel, Conv2d) for kernel, _ in stack.chain or ())
            for place in (stack.source, stack.target)
        }
        self.nodes = [
            NodeBuffers(
                stack,
                problem,
                self._arena,
                ("node", place),
                rewritten=bool(rewritten[stack.positions].any()),
                images=place in convolved,
                slotted=len(stack.nodes[0].incoming) == 1,
            )
            for place, stack in enumerate(stacks.nodes)
        ]
        self.edges = [
            EdgeBuffers(
                stack,
                self.nodes[stack.source],
                self.nodes[stack.target],
                problem,
                self._arena,
                ("edge", place),
                images=stack.target in convolved,
                seed=lambda: self.problem.seed,
            )
            for place, stack in enumerate(stacks.edges)
        ]

    def _may_move_directly(self) -> bool:
        """Whether messages may be added to values at once, while other messages still wait to be computed."""
        relaxation, nodes = self.problem.relaxation, self._wiring.nodes
        plain = relaxation.plain and relaxation.tolerance is None and not self.plan.teaching
        gaussian = all(type(nodes[p].energy_function) is Gaussian for p in np.flatnonzero(self._wiring.free))
        return plain and gaussian and not any(e.stages and e.stages[0].kernel.reads == "input" for e in self.edges)

    @staticmethod
    def _reads_prediction_at_start(buffers: NodeBuffers) -> bool:
        return buffers.starts_forward and not buffers.stack.deterministic and not buffers.partial

    def _rows(self, mask: Mask) -> Iterator[tuple[NodeBuffers, Positions]]:
        for buffers in self.nodes:
            rows = buffers.stack.rows(mask)
            if len(rows):
                yield buffers, rows

    def _edge_rows(self, mask: Mask) -> Iterator[tuple[EdgeBuffers, Positions]]:
        for edge in self.edges:
            rows = edge.stack.rows(mask)
            if len(rows):
                yield from ((edge, part) for part in edge.parts(rows))

    def _edge_rows_by_factor(
        self, mask: Mask, factors: npt.NDArray[np.float64]
    ) -> Iterator[tuple[EdgeBuffers, Positions, float]]:
        for edge, rows in self._edge_rows(mask):
            own = factors[self._wiring.target[edge.stack.positions[rows]]]
            for factor in np.unique(own):
                yield edge, rows[own == factor], float(factor)

    def _activity(self, edge: EdgeBuffers, rows: Positions, activity: Activity) -> Part:
        source, name = edge.source, "value"
        if activity == "start" and self._reads_prediction_at_start(source):
            name = "prediction"
        if activity == "forward" and not source.stack.deterministic:
            name = "forward_value"
        return source.at(name, edge.stack.source_rows[rows])

    def _predict(self, operations: Operations, refresh: Mask, predict: Mask, activity: Activity) -> None:
        """Evaluate edges again, then the predictions that follow, deterministic nodes first."""
        wiring = self._wiring
        for generation in np.unique(wiring.generation[predict | wiring.any_of(refresh, wiring.target)]):
            members = wiring.generation == generation
            for edge, rows in self._edge_rows(refresh & members[wiring.target]):
                value: Place = self._activity(edge, rows, activity)
                for link, stage in enumerate(edge.stages):
                    place = edge.place(link + 1, rows)
                    bound = stage.bound(edge.stack.weight_rows[rows])
                    operations.append(do.running(bound, value, place))
                    value = place
                if not edge.stages and edge.direct:
                    operations.append(partial(do.take, edge.place(0, rows), value))
            for buffers, rows in self._rows(predict & members):
                self._transfer(operations, buffers, rows, activity)

    def _transfer(self, operations: Operations, buffers: NodeBuffers, rows: Positions, activity: Activity) -> None:
        chosen = masked(buffers.stack.positions[rows], len(self._wiring.nodes))
        feeding = [
            (edge, some, edge.contribution(some, self._activity(edge, some, activity)))
            for edge, some in self._edge_rows(chosen[self._wiring.target])
        ]
        if buffers.autograd:
            by_position = {
                int(position): place
                for edge, some, place in feeding
                for position, place in zip(edge.stack.positions[some], [place] * len(some), strict=True)
            }
            operations.append(partial(self._transfer_by_autograd, buffers, by_position))
            return
        self._combine(operations, buffers, [item for item in feeding if not item[0].direct])
        for link, stage in enumerate(buffers.stages):
            source, place = buffers.place(link, rows), buffers.place(link + 1, rows)
            operations.append(do.running(stage.bound(rows), source, place))

    @staticmethod
    def _combine(
        operations: Operations, buffers: NodeBuffers, feeding: list[tuple[EdgeBuffers, Positions, Place]]
    ) -> None:
        """Sum what several edges contribute."""
        if not feeding:
            return
        rows = np.unique(np.concatenate([edge.stack.target_rows[some] for edge, some, _ in feeding]))
        if all(np.array_equal(edge.stack.target_rows[some], rows) for edge, some, _ in feeding):
            operations.append(partial(do.add_up, buffers.place(0, rows), [place for _, _, place in feeding]))
            return
        operations.append(partial(do.zero, buffers.place(0, rows)))
        for edge, some, place in feeding:
            operations.append(do.adding(buffers.inlet_at(edge.stack.target_rows[some]), place, 1.0))

    def _transfer_by_autograd(self, buffers: NodeBuffers, contributions: dict[int, Place]) -> None:
        node = buffers.node
        with torch.enable_grad():
            leaves = {p: place.read().clone().requires_grad_() for p, place in sorted(contributions.items())}
            given = list(leaves.values())
            output = node.predict(given, self.problem.seed) if given else node.predict_from_prior(self.problem.batch)
        buffers.graph = leaves, output
        buffers.tensor("prediction")[0].copy_(output.detach())

    def _push(self, operations: Operations, phase: Phase, *, learning: bool) -> None:
        """Errors of the nodes that push, with precision and weight; for learning, with weight alone."""
        default = type(self.problem.rule).delta is LearningRule.delta
        for buffers, rows in self._rows(phase.push):
            scale = self._scale(buffers, rows, phase, learning=learning)
            value, prediction = buffers.at("value", rows), buffers.at("prediction", rows)
            delta = buffers.at("delta", rows)
            if type(buffers.node.energy_function) is Gaussian and (default or not learning):
                operations.append(do.subtracting(value, prediction, delta))
                if callable(scale) or isinstance(scale, Tensor) or scale != 1.0:
                    operations.append(partial(do.multiply, delta, do.as_function(scale)))
            else:
                rule = self.problem.rule.delta if learning else LearningRule.descent
                operations.append(partial(do.error_by_energy, buffers, rows.tolist(), rule, do.as_function(scale)))

    def _scale(
        self, buffers: NodeBuffers, rows: Positions, phase: Phase, *, learning: bool
    ) -> Scale | Callable[[], Scale]:
        scales = buffers.weights[rows]
        if not learning:
            scales = scales * phase.schedule[buffers.stack.positions[rows]]
            if buffers.given_precisions is None:
                members = [buffers.stack.nodes[row] for row in rows]
                return partial(do.own_precision, members, scales.tolist(), self._arena.dtype, self._arena.device)
            scales = scales * buffers.given_precisions[rows]
        return self._scale_of(scales, buffers)

    def _scale_of(self, scales: npt.NDArray[np.float64], buffers: NodeBuffers) -> Scale:
        """Factors on rows of a stack: a number where all are equal, else (k, 1, ...)."""
        if (scales == scales[0]).all():
            return float(scales[0])
        shape = (len(scales),) + (1,) * (1 + len(buffers.node.shape))
        return torch.as_tensor(scales, dtype=self._arena.dtype, device=self._arena.device).view(shape)

    def _pull(self, buffers: NodeBuffers, rows: Positions, phase: Phase) -> Operation:
        """A node's pull on itself, added to the descent."""
        descent = buffers.at("descent", rows)
        if type(buffers.node.energy_function) is Gaussian:
            return do.adding(descent, buffers.at("delta", rows), -1.0)
        return partial(
            do.pull_by_energy, buffers, rows.tolist(), do.as_function(self._scale(buffers, rows, phase, learning=False))
        )

    def _pull_back(self, operations: Operations, mask: Mask) -> None:
        """Errors pulled back through the transfers, to what the edges contribute."""
        for buffers, rows in self._rows(mask):
            if buffers.autograd:
                operations.append(partial(do.pull_back_by_autograd, buffers))
                continue
            for link in reversed(range(len(buffers.stages))):
                bound = buffers.stages[link].bound(rows)
                delta, goal = buffers.delta_at(rows, link + 1), buffers.delta_at(rows, link)
                value, output = buffers.place(link, rows), buffers.place(link + 1, rows)
                operations.append(do.sending(bound, delta, value, output, goal))

    def _pass_on(self, operations: Operations, phase: Phase) -> None:
        """Errors through deterministic nodes, within the step."""
        wiring = self._wiring
        for members, _ in reversed(wiring.generations):
            now = masked(members, len(phase.receive)) & phase.receive
            for buffers, rows in self._rows(now):
                operations.append(partial(do.zero, buffers.at("delta", rows)))
            for edge, rows in self._edge_rows(phase.message & now[wiring.source]):
                self._send_back(operations, edge, rows, "delta", 1.0)
            self._pull_back(operations, now)

    def _send(self, operations: Operations, message: Mask) -> None:
        """Messages to free nodes."""
        name, factor = ("value", self.problem.relaxation.rate) if self.direct_moves else ("descent", 1.0)
        for edge, rows in self._edge_rows(message):
            self._send_back(operations, edge, rows, name, factor)

    def _send_back(self, operations: Operations, edge: EdgeBuffers, rows: Positions, name: str, factor: float) -> None:
        goal = edge.source.at(name, edge.stack.source_rows[rows])
        delta = self._delta_at(operations, edge, rows, 0)
        if not edge.stages:
            operations.append(do.adding(goal, delta, factor))
            return
        stage = edge.stages[0]
        bound = stage.bound(edge.stack.weight_rows[rows])
        if isinstance(stage.kernel, Linear) and goal.out is not None and self._message_dtype is None:
            operations.append(do.adding_product(bound, goal.out, delta, factor))
            return
        value, output = self._activity(edge, rows, "present"), edge.place(1, rows)
        scratch = edge.message_place(0, rows)
        operations.append(self._message(bound, delta, value, output, scratch))
        operations.append(do.adding(goal, scratch, factor))

    def _message(self, bound: Bound, delta: Place, value: Place, output: Place, goal: Place) -> Operation:
        if bound.kernel.products and self._message_dtype is not None:
            return partial(do.rounded_message, bound, delta, value, output, goal, self._message_dtype)
        return do.sending(bound, delta, value, output, goal)

    def _delta_at(self, operations: Operations, edge: EdgeBuffers, rows: Positions, link: int) -> Place:
        """The target's error pulled back to place ``link + 1`` of an edge's chain."""
        position = int(edge.stack.positions[rows[0]])
        delta = edge.target.pulled(edge.stack.target_rows[rows], position)
        for later in reversed(range(link + 1, len(edge.stages))):
            stage = edge.stages[later]
            bound = stage.bound(edge.stack.weight_rows[rows])
            value, output = edge.place(later, rows), edge.place(later + 1, rows)
            place = edge.message_place(later, rows)
            operations.append(self._message(bound, delta, value, output, place))
            delta = place
        return delta

    def _teach(
        self, operations: Operations, phase: Phase, activity: Activity, factors: npt.NDArray[np.float64]
    ) -> None:
        """Gradients of the weights: −(∂a/∂θ)ᵀ δ over the batch size, δ times its node's factor."""
        factors = -factors / self.problem.batch
        shared: dict[nn.Parameter, list[Tensor]] = {}
        for edge, rows, factor in self._edge_rows_by_factor(phase.teach[self._wiring.target], factors):
            for link, stage in enumerate(edge.stages):
                places = stage.gradients(edge.stack.weight_rows[rows])
                if not places:
                    continue
                delta = self._delta_at(operations, edge, rows, link)
                value = self._activity(edge, rows, activity) if link == 0 else edge.place(link, rows)
                bound = stage.bound(edge.stack.weight_rows[rows])
                operations.append(partial(do.gradients, bound, delta, value, factor, places))
            if len(edge.stack.edges) == 1:  # edges that share parameters are alone in their stack
                for parameter, gradient in edge.gradients.items():
                    if self._users[parameter] > 1:
                        shared.setdefault(parameter, []).append(gradient)
        for buffers, rows in self._rows(phase.teach):
            # A node with parameters of its own is alone in its stack.
            factor = float(factors[buffers.stack.positions[rows[0]]])
            for parameter, gradient in self._teach_node(operations, buffers, rows, phase, factor).items():
                if self._users[parameter] > 1:
                    shared.setdefault(parameter, []).append(gradient)
        for parameter, gradients in shared.items():
            operations.append(partial(do.total, self._gradients[parameter], gradients))

    def _teach_node(
        self, operations: Operations, buffers: NodeBuffers, rows: Positions, phase: Phase, factor: float
    ) -> dict[nn.Parameter, Tensor]:
        for link, stage in enumerate(buffers.stages):
            parts = stage.gradients(rows)
            if parts:
                delta, value = buffers.delta_at(rows, link + 1), buffers.place(link, rows)
                operations.append(partial(do.gradients, stage.bound(rows), delta, value, factor, parts))
        written: dict[nn.Parameter, Tensor] = {}
        for row in rows.tolist():
            node = buffers.stack.nodes[row]
            by_autograd = node.parameters() if buffers.autograd else ()
            own = [p for p in by_autograd if p.requires_grad and p is not node.log_precision]
            places = [self._own_gradient(node, parameter) for parameter in own]
            if own:
                operations.append(partial(do.gradients_by_autograd, buffers, own, factor, places))
            written.update(zip(own, places, strict=True))
            learned = node.log_precision is not None and node.log_precision.requires_grad
            if learned and not buffers.stack.deterministic:
                place = self._own_gradient(node, node.log_precision)
                position = buffers.stack.positions[row]
                factors = phase.schedule[position] if self.plan.teaching else 1.0
                operations.append(partial(do.precision_gradient, buffers, row, float(factors), place))
        return written

    def _own_gradient(self, node: Node, parameter: nn.Parameter) -> Tensor:
        place = self._arena.like(("own gradient", node.name, id(parameter)), parameter)
        if self._users[parameter] == 1:
            self._gradients[parameter] = place
        return place

    def _displace(self, buffers: NodeBuffers, rows: Positions) -> None:
        """Move nodes by their descent; remembers the largest update if the relaxation may stop by it."""
        relaxation = self.problem.relaxation
        value, descent = buffers.at("value", rows), buffers.at("descent", rows)
        before = value.read().clone() if relaxation.tolerance is not None else None
        velocity = buffers.at("velocity", rows) if not relaxation.plain else None
        move, moved_on = relaxation.displacement(descent.read(), None if velocity is None else velocity.read())
        if velocity is not None and moved_on is not None:
            velocity.write(moved_on)
        value.add(move, 1.0)
        if buffers.partial:
            buffers.clamp()
        if before is not None:
            self.largest = max(self.largest, (value.read() - before).abs().max().item())


def masked(members: Positions, size: int) -> Mask:
    """The mask of these positions."""
    mask = np.zeros(size, bool)
    mask[members] = True
    return mask

"""What nodes and edges show after a run: the state it left, and what follows from it at the present weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pcsim.engine.engine import State
from pcsim.engine.reference import Evaluation, evaluate
from pcsim.errors import StateError
from pcsim.graph.edge import Edge
from pcsim.graph.evaluation import frozen_statistics
from pcsim.graph.node import Node


class Reading:
    """A state, opened for reading node by node and edge by edge.

    Values are the state's own tensors. Predictions, errors and messages are evaluated when they are read, at the
    present weights, once per change of a weight: they are never a step stale.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._evaluation: tuple[tuple[int, ...], Evaluation] | None = None

    def _evaluate(self) -> Evaluation:
        problem = self._state.problem
        versions = tuple(parameter._version for parameter in problem.snapshot.parameters)
        if self._evaluation is None or self._evaluation[0] != versions:
            value, scales = self._state.value, problem.scales(self._state.last_step)
            with torch.no_grad(), frozen_statistics(problem.snapshot.normalising):
                self._evaluation = versions, evaluate(problem, value, value, scales)
        return self._evaluation[1]

    def value(self, node: Node) -> Tensor:
        """v_n, (batch, *shape); of a deterministic node, its prediction at the present values and weights."""
        if node.name in self._state.problem.clamping.deterministic:
            return _of(self._evaluate().activity, node)
        return _of(self._state.value, node)

    def forward_value(self, node: Node) -> Tensor:
        """v_n after the feed-forward start, (batch, *shape)."""
        return _of(self._state.forward_value, node)

    def forward_prediction(self, node: Node) -> Tensor:
        """u_n after the feed-forward start, (batch, *shape)."""
        return _of(self._state.forward_prediction, _predicted(node))

    def prediction(self, node: Node) -> Tensor:
        """u_n, (batch, *shape)."""
        return _of(self._evaluate().prediction, _predicted(node))

    def error(self, node: Node) -> Tensor:
        """ε_n = v_n − u_n, (batch, *shape)."""
        prediction = self.prediction(node)
        if node.name in self._state.problem.clamping.deterministic:
            return torch.zeros_like(prediction)
        return self.value(node) - prediction

    def precision(self, node: Node) -> Tensor:
        """π_n at the last inference step, 0-d or (*shape)."""
        problem = self._state.problem
        precision = problem.precision(node.name, self._state.last_step)
        return torch.as_tensor(precision, dtype=problem.dtype, device=problem.device)

    def energy(self, node: Node) -> Tensor:
        """E_n before precision and weight, (batch,); zero where a node has none."""
        problem = self._state.problem
        if node.name not in problem.clamping.energetic:
            return torch.zeros(problem.batch, dtype=problem.dtype, device=problem.device)
        return node.energy_function.sample_energy(self.value(node), self.prediction(node))

    def contribution(self, edge: Edge) -> Tensor:
        """a_e, (batch, *shape before the target's transfer)."""
        return self._evaluate().contribution[edge.name]

    def message(self, edge: Edge) -> Tensor:
        """m_e, (batch, *source shape)."""
        return self._evaluate().message[edge.name]


def _predicted(node: Node) -> Node:
    if not node.predicted:
        raise StateError(f"node {node.name!r} has no prediction: no edge leads into it, and it has no prior")
    return node


def _of(tensors: dict[str, Tensor], node: Node) -> Tensor:
    if node.name not in tensors:
        raise StateError(f"node {node.name!r} was added after the latest run; run Simulator.infer again")
    return tensors[node.name]

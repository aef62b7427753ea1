"""What nodes and edges show after a run: the state it left, and what follows from it at the present weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pcsim.engine.local_rules import Evaluation
from pcsim.engine.problem import State
from pcsim.errors import StateError
from pcsim.graph.edge import Edge
from pcsim.graph.node import Node
from pcsim.graph.statistics import frozen_statistics


class Reading:
    """A state, opened for reading node by node and edge by edge.

    What is read is a copy of the reader's own. Predictions, errors and messages are evaluated when they are read, at
    the present weights and settings, so they are never a step stale; reading a node costs that node, its incoming
    edges, and the deterministic nodes between.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def value(self, node: Node) -> Tensor:
        """v_n, (batch, *shape); of a deterministic node, its prediction at the present values and weights."""
        if node.name in self._state.task.clamping.deterministic:
            return self._evaluated(lambda now: now.activity(node.name))
        return _copy(_of(self._state.value, node))

    def forward_value(self, node: Node) -> Tensor:
        """v_n after the feed-forward start, (batch, *shape)."""
        return _copy(_of(self._state.forward_value, node))

    def forward_prediction(self, node: Node) -> Tensor:
        """u_n after the feed-forward start, (batch, *shape)."""
        return _copy(_of(self._state.forward_prediction, _predicted(node)))

    def prediction(self, node: Node) -> Tensor:
        """u_n, (batch, *shape)."""
        return self._evaluated(lambda now: now.prediction(_predicted(node).name))

    def error(self, node: Node) -> Tensor:
        """ε_n = v_n − u_n, (batch, *shape)."""
        if node.name in self._state.task.clamping.deterministic:
            return torch.zeros_like(self.prediction(node))
        return self._evaluated(lambda now: now.error(_predicted(node).name))

    def precision(self, node: Node) -> Tensor:
        """π_n at the last inference step, 0-d, (*shape), or (batch, ...) where it was given so."""
        state = self._state
        precision = state.task.precision(node.name, state.last_step, state.batch)
        return torch.as_tensor(precision, dtype=state.batch.dtype, device=_where(state, node)).clone()

    def energy(self, node: Node) -> Tensor:
        """E_n before precision and weight, (batch,); zero where a node has none."""
        state = self._state
        if node.name not in state.task.clamping.energetic:
            return torch.zeros(state.batch.size, dtype=state.batch.dtype, device=_where(state, node))
        return self._evaluated(lambda now: node.energy_function.sample_energy(*now.compared(node.name)))

    def contribution(self, edge: Edge) -> Tensor:
        """a_e, (batch, *shape before the target's transfer)."""
        return self._evaluated(lambda now: now.contribution(edge.name))

    def message(self, edge: Edge) -> Tensor:
        """m_e, (batch, *source shape)."""
        return self._evaluated(lambda now: now.message(edge.name))

    def _evaluated(self, ask: Callable[[Evaluation], Tensor]) -> Tensor:
        state = self._state
        with torch.no_grad(), frozen_statistics(state.task.fingerprint.normalising):
            now = Evaluation(state, state.last_step, later=True)
            try:
                return _copy(ask(now))
            except KeyError as missing:
                raise StateError(
                    f"{missing.args[0]!r} is not part of the latest run: nodes or edges were added or removed after "
                    "it; run Simulator.infer again"
                ) from None


def _where(state: State, node: Node) -> torch.device:
    return node.device or state.batch.device


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _predicted(node: Node) -> Node:
    if not node.predicted:
        raise StateError(f"node {node.name!r} has no prediction: no edge leads into it, and it has no prior")
    return node


def _of(tensors: Mapping[str, Tensor], node: Node) -> Tensor:
    if node.name not in tensors:
        raise StateError(f"node {node.name!r} was added after the latest run; run Simulator.infer again")
    return tensors[node.name]

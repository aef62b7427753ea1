"""An optimizer that keeps what it is given: how the gradients of every inference step become visible."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcsim.graph.network import Network


class RecordingOptimizer(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients of every step, by parameter name (of a shared one, by all).

    Args:
        network: whose parameters to update.
        learning_rate: 0 leaves them as they are.
    """

    def __init__(self, network: Network, learning_rate: float) -> None:
        self.named = dict(network.named_parameters(remove_duplicate=False))
        self.gradients: list[dict[str, Tensor | None]] = []
        super().__init__(list(network.parameters()) or [nn.Parameter(torch.zeros(()))], lr=learning_rate)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Record, then step."""
        grads = {name: parameter.grad for name, parameter in self.named.items()}
        self.gradients.append({name: None if grad is None else grad.clone() for name, grad in grads.items()})
        super().step()

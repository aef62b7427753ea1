"""A training step in pydeepity (version 0.1.0a3), C++: its latents are the inputs of activations.

It learns from the errors before the last move of the latents, so that T moves are T + 1 of its steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from deepity import Linear, ReLU, Sigmoid, SimplePCN, TanH

from benchmarks.workloads import RATE, WEIGHT_RATE, Chain, Problem

ACTIVATIONS = {"tanh": TanH, "relu": ReLU, "sigmoid": Sigmoid}


def build(chain: Chain, problem: Problem) -> tuple[Callable[[], None], Callable[[], npt.NDArray[np.float32]]]:
    """A training step that returns when it is done, and a forward pass."""
    if chain.channels:
        raise TypeError(f"{chain.name} has convolutions, which its plain network does not")
    parts: list[object] = []
    for place, weight in enumerate(problem.weights):
        # An activation stands behind the layer that reads through it; the first reads its input as it is.
        parts += [Linear(weight.shape[1], weight.shape[0]), *([ACTIVATIONS[chain.activation]()] if place else [])]
    network = SimplePCN(*parts, batch_size=chain.batch)
    network.configure(learning_rate=WEIGHT_RATE, inference_rate=RATE, lmbda=0.0, optimizer="ADAM", seed=0)
    for layer, weight in zip(network.layers, problem.weights, strict=False):
        layer.set_weights(np.ascontiguousarray(weight))
        layer.set_biases(np.zeros(len(weight), np.float32))
    inputs, targets = np.ascontiguousarray(problem.inputs), np.ascontiguousarray(problem.targets)

    def step() -> None:
        network.train_step_with_projection(inputs, targets, chain.steps + 1, False)

    def forward() -> npt.NDArray[np.float32]:
        values = inputs
        activation = {"tanh": np.tanh, "relu": lambda v: np.maximum(v, 0), "sigmoid": lambda v: 1 / (1 + np.exp(-v))}
        for place, layer in enumerate(network.layers[: len(problem.weights)]):
            weight = np.asarray(layer.weights).reshape(problem.weights[place].shape)
            values = (activation[chain.activation](values) if place else values) @ weight.T + np.asarray(layer.biases)
        return values

    return step, forward

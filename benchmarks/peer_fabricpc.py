"""A training step in FabricPC (version 0.6.0): its ``make_train_step`` with ``InferenceSGD``.

Its max-pooling is a node with a latent of its own, so convolution, activation and pooling are one node written here.
Images are channels-last, as its convolutions want them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from fabricpc import setup_jax
from fabricpc.core.activations import (
    GeluActivation,
    IdentityActivation,
    ReLUActivation,
    SigmoidActivation,
    TanhActivation,
)
from fabricpc.core.inference import InferenceSGD
from fabricpc.core.initializers import KaimingInitializer
from fabricpc.core.topology import Edge
from fabricpc.core.types import NodeParams
from fabricpc.graph_assembly import TaskMap, graph
from fabricpc.graph_initialization import initialize_graph_state, initialize_params
from fabricpc.nodes import IdentityNode, Linear
from fabricpc.nodes.base import NodeBase, SlotSpec
from fabricpc.training import make_train_step

from benchmarks.workloads import RATE, WEIGHT_RATE, Chain, Problem

ACTIVATIONS = {
    "tanh": TanhActivation,
    "gelu": GeluActivation,
    "relu": ReLUActivation,
    "sigmoid": SigmoidActivation,
}
WINDOW = (1, 2, 2, 1)


class PooledConvolution(NodeBase):  # type: ignore[misc]
    """Predicted by a 3x3 convolution, an activation and 2x2 max-pooling."""

    def __init__(self, shape: tuple[int, ...], name: str, activation: Any) -> None:
        super().__init__(shape=shape, name=name, activation=activation, weight_init=KaimingInitializer())

    @staticmethod
    def get_slots() -> dict[str, SlotSpec]:
        """One input."""
        return {"in": SlotSpec(name="in", is_multi_input=False)}

    @staticmethod
    def initialize_params(key: Any, node_shape: Any, input_shapes: Any, weight_init: Any, config: Any) -> NodeParams:
        """Zeros; the workload's weights take their place."""
        [(edge, source)] = input_shapes.items()
        return NodeParams({edge: jnp.zeros((3, 3, source[-1], node_shape[-1]))}, {"b": jnp.zeros(node_shape[-1:])})

    @staticmethod
    def predict(params: NodeParams, inputs: Any, state: Any, node_info: Any) -> tuple[Any, None]:
        """What the node is predicted to be."""
        [(edge, images)] = inputs.items()
        axes = ("NHWC", "HWIO", "NHWC")
        drive = jax.lax.conv_general_dilated(images, params.weights[edge], (1, 1), "SAME", dimension_numbers=axes)
        activation = node_info.activation
        activity = type(activation).forward(drive + params.biases["b"], activation.config)
        return jax.lax.reduce_window(activity, -jnp.inf, jax.lax.max, WINDOW, WINDOW, "VALID"), None


def _nodes(chain: Chain) -> list[Any]:
    """The input's node, and one for each layer."""
    activation = ACTIVATIONS[chain.activation]()
    shape = (*chain.shape[1:], chain.shape[0]) if chain.channels else chain.shape
    nodes = [IdentityNode(shape=shape, name="input")]
    for place, latent in enumerate(chain.latent_shapes(), start=1):
        name, last = f"layer{place}", place == chain.depth
        if len(latent) == 3:
            channels, height, width = latent
            nodes.append(PooledConvolution((height, width, channels), name, activation))
        else:
            transfer = IdentityActivation() if last else activation
            nodes.append(Linear(latent, name, transfer, flatten_input=len(nodes[-1].shape) == 3))
    return nodes


def _as_stored(weight: npt.NDArray[np.float32], source: tuple[int, ...]) -> Any:
    """A weight as FabricPC keeps it: input axes first, images channels-last."""
    if weight.ndim == 4:
        return jnp.asarray(weight.transpose(2, 3, 1, 0))
    if len(source) == 3:
        height, width, channels = source
        weight = weight.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(len(weight), -1)
    return jnp.asarray(weight.T)


def build(chain: Chain, problem: Problem) -> tuple[Callable[[], None], Callable[[], npt.NDArray[np.float32]]]:
    """A training step that returns when it is done, and a forward pass."""
    setup_jax("cpu")
    nodes = _nodes(chain)
    structure = graph(
        nodes=nodes,
        edges=[Edge(source=before, target=after.slot("in")) for before, after in pairwise(nodes)],
        task_map=TaskMap(x=nodes[0], y=nodes[-1]),
        inference=InferenceSGD(eta_infer=RATE, infer_steps=chain.steps),
    )
    parameters = initialize_params(structure, jax.random.PRNGKey(0))
    given = dict(parameters.nodes)
    for source, node, weight in zip(nodes[:-1], nodes[1:], problem.weights, strict=True):
        [edge], [(bias, zeros)] = given[node.name].weights, given[node.name].biases.items()
        given[node.name] = NodeParams({edge: _as_stored(weight, source.shape)}, {bias: jnp.zeros_like(zeros)})
    adam = optax.adam(WEIGHT_RATE)
    state = {"parameters": parameters._replace(nodes=given)}
    state["moments"] = adam.init(state["parameters"])
    train = make_train_step(structure, adam)
    inputs = jnp.asarray(problem.inputs.transpose(0, 2, 3, 1) if chain.channels else problem.inputs)
    batch, key = {"x": inputs, "y": jnp.asarray(problem.targets)}, jax.random.PRNGKey(1)

    def step() -> None:
        state["parameters"], state["moments"], _, settled = train(state["parameters"], state["moments"], batch, key)
        jax.block_until_ready((state["parameters"], settled))

    @jax.jit
    def forward(parameters: Any) -> Any:
        clamps = {nodes[0].name: inputs}
        start = initialize_graph_state(structure, chain.batch, key, clamps=clamps, params=parameters)
        return start.nodes[nodes[-1].name].z_mu

    return step, lambda: np.asarray(forward(state["parameters"]))

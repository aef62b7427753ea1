"""A training step in pcx (version 0.6.3), as its tutorials write it: all T steps unrolled under one ``jit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pcx.functional as transform
import pcx.nn as layers
import pcx.predictive_coding as coding
import pcx.utils as tools
from pcx import static

from benchmarks.workloads import RATE, WEIGHT_RATE, Chain, Problem

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
}


class Model(coding.EnergyModule):  # type: ignore[misc]
    """One value node behind each layer; the last is clamped."""

    def __init__(self, chain: Chain, weights: list[npt.NDArray[np.float32]]) -> None:
        super().__init__()
        activation = static(ACTIVATIONS[chain.activation])
        self.parts: list[tuple[Any, ...]] = []
        for place, weight in enumerate(weights):
            out, features = weight.shape[:2]
            if weight.ndim == 4:
                layer = layers.Conv2d(features, out, 3, padding=1)
                part: tuple[Any, ...] = (layer, activation, layers.MaxPool2d(2, 2))
            else:
                layer = layers.Linear(features, out)
                part = (static(jnp.ravel), layer) if place == len(weights) - 1 else (layer, activation)
            layer.nn.weight.set(jnp.asarray(weight))
            layer.nn.bias.set(jnp.zeros(layer.nn.bias.shape, jnp.float32))
            self.parts.append(part)
        self.values = [coding.Vode() for _ in weights]
        self.values[-1].h.frozen = True

    def __call__(self, activity: Any, target: Any = None) -> Any:
        """The prediction of the last value, after each layer has been offered to its value node."""
        for part, value in zip(self.parts, self.values, strict=True):
            for function in part:
                activity = function(activity)
            activity = value(activity)
        if target is not None:
            self.values[-1].set("h", target)
        return self.values[-1].get("u")


def build(chain: Chain, problem: Problem) -> tuple[Callable[[], None], Callable[[], npt.NDArray[np.float32]]]:
    """A training step that returns when it is done, and a forward pass."""
    # A mask is changed by its method ``to``, so each use has one of its own.
    latents, weights = tools.M_hasnot(coding.VodeParam, frozen=True), tools.M(layers.LayerParam)
    of_latents = tools.M_hasnot(coding.VodeParam, frozen=True).to([False, True])
    of_weights = tools.M(layers.LayerParam).to([False, True])
    per_sample = tools.M(coding.VodeParam | coding.VodeParam.Cache).to((None, 0))
    cache = coding.VodeParam.Cache

    @transform.vmap(per_sample, in_axes=(0, 0), out_axes=0)  # type: ignore[untyped-decorator]
    def start(inputs: Any, targets: Any, *, model: Model) -> Any:
        return model(inputs, targets)

    @transform.vmap(per_sample, in_axes=(0,), out_axes=(None, 0), axis_name="samples")  # type: ignore[untyped-decorator]
    def energy(inputs: Any, *, model: Model) -> Any:
        outputs = model(inputs)
        return jax.lax.psum(model.energy(), "samples"), outputs

    slope_of_latents = transform.value_and_grad(of_latents, has_aux=True)(energy)
    slope_of_weights = transform.value_and_grad(of_weights, has_aux=True)(energy)

    @transform.jit()  # type: ignore[untyped-decorator]
    def train(inputs: Any, targets: Any, *, model: Model, adam: Any, descent: Any) -> None:
        model.train()
        with tools.step(model, (coding.STATUS.INIT, None), clear_params=cache):
            start(inputs, targets, model=model)
        descent.init(latents(model))
        for _ in range(chain.steps):
            with tools.step(model, clear_params=cache):
                _, slope = slope_of_latents(inputs, model=model)
            descent.step(model, slope["model"])
        descent.clear()
        with tools.step(model, clear_params=cache):
            _, slope = slope_of_weights(inputs, model=model)
        adam.step(model, slope["model"], scale_by=1 / chain.batch)

    @transform.jit()  # type: ignore[untyped-decorator]
    def forward(inputs: Any, *, model: Model) -> Any:
        model.eval()
        with tools.step(model, (coding.STATUS.INIT, None), clear_params=cache):
            return start(inputs, None, model=model)

    model = Model(chain, problem.weights)
    inputs, targets = jnp.asarray(problem.inputs), jnp.asarray(problem.targets)
    forward(inputs, model=model)  # gives the value nodes their shapes, without which the step would compile twice
    adam = tools.Optim(lambda: optax.adam(WEIGHT_RATE), weights(model))
    descent = tools.Optim(lambda: optax.sgd(RATE))

    def step() -> None:
        train(inputs, targets, model=model, adam=adam, descent=descent)
        jax.block_until_ready(jax.tree_util.tree_leaves(model))

    return step, lambda: np.asarray(forward(inputs, model=model))

"""What a user would write in PyTorch alone: predictive coding with one autograd call per step, and backprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn, optim

from benchmarks.contender import BACKPROP_LOOP, COMPILED, CPU, LOOP, Local, UnavailableError
from benchmarks.full_width import module_and_data
from benchmarks.variants import BACKPROP, MULTIPLIER_RATE, Variant
from benchmarks.workloads import WEIGHT_RATE, Chain, Topology, Workload, make_problem

activations: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}
Layers: TypeAlias = nn.Sequential
CHANNELS_LAST = "channels_last"


def layouts(workload: Workload, device: torch.device = CPU) -> tuple[str, ...]:
    """The memory formats that are tried; the faster counts."""
    if isinstance(workload, Topology) and device.type == "cpu":
        # PyTorch 2.13 corrupts memory there in the backward pass of small 1x1 convolutions with a stride in the other.
        return ("contiguous",)
    images = isinstance(workload, Topology) or (isinstance(workload, Chain) and workload.channels)
    return ("contiguous", CHANNELS_LAST) if images else ("",)


def layers_and_data(
    chain: Chain, layout: str, device: torch.device = CPU, latents: str = "outputs"
) -> tuple[Layers, Tensor, Tensor]:
    """One module per predicted value, the inputs and the targets."""
    problem = make_problem(chain)
    parts: list[nn.Module] = []
    for place, weight in enumerate(problem.weights, start=1):
        activation = activations[chain.activation]
        if weight.ndim == 4:
            mapping: nn.Conv2d | nn.Linear = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            parts.append(nn.Sequential(mapping, activation(), nn.MaxPool2d(2)))
        else:
            mapping = nn.Linear(weight.shape[1], weight.shape[0])
            flatten = [nn.Flatten()] if chain.channels and place == len(chain.channels) + 1 else []
            before = [activation()] if latents == "inputs" and place > 1 else flatten
            after = [] if place == chain.depth or latents == "inputs" else [activation()]
            parts.append(nn.Sequential(*before, mapping, *after))
        with torch.no_grad():
            mapping.weight.copy_(torch.from_numpy(weight))
            assert mapping.bias is not None
            mapping.bias.zero_()
    layers, inputs = nn.Sequential(*parts).to(device), torch.from_numpy(problem.inputs).to(device)
    if layout == CHANNELS_LAST:
        layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = inputs.to(memory_format=torch.channels_last)
    return layers, inputs, torch.from_numpy(problem.targets).to(device)


def backprop(
    workload: Chain | Topology, layout: str, device: torch.device = CPU, compiled_by: str | None = None
) -> Local:
    """A training step by backprop; the forward and backward pass compiled by a backend of ``torch.compile``, if named.

    A compiler that does not work raises :class:`UnavailableError` in the first step.
    """
    layers: nn.Module
    if isinstance(workload, Topology):
        layers, inputs, targets = module_and_data(workload, device)
        if layout == CHANNELS_LAST:
            layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            inputs = inputs.to(memory_format=torch.channels_last)
    else:
        layers, inputs, targets = layers_and_data(workload, layout, device)
    adam = optim.Adam(layers.parameters(), lr=WEIGHT_RATE, fused=True)
    called = layers if compiled_by is None else torch.compile(layers, backend=compiled_by, dynamic=False)

    def train() -> None:
        backprop_step(called, adam, inputs, targets)

    def train_compiled() -> None:
        try:
            train()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may raise that finds no C++ or Triton
            raise UnavailableError(f"torch.compile: {type(error).__name__}: {error}") from error

    def error() -> float:
        return _error(layers, inputs, targets)

    if compiled_by is None:
        return Local(BACKPROP.name, BACKPROP_LOOP, train, error, layout, device)
    return Local(BACKPROP.name, COMPILED, train_compiled, error, layout, device)


def backprop_step(layers: Callable[[Tensor], Tensor], adam: optim.Adam, inputs: Tensor, targets: Tensor) -> None:
    """One step down the gradient of the half squared error, a mean over samples."""
    adam.zero_grad()
    loss = 0.5 * (layers(inputs) - targets).square().sum() / len(inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()


def loop(chain: Chain, variant: Variant, layout: str, device: torch.device = CPU) -> Local:
    """A training step of predictive coding: the energy of the whole network is differentiated at every step."""
    layers, inputs, targets = layers_and_data(chain, layout, device, variant.latents)
    adam = optim.Adam(layers.parameters(), lr=WEIGHT_RATE, fused=True)
    train = _Loop(chain, variant, layers, inputs, targets, adam)
    return Local(variant.name, LOOP, train, lambda: _error(layers, inputs, targets), layout, device)


class _Loop:
    def __init__(
        self, chain: Chain, variant: Variant, layers: Layers, inputs: Tensor, targets: Tensor, adam: optim.Adam
    ) -> None:
        self.chain, self.variant, self.layers, self.adam = chain, variant, list(layers), adam
        self.inputs, self.targets = inputs, targets
        self.parameters = [list(layer.parameters()) for layer in layers]

    def energy(self, values: list[Tensor], sources: list[Tensor], step: int | None = None) -> Tensor:
        """Σ π ½‖v − u‖² over nodes, units and samples; with π = 1 where no step is named."""
        total = torch.zeros((), device=self.inputs.device)
        before = [self.inputs, *sources]
        for place, (layer, source, value) in enumerate(zip(self.layers, before, values, strict=True), start=1):
            precision = 1.0 if step is None else self.variant.precision(step, len(values) - place, self.chain)
            total = total + 0.5 * precision * (value - layer(source)).square().sum()
        return total

    def __call__(self) -> None:
        """One training step."""
        rate, rule = self.variant.rate(self.chain), self.variant.rule
        incremental = rule == "incremental"
        self.adam.zero_grad()
        with torch.no_grad():
            forward = [self.inputs]
            for layer in self.layers:
                forward.append(layer(forward[-1]))
        latents = forward[1:-1]
        if self.variant.relaxed == "errors":
            self._relax_errors()
            return
        multipliers = [torch.zeros_like(latent) for latent in latents]
        for step in range(self.variant.steps(self.chain)):
            latents = [latent.detach().requires_grad_() for latent in latents]
            energy = self.energy([*latents, self.targets], latents, step)
            if self.variant.relaxed == "multipliers":
                energy = energy + self._multiplied(latents, multipliers)
            if incremental:
                self.adam.zero_grad()
                energy.backward()  # type: ignore[no-untyped-call]
                gradients = [latent.grad for latent in latents if latent.grad is not None]
            else:
                gradients = list(torch.autograd.grad(energy, latents))
            if rule == "arrival":
                self._learn_at(step, [self.inputs, *latents, self.targets])
            with torch.no_grad():
                latents = [latent - rate * gradient for latent, gradient in zip(latents, gradients, strict=True)]
                if self.variant.relaxed == "multipliers":
                    for error, multiplier in zip(self._errors(latents), multipliers, strict=True):
                        multiplier.add_(error, alpha=MULTIPLIER_RATE)
            if incremental:
                self._learn(step)
        if rule in ("settled", "forward"):
            sources = forward[1:-1] if rule == "forward" else latents
            energy = self.energy([*latents, self.targets], sources)
            if self.variant.relaxed == "multipliers":
                energy = energy + self._multiplied(latents, multipliers)
            (energy / len(self.inputs)).backward()  # type: ignore[no-untyped-call]
        if not incremental:
            self.adam.step()

    def _errors(self, latents: list[Tensor]) -> list[Tensor]:
        before = [self.inputs, *latents[:-1]]
        return [value - layer(source) for layer, source, value in zip(self.layers, before, latents, strict=False)]

    def _multiplied(self, latents: list[Tensor], multipliers: list[Tensor]) -> Tensor:
        """Σ λ · ε."""
        products = [(m * error).sum() for m, error in zip(multipliers, self._errors(latents), strict=True)]
        return torch.stack(products).sum()

    def _relax_errors(self) -> None:
        """A training step in error coordinates: each value is what is predicted and an error that moves."""
        rate, errors = self.variant.rate(self.chain), list[Tensor]()
        for step in range(self.variant.steps(self.chain) + 1):
            errors = [error.detach().requires_grad_() for error in errors]
            value, values = self.inputs, list[Tensor]()
            for place, layer in enumerate(self.layers[:-1]):
                predicted = layer(value)
                if not step:
                    errors.append(torch.zeros_like(predicted).detach().requires_grad_())
                value = predicted + errors[place]
                values.append(value)
            if step == self.variant.steps(self.chain):
                break
            output = 0.5 * (self.targets - self.layers[-1](value)).square().sum()
            energy = output + sum(0.5 * error.square().sum() for error in errors)
            gradients = torch.autograd.grad(energy, errors)
            with torch.no_grad():
                errors = [error - rate * gradient for error, gradient in zip(errors, gradients, strict=True)]
        self.adam.zero_grad()
        values = [value.detach() for value in values]
        (self.energy([*values, self.targets], values) / len(self.inputs)).backward()  # type: ignore[no-untyped-call]
        self.adam.step()

    def _learn_at(self, step: int, values: list[Tensor]) -> None:
        """The gradient of the layer whose error arrives at this step."""
        place = len(self.layers) - 1 - step
        error = values[place + 1].detach() - self.layers[place](values[place].detach())
        (0.5 * error.square().sum() / len(self.inputs)).backward()  # type: ignore[no-untyped-call]

    def _learn(self, step: int) -> None:
        """Let the layers learn that an error has reached; Adam would count the others' zeros as gradients."""
        for place, parameters in enumerate(self.parameters, start=1):
            reached = len(self.layers) - place <= step
            for parameter in parameters:
                if reached and parameter.grad is not None:
                    parameter.grad /= len(self.inputs)
                else:
                    parameter.grad = None
        self.adam.step()


@torch.no_grad()
def _error(layers: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    return 0.5 * float((layers(inputs) - targets).double().square().sum()) / len(inputs)

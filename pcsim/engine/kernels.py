"""Kernels by hand, for the modules where the benchmarks show that it pays."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pcsim.engine.kernel import Kernel, Saved, Weights, register

aten = torch.ops.aten

Normalising: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d


def _tensor(result: Tensor) -> Tensor:
    """What an ATen operation returns; their stubs leave it untyped."""
    return result


class Identity(Kernel[nn.Identity]):
    """``nn.Identity``; the engine leaves it out of a chain, so nothing is ever computed."""

    stacks, reads, fills_out, elementwise = True, "nothing", True, True

    def forward(self, module: nn.Identity, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The value itself."""
        return value if out is None else out.copy_(value)

    def message(
        self,
        module: nn.Identity,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta itself."""
        return delta if out is None else out.copy_(delta)


class Linear(Kernel[nn.Linear]):
    """``nn.Linear`` on (batch, features); a stack is one batched matrix product."""

    stacks, reads, products, fills_out = True, "nothing", True, True

    def accepts(self, module: nn.Linear, shape: tuple[int, ...]) -> bool:
        """Whether values have one axis of features."""
        return len(shape) == 1

    def signature(self, module: nn.Linear) -> Hashable:
        """Its sizes; a graph may have tens of thousands, and printing each would take seconds."""
        return module.in_features, module.out_features, module.bias is not None

    def forward(self, module: nn.Linear, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """Value · Wᵀ + b, (k?, batch, out features)."""
        weight = weights[0].mT
        if len(weights) == 1:
            return torch.matmul(value, weight, out=out)
        if value.dim() == 2:
            return torch.addmm(weights[1], value, weight, out=out)
        return torch.baddbmm(weights[1].unsqueeze(1), value, weight, out=out)

    def message(
        self,
        module: nn.Linear,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta · W, (k?, batch, in features)."""
        return torch.matmul(delta, weights[0], out=out)

    def gradients(
        self,
        module: nn.Linear,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        factor: float,
        out: Weights,
        saved: Saved,
    ) -> None:
        """Write factor · deltaᵀ value for the weights and factor · Σ delta for the bias."""
        product = torch.addmm if value.dim() == 2 else torch.baddbmm
        product(out[0], delta.mT, value, beta=0, alpha=factor, out=out[0])
        if len(out) > 1:
            torch.sum(delta, -2, out=out[1]).mul_(factor)


class Tanh(Kernel[nn.Tanh]):
    """``nn.Tanh``."""

    stacks, reads, fills_out, elementwise = True, "output", True, True

    def forward(self, module: nn.Tanh, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The hyperbolic tangent of each unit."""
        return torch.tanh(value, out=out)

    def message(
        self,
        module: nn.Tanh,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta · (1 − output²)."""
        if out is None:
            return _tensor(aten.tanh_backward(delta, output))
        return _tensor(aten.tanh_backward.grad_input(delta, output, grad_input=out))


class ReLU(Kernel[nn.ReLU]):
    """``nn.ReLU``."""

    stacks, reads, fills_out, elementwise = True, "output", True, True

    def forward(self, module: nn.ReLU, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """Each unit, or 0 where it is negative."""
        return torch.clamp_min(value, 0, out=out)

    def message(
        self,
        module: nn.ReLU,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta where the output is positive."""
        if out is None:
            return _tensor(aten.threshold_backward(delta, output, 0))
        return _tensor(aten.threshold_backward.grad_input(delta, output, 0, grad_input=out))


class GELU(Kernel[nn.GELU]):
    """``nn.GELU``, exact or in its tanh approximation."""

    stacks, reads, fills_out, elementwise = True, "input", True, True

    def forward(self, module: nn.GELU, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """Each unit times the Gaussian distribution function of it."""
        if out is None:
            return _tensor(aten.gelu(value, approximate=module.approximate))
        return _tensor(aten.gelu.out(value, approximate=module.approximate, out=out))

    def message(
        self,
        module: nn.GELU,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta times the derivative at the input."""
        if out is None:
            return _tensor(aten.gelu_backward(delta, value, approximate=module.approximate))
        return _tensor(aten.gelu_backward.grad_input(delta, value, approximate=module.approximate, grad_input=out))


class Flatten(Kernel[nn.Flatten]):
    """``nn.Flatten()`` of a value to (batch, features)."""

    reads = "nothing"

    def accepts(self, module: nn.Flatten, shape: tuple[int, ...]) -> bool:
        """Whether all axes but the batch are flattened."""
        return (module.start_dim, module.end_dim) == (1, -1)

    def forward(self, module: nn.Flatten, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The value, one axis per sample; a copy, since latents move in place while this is still read."""
        return value.flatten(1).clone() if out is None else out.copy_(value.flatten(1))

    def message(
        self,
        module: nn.Flatten,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta in the value's shape."""
        return delta.reshape(value.shape)


class Conv2d(Kernel[nn.Conv2d]):
    """``nn.Conv2d`` with zero padding, one at a time: each is large enough to fill the machine."""

    reads, products = "nothing", True

    def accepts(self, module: nn.Conv2d, shape: tuple[int, ...]) -> bool:
        """Whether the padding is zeros, given in numbers."""
        return len(shape) == 3 and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def forward(self, module: nn.Conv2d, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The convolution, (batch, channels, height, width)."""
        bias = weights[1] if len(weights) > 1 else None
        return torch.conv2d(value, weights[0], bias, module.stride, module.padding, module.dilation, module.groups)

    @staticmethod
    def _backward(
        module: nn.Conv2d, weight: Tensor, delta: Tensor, value: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
            delta,
            value,
            weight,
            [weight.shape[0]],
            module.stride,
            module.padding,
            module.dilation,
            False,
            [0, 0],
            module.groups,
            wanted,
        )
        return result

    def message(
        self,
        module: nn.Conv2d,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """The transposed convolution of delta."""
        return self._backward(module, weights[0], delta, value, (True, False, False))[0]

    def gradients(
        self,
        module: nn.Conv2d,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        factor: float,
        out: Weights,
        saved: Saved,
    ) -> None:
        """Write the weights' gradient, and the bias's if there is one."""
        _, weight, bias = self._backward(module, weights[0], delta, value, (False, True, len(out) > 1))
        torch.mul(weight, factor, out=out[0])
        if len(out) > 1:
            torch.mul(bias, factor, out=out[1])


class MaxPool2d(Kernel[nn.MaxPool2d]):
    """``nn.MaxPool2d``; the place of each window's winner is kept for the messages."""

    reads = "nothing"

    def accepts(self, module: nn.MaxPool2d, shape: tuple[int, ...]) -> bool:
        """Whether it pools images and returns no indices."""
        return len(shape) == 3 and not module.return_indices

    def forward(
        self, module: nn.MaxPool2d, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved
    ) -> Tensor:
        """The largest value of each window."""
        if out is not None and "indices" in saved:
            aten.max_pool2d_with_indices.out(value, *_window(module), out=out, indices=saved["indices"])
            return out
        pooled, saved["indices"] = aten.max_pool2d_with_indices(value, *_window(module))
        return _tensor(pooled)

    def message(
        self,
        module: nn.MaxPool2d,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta at the largest value of each window, 0 elsewhere."""
        settings = (*_window(module), saved["indices"])
        if out is None:
            return _tensor(aten.max_pool2d_with_indices_backward(delta, value, *settings))
        return _tensor(aten.max_pool2d_with_indices_backward.grad_input(delta, value, *settings, grad_input=out))


class BatchNorm(Kernel[Normalising]):
    """``nn.BatchNorm1d`` and ``nn.BatchNorm2d``.

    In training mode with the statistics of the batch at hand, which are kept for the messages (arXiv 2506.23800,
    Eq. 6); in evaluation mode with the running ones.
    """

    reads = "input"

    def accepts(self, module: Normalising, shape: tuple[int, ...]) -> bool:
        """Whether values have as many axes as the module takes."""
        return len(shape) in ((3,) if isinstance(module, nn.BatchNorm2d) else (1, 2))

    def forward(self, module: Normalising, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """Each channel less its mean, over its deviation, times weight plus bias."""
        if _by_batch(module) and value.numel() == value.shape[1]:
            raise ValueError(f"{module}: {tuple(value.shape)} given, expected more than one value per channel to train")
        normal, saved["mean"], saved["inverse deviation"] = aten.native_batch_norm(
            value, *_affine(weights), *_running(module), _by_batch(module), 0.0, module.eps
        )
        return _tensor(normal)

    @staticmethod
    def _backward(
        module: Normalising, weights: Weights, delta: Tensor, value: Tensor, saved: Saved, wanted: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = *_running(module), saved["mean"], saved["inverse deviation"]
        result: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm_backward(
            delta, value, _affine(weights)[0], *statistics, _by_batch(module), module.eps, wanted
        )
        return result

    def message(
        self,
        module: Normalising,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta pulled back, through the batch's own mean and deviation as well."""
        return self._backward(module, weights, delta, value, saved, [True, False, False])[0]

    def gradients(
        self,
        module: Normalising,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        factor: float,
        out: Weights,
        saved: Saved,
    ) -> None:
        """Write the gradients of weight and bias."""
        _, weight, bias = self._backward(module, weights, delta, value, saved, [False, True, True])
        torch.mul(weight, factor, out=out[0])
        torch.mul(bias, factor, out=out[1])


def _by_batch(module: Normalising) -> bool:
    return module.training or module.running_mean is None


def _running(module: Normalising) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if _by_batch(module) else (module.running_mean, module.running_var)


def _affine(weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    return (weights[0], weights[1]) if weights else (None, None)


def _window(module: nn.MaxPool2d) -> tuple[list[int], list[int], list[int], list[int], bool]:
    def pair(size: int | tuple[int, ...]) -> list[int]:
        return [size, size] if isinstance(size, int) else list(size)

    stride = module.kernel_size if module.stride is None else module.stride
    return pair(module.kernel_size), pair(stride), pair(module.padding), pair(module.dilation), module.ceil_mode


register(nn.Identity, Identity())
register(nn.Linear, Linear())
register(nn.Tanh, Tanh())
register(nn.ReLU, ReLU())
register(nn.GELU, GELU())
register(nn.Flatten, Flatten())
register(nn.Conv2d, Conv2d())
register(nn.MaxPool2d, MaxPool2d())
register(nn.BatchNorm1d, BatchNorm())
register(nn.BatchNorm2d, BatchNorm())

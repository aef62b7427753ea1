"""Kernels: prediction, message and weight gradient of one type of module, by hand where it pays.

The batched engine takes an edge's module (and a node's transfer) apart into a chain of modules and looks each up here
by its type. A chain that holds an unknown module is computed through autograd on that one edge instead, which is
right for anything and slower. Add a kernel for a module of your own with :func:`register`, and compare it with
autograd by ``pcsim.verify.check_kernel``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Weights = Sequence[Tensor]
"""A module's parameters in the order of ``module.parameters()``; over a stack of k modules, each (k, *shape)."""

Saved = dict[str, Tensor]
"""A place for what ``forward`` wants ``message`` to find; its tensors may be used again by the next ``forward``."""

aten = torch.ops.aten


class Kernel(ABC):
    """Base class of kernels. All three methods run without autograd.

    Tensors are batch-first, (batch, *shape). A kernel that ``stacks`` also takes k equal modules at once: inputs are
    then (k, batch, *shape) and weights (k, *shape).
    """

    stacks: ClassVar[bool] = False
    """Whether one call may compute a stack of modules with equal signatures."""
    reads: ClassVar[Literal["nothing", "input", "output"]] = "input"
    """Whose content ``message`` needs besides delta's; of the others it may use the shape."""
    elementwise: ClassVar[bool] = False
    """Whether ``forward`` may write its output over its input (where ``reads`` is not the input)."""

    def accepts(self, module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether the kernel can compute this module on values of this shape, the batch axis left out."""
        return True

    def signature(self, module: nn.Module) -> Hashable:
        """What modules must have in common to be computed in one stack; by default they print alike."""
        return repr(module)

    @abstractmethod
    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The module's output; written into ``out`` where one is given and the kernel can, else a new tensor."""

    @abstractmethod
    def message(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """(∂output/∂value)ᵀ delta, of the value's shape (SPEC §2); ``out`` as in ``forward``."""

    def gradients(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        factor: float,
        out: Weights,
        saved: Saved,
    ) -> None:
        """Write factor · (∂output/∂θ)ᵀ delta, summed over the batch, into ``out``, one tensor per parameter."""
        raise NotImplementedError(f"{type(self).__name__} has no parameters")


class Identity(Kernel):
    """``nn.Identity``; the engine leaves it out of a chain, so nothing is ever computed."""

    stacks, reads, elementwise = True, "nothing", True

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The value itself."""
        return value if out is None else out.copy_(value)

    def message(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta itself."""
        return delta if out is None else out.copy_(delta)


class Linear(Kernel):
    """``nn.Linear`` on (batch, features); a stack is one batched matrix product."""

    stacks, reads = True, "nothing"

    def accepts(self, module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether values have one axis of features."""
        return len(shape) == 1

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """Value · Wᵀ + b, (k?, batch, out features)."""
        weight = weights[0].mT
        if len(weights) == 1:
            return torch.matmul(value, weight, out=out)
        if value.dim() == 2:
            return torch.addmm(weights[1], value, weight, out=out)
        return torch.baddbmm(weights[1].unsqueeze(1), value, weight, out=out)

    def message(
        self,
        module: nn.Module,
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
        module: nn.Module,
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


class Tanh(Kernel):
    """``nn.Tanh``."""

    stacks, reads, elementwise = True, "output", True

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The hyperbolic tangent of each unit."""
        return torch.tanh(value, out=out)

    def message(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta · (1 − output²)."""
        if out is None:
            return aten.tanh_backward(delta, output)
        return aten.tanh_backward.grad_input(delta, output, grad_input=out)


class ReLU(Kernel):
    """``nn.ReLU``."""

    stacks, reads, elementwise = True, "output", True

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """Each unit, or 0 where it is negative."""
        return torch.clamp_min(value, 0, out=out)

    def message(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta where the output is positive."""
        if out is None:
            return aten.threshold_backward(delta, output, 0)
        return aten.threshold_backward.grad_input(delta, output, 0, grad_input=out)


class GELU(Kernel):
    """``nn.GELU``, exact or in its tanh approximation."""

    stacks, reads, elementwise = True, "input", True

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """Each unit times the Gaussian distribution function of it."""
        if out is None:
            return aten.gelu(value, approximate=module.approximate)
        return aten.gelu.out(value, approximate=module.approximate, out=out)

    def message(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta times the derivative at the input."""
        if out is None:
            return aten.gelu_backward(delta, value, approximate=module.approximate)
        return aten.gelu_backward.grad_input(delta, value, approximate=module.approximate, grad_input=out)


class Flatten(Kernel):
    """``nn.Flatten()`` of a value to (batch, features)."""

    reads = "nothing"

    def accepts(self, module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether all axes but the batch are flattened."""
        return (module.start_dim, module.end_dim) == (1, -1)

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The value, one axis per sample."""
        return value.flatten(1)

    def message(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta in the value's shape."""
        return delta.reshape(value.shape)


class Conv2d(Kernel):
    """``nn.Conv2d`` with zero padding, one at a time: each is large enough to fill the machine."""

    reads = "nothing"

    def accepts(self, module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether the padding is zeros, given in numbers."""
        return len(shape) == 3 and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The convolution, (batch, channels, height, width)."""
        bias = weights[1] if len(weights) > 1 else None
        return torch.conv2d(value, weights[0], bias, module.stride, module.padding, module.dilation, module.groups)

    @staticmethod
    def _backward(
        module: nn.Module, weight: Tensor, delta: Tensor, value: Tensor, wanted: tuple[bool, bool, bool]
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
        module: nn.Module,
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
        module: nn.Module,
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


class MaxPool2d(Kernel):
    """``nn.MaxPool2d``; the place of each window's winner is kept for the messages."""

    def accepts(self, module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether it pools images and returns no indices."""
        return len(shape) == 3 and not module.return_indices

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The largest value of each window."""
        if out is not None and "indices" in saved:
            aten.max_pool2d_with_indices.out(value, *_window(module), out=out, indices=saved["indices"])
            return out
        pooled, saved["indices"] = aten.max_pool2d_with_indices(value, *_window(module))
        return pooled

    def message(
        self,
        module: nn.Module,
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
            return aten.max_pool2d_with_indices_backward(delta, value, *settings)
        return aten.max_pool2d_with_indices_backward.grad_input(delta, value, *settings, grad_input=out)


def _window(module: nn.Module) -> tuple[list[int], list[int], list[int], list[int], bool]:
    def pair(size: int | tuple[int, int]) -> list[int]:
        return [size, size] if isinstance(size, int) else list(size)

    return (
        pair(module.kernel_size),
        pair(module.stride),
        pair(module.padding),
        pair(module.dilation),
        module.ceil_mode,
    )


class Gain(Kernel):
    """An edge's fixed factor."""

    stacks, reads, elementwise = True, "nothing", True

    def __init__(self, gain: float) -> None:
        self._gain = gain

    def signature(self, module: nn.Module) -> Hashable:
        """The factor."""
        return self._gain

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """Value times the gain."""
        return torch.mul(value, self._gain, out=out)

    def message(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """Delta times the gain."""
        return torch.mul(delta, self._gain, out=out)


class Autograd(Kernel):
    """Any module, one at a time: a graph of its own is kept from each forward pass to its messages and gradients.

    Args:
        call: evaluates the module on a value.
    """

    reads = "nothing"

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        self._call = call

    def forward(self, module: nn.Module, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The module's output, detached; the graph goes to ``saved``."""
        with torch.enable_grad():
            # A copy, since latents move in place while the graph still needs the value they had.
            saved["value"] = value.clone().requires_grad_()
            saved["output"] = self._call(saved["value"])
        return saved["output"].detach()

    def message(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        output: Tensor,
        out: Tensor | None,
        saved: Saved,
    ) -> Tensor:
        """By autograd from the kept graph."""
        return pull_back(saved["output"], [saved["value"]], delta)[0]

    def gradients(
        self,
        module: nn.Module,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        factor: float,
        out: Weights,
        saved: Saved,
    ) -> None:
        """By autograd from the kept graph, for the parameters that require it."""
        for gradient, place in zip(pull_back(saved["output"], weights, delta), out, strict=True):
            torch.mul(gradient, factor, out=place)


def pull_back(output: Tensor, inputs: Sequence[Tensor], delta: Tensor) -> list[Tensor]:
    """(∂output/∂input)ᵀ delta for each input, by autograd; zero where the output does not depend on it."""
    if not inputs or not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    pulled = torch.autograd.grad(output, inputs, delta, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, pulled, strict=True)]


_KERNELS: dict[type[nn.Module], Kernel] = {}


def register(module_type: type[nn.Module], kernel: Kernel) -> None:
    """Compute modules of exactly this type by ``kernel`` in the batched engine, from the next plan on."""
    _KERNELS[module_type] = kernel


def kernel_for(module: nn.Module, shape: tuple[int, ...]) -> Kernel | None:
    """The kernel for a module on values of a shape; None where autograd has to do.

    A module with hooks or parametrizations does more than its type says, so it goes through autograd.
    """
    kernel = _KERNELS.get(type(module))
    changed = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations")
    return None if kernel is None or changed or not kernel.accepts(module, shape) else kernel


for _type, _kernel in (
    (nn.Identity, Identity()),
    (nn.Linear, Linear()),
    (nn.Tanh, Tanh()),
    (nn.ReLU, ReLU()),
    (nn.GELU, GELU()),
    (nn.Flatten, Flatten()),
    (nn.Conv2d, Conv2d()),
    (nn.MaxPool2d, MaxPool2d()),
):
    register(_type, _kernel)

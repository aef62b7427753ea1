"""What a kernel is, the registry of kernels by type of module, and the one that does for all the rest: autograd.

The batched engine takes an edge's module (and a node's transfer) apart into a chain of modules and looks each up here
by its type. A chain that holds an unknown module is computed through autograd on that one edge instead, which is
right for anything and slower. Add a kernel for a module of your own with :func:`register`, and compare it with
autograd by ``pcsim.verify.check_kernel``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module, contravariant=True)

Weights = Sequence[Tensor]
"""A module's parameters in the order of ``module.parameters()``; over a stack of k modules, each (k, *shape)."""
Saved = dict[str, Tensor]
"""A place for what ``forward`` wants ``message`` to find; its tensors may be used again by the next ``forward``."""


class Kernel(ABC, Generic[M]):
    """Base class of kernels. All three methods run without autograd.

    Tensors are batch-first, (batch, *shape). A kernel that ``stacks`` also takes k equal modules at once: inputs are
    then (k, batch, *shape) and weights (k, *shape).
    """

    stacks: ClassVar[bool] = False
    """Whether one call may compute a stack of modules with equal signatures."""
    reads: ClassVar[Literal["nothing", "input", "output"]] = "input"
    """Whose content ``message`` needs besides delta's; of the others it may use the shape."""
    products: ClassVar[bool] = False
    """Whether ``message`` is made of products with the weights, which may be computed in a lower precision."""
    fills_out: ClassVar[bool] = False
    """Whether ``forward`` and ``message`` always write into ``out`` where one is given."""
    elementwise: ClassVar[bool] = False
    """Whether ``forward`` may write its output over its input (where ``reads`` is not the input)."""

    def accepts(self, module: M, shape: tuple[int, ...]) -> bool:
        """Whether the kernel can compute this module on values of this shape, the batch axis left out."""
        return True

    def signature(self, module: M) -> Hashable:
        """What modules must have in common to be computed in one stack; by default they print alike."""
        return repr(module)

    @abstractmethod
    def forward(self, module: M, weights: Weights, value: Tensor, out: Tensor | None, saved: Saved) -> Tensor:
        """The module's output; written into ``out`` where one is given and the kernel can, else a new tensor."""

    @abstractmethod
    def message(
        self,
        module: M,
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
        module: M,
        weights: Weights,
        delta: Tensor,
        value: Tensor,
        factor: float,
        out: Weights,
        saved: Saved,
    ) -> None:
        """Write factor · (∂output/∂θ)ᵀ delta, summed over the batch, into ``out``, one tensor per parameter."""
        raise NotImplementedError(f"{type(self).__name__} has no parameters")


class Gain(Kernel[nn.Module]):
    """An edge's fixed factor."""

    stacks, reads, fills_out, elementwise = True, "nothing", True, True

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


class Autograd(Kernel[nn.Module]):
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
            # A copy, since latents move in place while the graph still needs the value they had; contiguous, since a
            # module of the user's own may view it.
            saved["value"] = value.clone(memory_format=torch.contiguous_format).requires_grad_()
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
        # The module's own: to the graph, a view of a parameter made after it was built is unrelated.
        own = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for gradient, place in zip(pull_back(saved["output"], own, delta), out, strict=True):
            torch.mul(gradient, factor, out=place)


def pull_back(output: Tensor, inputs: Sequence[Tensor], delta: Tensor) -> list[Tensor]:
    """(∂output/∂input)ᵀ delta for each input, by autograd; zero where the output does not depend on it."""
    if not inputs or not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    pulled = torch.autograd.grad(output, inputs, delta, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, pulled, strict=True)]


_KERNELS: dict[type[nn.Module], Kernel[Any]] = {}


def register(module_type: type[M], kernel: Kernel[M]) -> None:
    """Compute modules of exactly this type by ``kernel`` in the batched engine, from the next plan on."""
    _KERNELS[module_type] = kernel


def kernel_for(module: nn.Module, shape: tuple[int, ...]) -> Kernel[Any] | None:
    """The kernel for a module on values of a shape; None where autograd has to do.

    A module with hooks or parametrizations does more than its type says, so it goes through autograd.
    """
    kernel = _KERNELS.get(type(module))
    changed = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations")
    return None if kernel is None or changed or not kernel.accepts(module, shape) else kernel

"""What a kernel is, and the registry of kernels by type of module.

The batched engine takes an edge's module (and a node's transfer) apart into a chain of modules and looks each up here
by its type. A chain that holds an unknown module is computed through autograd on that one edge instead, which is
right for anything and slower. Add a kernel for a module of your own with :func:`register`, and compare it with
autograd by ``pcsim.verify.check_kernel``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from pcsim.engine.kernels.products import Products
from pcsim.errors import SettingError

M = TypeVar("M", bound=nn.Module, contravariant=True)

Reads: TypeAlias = Literal["nothing", "input", "output"]
Saved = dict[str, Tensor]
"""A place for what ``forward`` wants ``message`` to find; its tensors may be used again by the next ``forward``."""


class Call(NamedTuple):
    """What a kernel is called on: one module, or a stack of k equal ones."""

    module: Any
    """The module, of a stack the first: for its settings, not for its weights."""
    weights: Mapping[str, Tensor]
    """The parameters by the names that the module gives them; over a stack each (k, *shape)."""
    saved: Saved
    """What the kernel keeps from ``forward`` for ``message`` and ``gradients``."""
    products: Products = "auto"
    """Which library multiplies matrices and takes hyperbolic tangents on a CPU."""


class Kernel(ABC, Generic[M]):
    """Base class of kernels. All methods run without autograd.

    Tensors are batch-first, (batch, *shape). A kernel that ``stacks`` also takes k equal modules at once: inputs are
    then (k, batch, *shape) and weights (k, *shape).
    """

    stacks: ClassVar[bool] = False
    """Whether one call may compute a stack of modules with equal signatures; nothing may be saved then."""
    reads: ClassVar[Reads] = "input"
    """Whose content ``message`` needs besides delta's; of the others it may use the shape."""
    products: ClassVar[bool] = False
    """Whether ``message`` is made of products with the weights, which may be computed in a lower precision."""
    fills_out: ClassVar[bool] = False
    """Whether ``forward`` and ``message`` always write into ``out`` where one is given, and else into a new tensor."""
    elementwise: ClassVar[bool] = False
    """Whether ``message`` may be written over delta, and, where ``reads`` is not the input, ``forward`` over the value;
    of a module without parameters.
    """
    identity: ClassVar[bool] = False
    """Whether nothing has to be computed at all, so that the module is left out of its chain."""
    adds: ClassVar[bool] = False
    """Whether :meth:`adding` is there."""
    forgets: ClassVar[bool] = False
    """Whether ``message`` asks nothing at all of the input, not even its shape, so that it need not be kept."""
    memory_format: ClassVar[torch.memory_format] = torch.contiguous_format
    """How images should lie in memory; those that the kernel reads and makes do."""

    def accepts(self, module: M, shape: tuple[int, ...]) -> bool:
        """Whether the kernel can compute this module on values of this shape, the batch axis left out."""
        return True

    def signature(self, module: M) -> Hashable:
        """What modules must have in common to be computed in one stack; by default they print alike."""
        return repr(module)

    @abstractmethod
    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The module's output; written into ``out`` where one is given and the kernel can, else a new tensor."""

    def predicting(self, call: Call, value: Tensor, out: Tensor) -> Callable[[], object]:
        """What writes the output into ``out`` when it is called, where the kernel ``fills_out``; an override may take a
        shorter way than through ``forward``.
        """
        return partial(self.forward, call, value, out)

    @abstractmethod
    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """(∂output/∂value)ᵀ delta, of the value's shape (SPEC §2); ``out`` as in ``forward``."""

    def messaging(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor) -> Callable[[], object]:
        """What writes the message into ``out`` when it is called, where the kernel ``fills_out``; an override may take
        a shorter way than through ``message``.
        """
        return partial(self.message, call, delta, value, output, out)

    def adding(
        self, call: Call, delta: Tensor, goal: Tensor, factor: float, *, over: bool = False
    ) -> Callable[[], object]:
        """What adds factor · message straight to ``goal``, or writes it ``over`` whatever is there, when it is called;
        only where the kernel ``adds``, and ``reads`` nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} adds no messages")

    def gradients(self, call: Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]) -> None:
        """Write factor · (∂output/∂θ)ᵀ delta, summed over the batch, into ``out``, a tensor for each θ that learns.

        The parameters that are frozen are left out of it; those of ``call.weights`` are there, but of a stack whose
        forward pass is computed one by one they may be missing, so a kernel that stacks does not read them here.
        """
        raise NotImplementedError(f"{type(self).__name__} has no parameters")


_KERNELS: dict[type[nn.Module], Kernel[Any]] = {}


def register(module_type: type[M], kernel: Kernel[M]) -> None:
    """Compute modules of exactly this type by ``kernel`` in the batched engine, from the next plan on.

    Raises:
        SettingError: the type is none of modules, the kernel no instance of :class:`Kernel`, or ``reads`` is unknown.
    """
    if not isinstance(module_type, type) or not issubclass(module_type, nn.Module):
        raise SettingError(f"register_kernel: {module_type!r} given, expected a type of modules, such as nn.Linear")
    if not isinstance(kernel, Kernel):
        shown = f"the class {kernel.__name__}" if isinstance(kernel, type) else repr(kernel)
        raise SettingError(f"register_kernel: {shown} given, expected an instance of a Kernel; call the class")
    if kernel.reads not in get_args(Reads):
        raise SettingError(
            f"{type(kernel).__name__}.reads: {kernel.reads!r} given, expected one of {', '.join(get_args(Reads))}: "
            "what message needs beside delta"
        )
    _KERNELS[module_type] = kernel


def kernel_for(module: nn.Module, shape: tuple[int, ...]) -> Kernel[Any] | None:
    """The kernel for a module on values of a shape; None where autograd has to do.

    A module with hooks, parametrizations or a forward of its own does more than its type says, and one whose weight
    has become something else than a parameter is no longer what a kernel takes it for.
    """
    kernel = _KERNELS.get(type(module))
    if kernel is None or changed(module) or not kernel.accepts(module, shape):
        return None
    return kernel


def changed(module: nn.Module) -> bool:
    """Whether calling a module does more than its type says."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    overwritten = "forward" in module.__dict__ or "parametrizations" in module._modules
    return bool(hooked) or overwritten or _has_any_global_hook()  # type: ignore[no-untyped-call]


def owns(module: nn.Module, *names: str) -> bool:
    """Whether what a module has under these names are its parameters, or None."""
    return module._parameters.keys() >= {*names} and module.__dict__.keys().isdisjoint(names)

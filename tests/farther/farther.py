"""A second device on a machine that has none: its tensors lie in the CPU's memory, and mix with no others.

PyTorch lets a device be written in Python (``PrivateUse1``). This one computes on the CPU, so that numbers may be
compared, and refuses, as a GPU does, an operation on tensors of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
kernels = torch.library.Library("aten", "IMPL")  # registered for as long as it is held


@cache
def device() -> torch.device:
    """The device; made known to PyTorch when it is first asked for."""
    backend_registration._setup_privateuseone_for_python_backend("farther")
    # torch.tensor and torch.as_tensor ask for these two past all that is written in Python.
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("copy_", _copy, "PrivateUse1")
    return torch.device("farther:0")


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Farther:
    return Farther(torch.empty_strided(size, stride, dtype=dtype))


def _copy(goal: Any, source: Tensor, non_blocking: bool = False) -> Tensor:
    goal.held.copy_(getattr(source, "held", source))
    made: Tensor = goal
    return made


class Farther(Tensor):
    """A tensor on that device, and where its numbers are held."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Farther:
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Farther = Tensor._make_wrapper_subclass(cls, held.shape, device=device(), **like)  # type: ignore[attr-defined]
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Crossing(TorchDispatchMode):
    """Lets tensors be made on the device, and counts what goes from one to another."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _run(func, args, kwargs or {})
        if func in (aten._to_copy.default, aten.copy_.default):
            ends = (args[0], args[1]) if func is aten.copy_.default else (made, args[0])
            if ends[0].device != ends[1].device:
                self.bytes += ends[1].nbytes
        return made


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Farther)}
    goal = kwargs.get("device")
    far = bool(there) if goal is None else torch.device(goal).type == "farther"
    kwargs = kwargs if goal is None else {**kwargs, "device": torch.device("cpu") if far else goal}
    if func not in (aten._to_copy.default, aten.copy_.default) and there:
        strangers = [tensor.device for tensor in tensors if not isinstance(tensor, Farther) and tensor.dim()]
        assert not strangers, f"{func} is given tensors on {device()} and on {strangers[0]}"
    if func in (aten.cat.default, aten.stack.default):  # to which 0-d tensors of another device are as strange
        assert len({tensor.device for tensor in args[0]}) == 1, f"{func} is given tensors on several devices"
    made = func(*tree_map_only(Farther, lambda tensor: tensor.held, args), **_held(kwargs))
    if func is aten.copy_.default:
        return args[0]
    return tree_map_only(Tensor, lambda t: there[id(t)] if id(t) in there else Farther(t), made) if far else made


def _held(kwargs: dict[str, Any]) -> dict[str, Any]:
    held: dict[str, Any] = tree_map_only(Farther, lambda tensor: tensor.held, kwargs)
    return held


@contextmanager
def swapping() -> Iterator[None]:
    """Modules may be moved to the device, or from it: a parameter takes the place of another."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)

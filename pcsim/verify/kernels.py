"""A kernel computes what autograd does."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from pcsim.engine.kernels.kernel import Call, Kernel, kernel_for
from pcsim.errors import SettingError
from pcsim.graph.statistics import frozen_statistics, normalises
from pcsim.random_state import random_state_kept
from pcsim.verify.shrinking import hypothesis_shrinks
from pcsim.verify.writing import Writer


@random_state_kept()
def check_kernel(module: nn.Module, shape: tuple[int, ...], *, batch: int = 3, tolerance: float = 1e-9) -> None:
    """The kernel registered for a module's type equals autograd, with and without a place to write to.

    A kernel that stacks is compared on a stack of two as well. Values, weights and errors are random, in float64; the
    module itself is left as it was.

    Args:
        module: of the type to check.
        shape: of one value, the batch axis left out.
        batch: number of samples.
        tolerance: relative to the largest number compared, and at least to 1.

    Raises:
        SettingError: no kernel is registered for it, or it does not accept that shape.
        AssertionError: prediction, message or gradient differs; says which, of what, and by how much, and prints the
            call with the smallest values found that fails.
    """
    kernel = kernel_for(module, shape)
    if kernel is None:
        raise SettingError(
            f"check_kernel: no kernel takes {module!r} on values of shape {shape}; register one with "
            "pcsim.register_kernel, or check its accepts()"
        )
    size = shape, batch
    try:
        _check(module, shape, batch, tolerance)
    except AssertionError as failure:
        message = str(failure)
        if not hypothesis_shrinks():
            size, message = _smallest(module, shape, batch, tolerance, message)
        writer = Writer()
        given = f"{writer.thing(module)}, {size[0]}, batch={size[1]}"
        given += "" if tolerance == 1e-9 else f", tolerance={tolerance}"
        head = ["import pcsim", "import pcsim.verify", "from torch import nn, tensor", *writer.imports, *writer.notes]
        raise AssertionError("\n".join([message, *head, f"pcsim.verify.check_kernel({given})"])) from None


def _check(module: nn.Module, shape: tuple[int, ...], batch: int, tolerance: float) -> None:
    kernel = kernel_for(module, shape)
    assert kernel is not None
    module = copy.deepcopy(module).double()
    with frozen_statistics([part for part in module.modules() if normalises(part)]):
        _compare(kernel, module, shape, batch, tolerance)


def _compare(kernel: Kernel[Any], module: nn.Module, shape: tuple[int, ...], batch: int, tolerance: float) -> None:
    for count in (None, 2) if kernel.stacks else (None,):
        generator = torch.Generator().manual_seed(0)
        lead = (batch,) if count is None else (count, batch)
        value = torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)
        weights = [
            torch.randn(*(() if count is None else (count,)), *p.shape, generator=generator, dtype=torch.float64)
            for p in module.parameters()
        ]
        output, delta, message, gradients = _by_autograd(module, value, weights, stacked=count is not None)
        names = [name for name, _ in module.named_parameters()]
        call = Call(module, dict(zip(names, weights, strict=True)), {})
        for out, back in ((None, None), (torch.full_like(output, 7.0), torch.full_like(value, 7.0))):
            got = kernel.forward(call, value, out)
            _same(module, "prediction", got, output, tolerance)
            kept = {"nothing": (torch.full_like(value, 7.0), torch.full_like(output, 7.0))}
            kept |= {"input": (value, torch.full_like(output, 7.0)), "output": (torch.full_like(value, 7.0), got)}
            sent = kernel.message(call, delta.clone(), *kept[kernel.reads], back)
            _same(module, "message", sent, message, tolerance)
        _compare_gradients(kernel, call, delta, value, gradients, tolerance)
        if kernel.fills_out:
            written = torch.full_like(output, 7.0)
            kernel.predicting(call, value, written)()
            _same(module, "written prediction", written, output, tolerance)
            back = torch.full_like(value, 7.0)
            kernel.messaging(call, delta.clone(), *kept[kernel.reads], back)()
            _same(module, "written message", back, message, tolerance)
        if kernel.elementwise and not weights:
            over = delta.clone()
            sent = kernel.message(call, over, *kept[kernel.reads], over)
            _same(module, "message over the error itself", sent, message, tolerance)
            if kernel.reads != "input":
                over = value.clone()
                _same(module, "prediction over its input", kernel.forward(call, over, over), output, tolerance)
        if kernel.adds:
            goal = torch.full_like(value, 7.0)
            kernel.adding(call, delta, goal, -0.5)()
            _same(module, "added message", goal, 7.0 - 0.5 * message, tolerance)
            kernel.adding(call, delta, goal, -0.5, over=True)()
            _same(module, "message written over another", goal, -0.5 * message, tolerance)


def _compare_gradients(
    kernel: Kernel[Any], call: Call, delta: Tensor, value: Tensor, gradients: list[Tensor], tolerance: float
) -> None:
    """All parameters learning, and each alone while the others are frozen."""
    names = list(call.weights)
    for wanted in (names, *([name] for name in names)) if names else ():
        places = {name: torch.full_like(call.weights[name], 7.0) for name in wanted}
        kernel.gradients(call, delta, value, -0.5, places)
        for name, gradient in zip(names, gradients, strict=True):
            if name in places:
                _same(call.module, f"gradient of parameter {name!r}", places[name], -0.5 * gradient, tolerance)


def _smallest(
    module: nn.Module, shape: tuple[int, ...], batch: int, tolerance: float, message: str
) -> tuple[tuple[tuple[int, ...], int], str]:
    """The smallest shape and batch found with which a kernel fails, and how it does."""
    smaller = [(shape, 1)] if batch > 1 else []
    smaller += [((*shape[:axis], 1, *shape[axis + 1 :]), 1) for axis, size in enumerate(shape) if size > 1]
    for own_shape, own_batch in smaller:
        failure = _failure(module, own_shape, own_batch, tolerance)
        # A module of another shape may take these values all the same, and fail in another way, which tells nothing.
        if _kind(failure) == _kind(message):
            return _smallest(module, own_shape, own_batch, tolerance, failure)
    return (shape, batch), message


def _kind(message: str) -> str:
    """What differs from autograd's, without the numbers."""
    return re.sub(r"\d.*", "", message.rpartition("): ")[2] or message)


def _failure(module: nn.Module, shape: tuple[int, ...], batch: int, tolerance: float) -> str:
    """How a kernel fails; empty where it does not."""
    try:
        if kernel_for(module, shape) is not None:
            _check(module, shape, batch, tolerance)
    except AssertionError as failure:
        return str(failure)
    except Exception:  # a module need not take values of another shape
        return ""
    return ""


def _by_autograd(
    module: nn.Module, value: Tensor, weights: list[Tensor], *, stacked: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    names = [name for name, _ in module.named_parameters()]
    leaves = [value.clone().requires_grad_(), *(weight.clone().requires_grad_() for weight in weights)]

    def call(given: Tensor, *own: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, own, strict=True)), (given,))
        return result

    rows = [tuple(leaf[row] for leaf in leaves) for row in range(len(value))] if stacked else [tuple(leaves)]
    outputs = [call(*row) for row in rows]
    output = torch.stack(outputs) if stacked else outputs[0]
    delta = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    message, *gradients = torch.autograd.grad(output, leaves, delta)
    return output.detach(), delta, message, gradients


def _same(module: nn.Module, what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise AssertionError(f"{module!r}: {what} has shape {tuple(got.shape)}, autograd's {tuple(expected.shape)}")
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    allowed = tolerance * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    if not difference <= allowed:
        raise AssertionError(f"{module!r}: {what} differs from autograd's by {difference:.3g}, allowed {allowed:.3g}")

"""``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from pcsim.engine.kernels import products
from pcsim.engine.kernels.kernel import Call, Kernel, owns, register


class Linear(Kernel[nn.Linear]):
    """``nn.Linear`` on (batch, features) or (batch, positions, features); a stack is one batched matrix product."""

    stacks, reads, products, fills_out, adds = True, "nothing", True, True, True

    def accepts(self, module: nn.Linear, shape: tuple[int, ...]) -> bool:
        """Whether values have an axis of features, and at most one of positions before it."""
        return len(shape) in (1, 2) and owns(module, "weight", "bias")

    def signature(self, module: nn.Linear) -> Hashable:
        """Its sizes; a graph may have tens of thousands, and printing each would take seconds."""
        own = module._parameters  # asking the module itself takes three times as long
        weight, bias = own["weight"], own["bias"]
        assert weight is not None
        return weight.shape, bias is not None

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Value · Wᵀ + b, (k?, batch, positions?, out features)."""
        out = value.new_empty(*value.shape[:-1], call.weights["weight"].shape[-2]) if out is None else out
        self.predicting(call, value, out)()
        return out

    def predicting(self, call: Call, value: Tensor, out: Tensor) -> Callable[[], object]:
        """Writes value · Wᵀ + b."""
        weight, bias = call.weights["weight"], call.weights.get("bias")
        rows, goal = _rows(value, weight), _rows(out, weight)
        if products.by_onednn(call.products, rows, weight.shape[-2]):
            return partial(products.fill_linear, rows, weight, bias, out=goal)
        if weight.dim() == 2:  # the parameters themselves, whose data may be put elsewhere later
            return partial(functional.linear, rows, weight, bias, out=goal)  # type: ignore[call-arg]
        if bias is None:
            return partial(torch.bmm, rows, weight.mT, out=goal)
        return partial(torch.baddbmm, bias.unsqueeze(1), rows, weight.mT, out=goal)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta · W, (k?, batch, positions?, in features)."""
        out = delta.new_empty(*delta.shape[:-1], call.weights["weight"].shape[-1]) if out is None else out
        self.messaging(call, delta, value, output, out)()
        return out

    def messaging(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor) -> Callable[[], object]:
        """Writes delta · W."""
        weight = call.weights["weight"]
        rows, goal = _rows(delta, weight), _rows(out, weight)
        if products.by_onednn(call.products, rows, weight.shape[-1]):
            return partial(products.fill_product, rows, weight, out=goal)
        multiply: Callable[..., Tensor] = torch.mm if weight.dim() == 2 else torch.bmm
        return partial(multiply, rows, weight, out=goal)

    def adding(
        self, call: Call, delta: Tensor, goal: Tensor, factor: float, *, over: bool = False
    ) -> Callable[[], object]:
        """Adds factor · delta · W."""
        weight, kept = call.weights["weight"], 0 if over else 1
        rows, there = _rows(delta, weight), _rows(goal, weight)
        if products.by_onednn(call.products, rows, weight.shape[-1]):
            leave = products.fill_product if over else products.add_product
            return partial(leave, rows, weight, factor, out=there)
        add = there.addmm_ if weight.dim() == 2 else there.baddbmm_
        return partial(add, rows, weight, beta=kept, alpha=factor)

    def gradients(self, call: Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]) -> None:
        """Write factor · deltaᵀ value for the weights and factor · Σ delta for the bias."""
        stacked = out["weight"].dim() == 3 if "weight" in out else out["bias"].dim() == 2
        delta, value = (tensor.flatten(1 if stacked else 0, -2) for tensor in (delta, value))
        if "weight" in out and products.by_onednn(call.products, delta.mT, value.shape[-1]):
            products.fill_product(delta.mT, value, factor, out=out["weight"])
        elif "weight" in out:
            product, weight = torch.baddbmm if stacked else torch.addmm, out["weight"]
            product(weight, delta.mT, value, beta=0, alpha=factor, out=weight)
        if "bias" in out:
            torch.sum(delta, -2, out=out["bias"]).mul_(factor)


def _rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """A view with batch and positions in one axis, (k?, rows, features)."""
    return tensor.view(-1, tensor.shape[-1]) if weight.dim() == 2 else tensor.view(len(tensor), -1, tensor.shape[-1])


register(nn.Linear, Linear())

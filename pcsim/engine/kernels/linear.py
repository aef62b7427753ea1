"""``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from pcsim.engine.kernels.kernel import Call, Kernel, owns, register


class Linear(Kernel[nn.Linear]):
    """``nn.Linear`` on (batch, features); a stack is one batched matrix product."""

    stacks, reads, products, fills_out, adds = True, "nothing", True, True, True

    def accepts(self, module: nn.Linear, shape: tuple[int, ...]) -> bool:
        """Whether values have one axis of features."""
        return len(shape) == 1 and owns(module, "weight", "bias")

    def signature(self, module: nn.Linear) -> Hashable:
        """Its sizes; a graph may have tens of thousands, and printing each would take seconds."""
        return tuple(module.weight.shape), module.bias is not None

    def forward(self, call: Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """Value · Wᵀ + b, (k?, batch, out features)."""
        weight, bias = call.weights["weight"].mT, call.weights.get("bias")
        if bias is None:
            return torch.matmul(value, weight, out=out)
        if value.dim() == 2:
            return torch.addmm(bias, value, weight, out=out)
        return torch.baddbmm(bias.unsqueeze(1), value, weight, out=out)

    def predicting(self, call: Call, value: Tensor, out: Tensor) -> Callable[[], object]:
        """Writes value · Wᵀ + b."""
        if value.dim() == 2:
            return partial(functional.linear, value, call.weights["weight"], call.weights.get("bias"), out=out)  # type: ignore[call-arg]
        return super().predicting(call, value, out)

    def message(self, call: Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Delta · W, (k?, batch, in features)."""
        return torch.matmul(delta, call.weights["weight"], out=out)

    def adding(
        self, call: Call, delta: Tensor, goal: Tensor, factor: float, *, over: bool = False
    ) -> Callable[[], object]:
        """Adds factor · delta · W."""
        add, kept = goal.addmm_ if goal.dim() == 2 else goal.baddbmm_, 0 if over else 1
        return partial(add, delta, call.weights["weight"], beta=kept, alpha=factor)

    def gradients(self, call: Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]) -> None:
        """Write factor · deltaᵀ value for the weights and factor · Σ delta for the bias."""
        if "weight" in out:
            product, weight = torch.addmm if value.dim() == 2 else torch.baddbmm, out["weight"]
            product(weight, delta.mT, value, beta=0, alpha=factor, out=weight)
        if "bias" in out:
            torch.sum(delta, -2, out=out["bias"]).mul_(factor)


register(nn.Linear, Linear())

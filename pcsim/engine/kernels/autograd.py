"""What has no kernel: any module of any number of inputs, by autograd on that part alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pcsim.graph.probing import leaf


class Traced:
    """An edge's module, or a node's combine and transfer, whose graph is kept from its evaluation to its vjp.

    A graph serves once, as by ``backward()``; where it is asked for again, the part is evaluated again.

    Args:
        evaluate: the part as a function of its inputs, differentiable in them and in the parameters.
        parameters: all of the part's parameters; those that require no gradient are left alone.
    """

    def __init__(self, evaluate: Callable[[Sequence[Tensor]], Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self._evaluate, self._parameters = evaluate, parameters
        self.inputs: list[Tensor] = []
        """What the part was evaluated on last, (batch, ...) each."""
        self._output: Tensor | None = None
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """Those that the last vjp found, summed over the batch; without those that autograd did not reach."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, detached.

        The inputs are copied, since latents move in place while the graph still needs the value they had, and
        contiguous, since a module of the user's own may view them.
        """
        self.inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        return self._traced().detach()

    def _traced(self) -> Tensor:
        for tensor in self.inputs:
            leaf(tensor)
        with torch.enable_grad():
            self._output = self._evaluate(self.inputs)
        return self._output

    def vjp(self, delta: Tensor, *, learn: bool) -> list[Tensor]:
        """(∂output/∂input)ᵀ delta for each input, zero where the output does not depend on it, as on integers; as a
        side effect, the parameters' gradients where ``learn`` is set.
        """
        output = self._traced() if self._output is None else self._output
        self._output = None
        wanted = [tensor for tensor in (*self.inputs, *(self._parameters if learn else ())) if tensor.requires_grad]
        found: dict[Tensor, Tensor | None] = {}
        if wanted and output.requires_grad:
            found = dict(
                zip(wanted, torch.autograd.grad(output, wanted, delta.contiguous(), allow_unused=True), strict=True)
            )
        messages = [(tensor, found.pop(tensor, None)) for tensor in self.inputs]
        reached = ((parameter, found.get(parameter)) for parameter in self._parameters)
        self.gradients = {parameter: gradient for parameter, gradient in reached if gradient is not None}
        return [delta.new_zeros(t.shape, device=t.device) if message is None else message for t, message in messages]

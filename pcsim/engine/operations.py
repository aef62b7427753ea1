"""The operations of a program: each is bound to its places once and then called at every run.

What a program calls thousands of times is made by the functions named -ing, which bind it as directly as they can.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pcsim.engine.buffers import FIRST, Bound, NodeBuffers
from pcsim.engine.kernel import pull_back
from pcsim.engine.stacks import Part, Place
from pcsim.graph.energy import Energy, Scale
from pcsim.graph.node import Node

Operation: TypeAlias = Callable[[], object]


def as_function(scale: Scale | Callable[[], Scale]) -> Callable[[], Scale]:
    """A scale as a function of nothing, whether or not it has to be worked out anew at every run."""
    return scale if callable(scale) and not isinstance(scale, Tensor) else partial(constant, scale)


def constant(scale: Scale) -> Scale:
    """The scale itself; bound to it, a function of nothing."""
    return scale


def copy(goal: Tensor, original: Tensor) -> None:
    """Copy a whole stacked tensor."""
    goal.copy_(original)


def write(goal: Place, original: Place) -> None:
    """Copy one place to another."""
    goal.write(original.read())


def take(goal: Place, original: Place) -> None:
    """Copy one place to another, also where the other would hold on to the tensor itself."""
    goal.write(original.read().clone() if goal.out is None else goal.out.copy_(original.read()))


def zero(place: Place) -> None:
    """Set a place to zero."""
    place.write(torch.zeros_like(place.read())) if place.out is None else place.out.zero_()


def fixed(*places: Place) -> list[Tensor] | None:
    """The tensors of these places, if none has to be gathered or may be another at the next run."""
    tensors = [place.out for place in places if isinstance(place, Part) and place.out is not None]
    return tensors if len(tensors) == len(places) else None


def adding(goal: Part, addend: Place, factor: float) -> Operation:
    """Adds factor · addend to a part."""
    tensors = fixed(goal, addend)
    if tensors is None:
        return partial(_add, goal, addend, factor)
    return partial(tensors[0].add_, tensors[1], alpha=factor)


def _add(goal: Part, addend: Place, factor: float) -> None:
    goal.add(addend.read(), factor)


def add_up(goal: Place, terms: list[Place]) -> None:
    """Write the sum of some places."""
    if len(terms) == 1:
        goal.write(terms[0].read())
    else:
        goal.write(torch.add(terms[0].read(), terms[1].read(), out=goal.out))
    for term in terms[2:]:
        torch.add(goal.read(), term.read(), out=goal.out)


def approach(goal: Part, other: Part, share: Scale) -> None:
    """Take a part this share of the way to another."""
    if goal.out is None:
        goal.write(torch.lerp(goal.read(), other.read(), share))
    else:
        goal.out.lerp_(other.read(), share)


def running(bound: Bound, value: Place, output: Place) -> Operation:
    """Runs a kernel forward."""
    tensors = fixed(value, output)
    if tensors is None or not (bound.kernel.fills_out and bound.complete):
        return partial(_run, bound, value, output)
    before, after = tensors
    return partial(bound.kernel.forward, bound.module, bound.weights(), before, after, bound.saved)


def _run(bound: Bound, value: Place, output: Place) -> None:
    output.write(bound.kernel.forward(bound.module, bound.weights(), value.read(), output.out, bound.saved))


def sending(bound: Bound, delta: Place, value: Place, output: Place, goal: Place) -> Operation:
    """Runs a kernel backward, from delta to the message to its input."""
    tensors = fixed(delta, value, output, goal)
    if tensors is None or not (bound.kernel.fills_out and bound.complete):
        return partial(_send, bound, delta, value, output, goal)
    pushed, before, after, sent = tensors
    return partial(bound.kernel.message, bound.module, bound.weights(), pushed, before, after, sent, bound.saved)


def _send(bound: Bound, delta: Place, value: Place, output: Place, goal: Place) -> None:
    kernel, module, weights, saved, _ = bound
    goal.write(kernel.message(module, weights(), delta.read(), value.read(), output.read(), goal.out, saved))


def rounded_message(bound: Bound, delta: Place, value: Place, output: Place, goal: Place, dtype: torch.dtype) -> None:
    """Run a kernel backward with its products in a lower precision."""
    kernel, module, weights, saved, _ = bound
    lower = [weight.to(dtype) for weight in weights()]
    given, before = delta.read().to(dtype), value.read()
    rounded = kernel.message(module, lower, given, before.to(dtype), output.read(), None, saved)
    goal.write(rounded.to(before.dtype))


def adding_product(bound: Bound, goal: Tensor, delta: Place, factor: float) -> Operation:
    """Adds factor · delta · W: a linear message, straight to where it goes."""
    product, tensors = goal.addmm_ if goal.dim() == 2 else goal.baddbmm_, fixed(delta)
    if tensors is None or not bound.complete:
        return lambda: product(delta.read(), bound.weights()[0], alpha=factor)
    return partial(product, tensors[0], bound.weights()[0], alpha=factor)


def gradients(bound: Bound, delta: Place, value: Place, factor: float, goals: list[Part]) -> None:
    """Run a kernel for the gradients of its weights."""
    kernel, module, weights, saved, _ = bound
    out = [torch.empty_like(goal.read()) if goal.out is None else goal.out for goal in goals]
    kernel.gradients(module, weights(), delta.read(), value.read(), factor, out, saved)
    for goal, gradient in zip(goals, out, strict=True):
        goal.write(gradient)


def subtracting(value: Part, prediction: Part, delta: Part) -> Operation:
    """ε = v − u of Gaussian nodes."""
    tensors = fixed(value, prediction, delta)
    if tensors is None:
        return partial(_subtract, value, prediction, delta)
    return partial(torch.sub, tensors[0], tensors[1], out=tensors[2])


def _subtract(value: Part, prediction: Part, delta: Part) -> None:
    delta.write(torch.sub(value.read(), prediction.read(), out=delta.out))


def multiply(delta: Part, scale: Callable[[], Scale]) -> None:
    """Weigh errors by precision and weight."""
    if delta.out is None:
        delta.write(delta.read() * scale())
    else:
        delta.out.mul_(scale())


def own_precision(nodes: list[Node], factors: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """π w of nodes whose own precision is a tensor, (k, 1, *shape), or (*shape) of one."""
    scales = []
    for node, factor in zip(nodes, factors, strict=True):
        base = torch.as_tensor(node.base_precision, dtype=dtype, device=device).detach()
        scales.append((factor * base).expand(node.shape))
    return scales[0] if len(scales) == 1 else torch.stack(scales).unsqueeze(1)


def each_scale(scale: Scale, row: int, count: int) -> Scale:
    """The scale of one of the rows."""
    return scale[row] if isinstance(scale, Tensor) and count > 1 else scale


def error_by_energy(
    buffers: NodeBuffers,
    rows: list[int],
    rule: Callable[[Energy, Tensor, Tensor, Scale], Tensor],
    scale: Callable[[], Scale],
) -> None:
    """δ of nodes whose energy or learning rule is not the usual one, node by node."""
    scales = scale()
    for index, row in enumerate(rows):
        value, prediction = buffers.tensor("value")[row], buffers.tensor("prediction")[row]
        own = each_scale(scales, index, len(rows))
        buffers.tensor("delta")[row].copy_(rule(buffers.node.energy_function, value, prediction, own))


def pull_by_energy(buffers: NodeBuffers, rows: list[int], scale: Callable[[], Scale]) -> None:
    """−∂(π w E)/∂v of nodes with another energy, added to their descent."""
    scales = scale()
    for index, row in enumerate(rows):
        value, prediction = buffers.tensor("value")[row], buffers.tensor("prediction")[row]
        own = each_scale(scales, index, len(rows))
        buffers.tensor("descent")[row].sub_(buffers.node.energy_function.value_gradient(value, prediction, own))


def pull_back_by_autograd(buffers: NodeBuffers) -> None:
    """The error pulled back to what each edge contributes, from the graph kept at the prediction."""
    assert buffers.graph is not None
    leaves, output = buffers.graph
    delta = buffers.tensor("delta")[0]
    for position, pulled in zip(leaves, pull_back(output, list(leaves.values()), delta), strict=True):
        buffers.pulled(FIRST, position).write(pulled)


def gradients_by_autograd(
    buffers: NodeBuffers, parameters: list[nn.Parameter], factor: float, goals: list[Tensor]
) -> None:
    """Gradients of a node's own parameters, from the graph kept at the prediction."""
    assert buffers.graph is not None
    _, output = buffers.graph
    for goal, gradient in zip(goals, pull_back(output, parameters, buffers.tensor("delta")[0]), strict=True):
        torch.mul(gradient, factor, out=goal)


def precision_gradient(buffers: NodeBuffers, row: int, schedule: float, goal: Tensor) -> None:
    """∂/∂log π of π w E − ½ w log π, summed over what shares the precision, divided by the batch size."""
    node = buffers.stack.nodes[row]
    assert node.log_precision is not None
    unit = node.energy_function.unit_energy(buffers.tensor("value")[row], buffers.tensor("prediction")[row])
    unit = schedule * node.weight * node.log_precision.exp() * unit - 0.5 * node.weight
    goal.copy_(unit.mean(0).sum_to_size(node.log_precision.shape))


def total(goal: Tensor, terms: list[Tensor]) -> None:
    """Sum the gradients of a parameter that is used in several places."""
    goal.copy_(terms[0])
    for term in terms[1:]:
        goal.add_(term)

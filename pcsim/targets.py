"""What a batch's targets mean: values of a node, or numbers of classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pcsim.errors import ClampError, SettingError
from pcsim.graph.energy import CrossEntropy
from pcsim.graph.node import Node
from pcsim.messages import axis_to_mend


def target_values(target: Tensor, node: Node) -> Tensor:
    """Values of a target node, (batch, *shape), of any dtype.

    Targets of that shape are values, integers and booleans too. Integers of shape (batch,) are numbers of classes where
    the node can tell classes apart: it has one axis, of two units or more. So are those of the node's shape without the
    axis of its cross-entropy. They become one-hot along it. Anything else is refused, since a guess would train on the
    wrong numbers.

    Args:
        target: (batch, *shape), or class numbers from 0, (batch, *shape without the axis of classes).
        node: which it is given to.

    Raises:
        SettingError: class numbers are out of range.
        ClampError: the targets are neither.
    """
    if target.dim() == 0 or not len(target) or tuple(target.shape[1:]) == node.shape:
        return target  # what is no batch at all is refused with the other clamps
    axis = class_axis(node)
    told_apart = len(node.shape) == 1 or isinstance(node.energy_function, CrossEntropy)
    classes = node.shape[axis] if node.shape and told_apart and node.shape[axis] > 1 else 0
    without = node.shape[:axis] + node.shape[axis + 1 :]
    if not classes or tuple(target.shape[1:]) != without or not _whole(target):
        shapes = node.shape, without
        expected, of_classes = (f"(batch, {', '.join(map(str, s))})" if s else "(batch,)" for s in shapes)
        or_classes = f", or class numbers from 0 to {classes - 1} of shape {of_classes}," if classes else ""
        raise ClampError(
            f"targets of shape {tuple(target.shape)} and {target.dtype} given, expected {expected}{or_classes} for "
            f"node {node.name!r}; {_mend(target, node.shape)}"
        )
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= classes:
        raise SettingError(
            f"targets from {low} to {high} given, expected class numbers from 0 to {classes - 1} for node "
            f"{node.name!r}; number the classes from 0, or give the node a unit for each"
        )
    return one_hot(target.long(), classes).movedim(-1, axis + 1)


def class_axis(node: Node) -> int:
    """The axis of a node's shape, at least 0, along which its units stand for classes: that of its cross-entropy, else
    the first.
    """
    energy = node.energy_function
    return energy.axis % max(len(node.shape), 1) if isinstance(energy, CrossEntropy) else 0


def tells_classes(target: Tensor, node: Node) -> bool:
    """Whether a batch's targets say which of several classes each sample is of, so that there is an accuracy.

    They do where they are one-hot along the first axis of two units or more, or are measured by a cross-entropy. Any
    other values, such as those of a regression, say nothing of the kind.

    Args:
        target: values of the node, (batch, *shape).
        node: which they are given to.
    """
    axis = class_axis(node)
    if node.shape[axis : axis + 1] <= (1,):
        return False
    if isinstance(node.energy_function, CrossEntropy):
        return True
    return bool(((target == 0) | (target == 1)).all()) and bool((target.sum(1) == 1).all())


def _whole(target: Tensor) -> bool:
    return not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)


def _mend(target: Tensor, shape: tuple[int, ...]) -> str:
    """What to do about targets that do not have a node's shape."""
    given, wanted = tuple(target.shape[1:]), shape
    mend = axis_to_mend(given, wanted, "targets")
    if mend is not None and len(given) < len(wanted):
        classes = "; if they are classes, give the node a unit for each" if wanted == (1,) else ""
        return f"if they are the values, {mend}{classes}"
    if mend is not None:
        return mend
    if len(wanted) == 1 and given in ((), (1,)):
        first = "targets.squeeze(1)" if given else "targets"
        return f"if they are class numbers, give {first if _whole(target) else f'{first}.long()'}"
    if given == wanted[1:] and _whole(target):
        return f"if they are class numbers, give torch.nn.functional.one_hot(targets, {wanted[0]}).movedim(-1, 1)"
    return "the batch is the first axis"

"""What arguments are checked by, and messages of errors made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import numpy as np


def is_number(given: object) -> TypeGuard[float]:
    """Whether something is a finite number, Python's or NumPy's; a truth value is none."""
    known = isinstance(given, int | float | np.integer | np.floating) and not isinstance(given, bool)
    return known and math.isfinite(given)  # type: ignore[arg-type]


def listed(names: Iterable[str], most: int = 12) -> str:
    """The first of some names, quoted, for a message."""
    known = list(names)
    shown = ", ".join(map(repr, known[:most]))
    return f"{shown}, ... ({len(known)} in all)" if len(known) > most else shown or "none yet"


def instead_of(given: object, kind: type, otherwise: str) -> str:
    """What to do where an instance of ``kind`` is expected: make one of the class that was given, or ``otherwise``."""
    if isinstance(given, type) and issubclass(given, kind):
        return f"write {given.__name__}() with its arguments"
    return otherwise


def axis_to_mend(given: Sequence[int], expected: Sequence[int], tensor: str) -> str | None:
    """What to do where a shape lacks an axis of one, or has one too many; None where it is something else.

    Args:
        given: the shape, batch axis left out.
        expected: the shape that is wanted, batch axis left out.
        tensor: what to call it.
    """
    given, expected = tuple(given), tuple(expected)
    for longer, shorter, mend in (
        (expected, given, "add the axis that is missing, {}.unsqueeze({})"),
        (given, expected, "take away the axis that is too many, {}.squeeze({})"),
    ):
        for axis, size in enumerate(longer):
            if size == 1 and longer[:axis] + longer[axis + 1 :] == shorter:
                return mend.format(tensor, axis + 1)
    return None


def sizes(shape: Sequence[int]) -> str:
    """A shape's sizes, for a message."""
    return ", ".join(str(size) for size in shape)

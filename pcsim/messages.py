"""What messages of errors are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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


def sizes(shape: Sequence[int]) -> str:
    """A shape's sizes, for a message."""
    return ", ".join(str(size) for size in shape)

"""When Python's garbage collector has to wait."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Build without the collector of cycles, which would walk a large graph's objects each time that their number has
    grown by a quarter, though all of them stay.
    """
    if not gc.isenabled():  # by the user, or by another thread that builds
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

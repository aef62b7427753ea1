"""Resident memory of this process, as the kernel counts it (Linux)."""

from __future__ import annotations

import ctypes
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measurable() -> bool:
    """Whether this system tells."""
    return STATUS.exists() and CLEAR.exists()


def _read(field: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024.0
    raise OSError(f"{STATUS} has no field {field}")


def present() -> float:
    """Bytes held now, after memory that nobody uses has been handed back."""
    ctypes.CDLL(None).malloc_trim(0)
    return _read("VmRSS")


def forget_peak() -> None:
    """Let the peak start anew from what is held now."""
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")


def peak() -> float:
    """The most bytes held since."""
    return _read("VmHWM")

"""``python benchmarks/run.py``: the same as ``python -m benchmarks``, from any folder."""

import sys
from pathlib import Path


def start() -> None:
    """Let the package be found in place of this file's own folder, and run it."""
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.command import main

    main()


if __name__ == "__main__":
    start()

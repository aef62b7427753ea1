"""Nodes on several devices, of which one is written in Python: in processes of their own.

PyTorch has to hear of a device before it first computes a gradient, and no other test should meet it. To run them by
themselves: ``pytest tests/farther/places.py -n 0``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLACES = Path(__file__).parent / "farther" / "places.py"


def passes(*chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(PLACES), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def test_nodes_on_several_devices() -> None:
    passes()


@pytest.mark.slow
def test_all_networks_and_rules_on_several_devices() -> None:
    passes("-m", "slow")

"""What all tests share."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor, nn

# Tests run in parallel processes, and their tensors are small: more threads would only wait for each other.
torch.set_num_threads(1)

# Shrinking a failing network can take minutes: `pytest --hypothesis-profile=unshrunk` shows it as it was found.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])

# The same examples in every run: a property that fails for one user fails for all.
settings.register_profile("steady", derandomize=True, database=None)
settings.load_profile("steady")


def load_script(path: Path) -> ModuleType:
    """A script that belongs to no package, as a module; it finds those beside it, as when it is run."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        specification.loader.exec_module(module)
    return module


class Noisy(nn.Module):
    """A linear map that draws from every generator there is, in training and in evaluation mode."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units
        self.linear = nn.Linear(units, units)

    def forward(self, value: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        torch.rand(3)
        result: Tensor = self.linear(value)
        return result


def generators() -> tuple[object, ...]:
    """Where all generators stand, in a form that can be compared."""
    arrays = np.random.get_state()
    return random.getstate(), arrays[1].tobytes(), arrays[2], torch.get_rng_state().numpy().tobytes()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests marked `device` run: cpu, cuda, ...")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Single precision of the device is that of IEEE, so that it can be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield torch.device(request.config.getoption("--device"))
    torch.set_float32_matmul_precision(before)

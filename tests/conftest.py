"""What all tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import Phase, settings

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

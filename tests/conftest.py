"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import Phase, settings

# Tests run in parallel processes, and their tensors are small: more threads would only wait for each other.
torch.set_num_threads(1)

# Shrinking a failing network can take minutes: `pytest --hypothesis-profile=unshrunk` shows it as it was found.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])

# The same examples in every run: a property that fails for one user fails for all.
settings.register_profile("steady", derandomize=True, database=None)
settings.load_profile("steady")

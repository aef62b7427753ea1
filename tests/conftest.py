"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import Phase, settings

# Tests run in parallel processes, and their tensors are small: more threads would only wait for each other.
torch.set_num_threads(1)

# Shrinking a failing network can take minutes: `pytest --hypothesis-profile=unshrunk` shows it as it was found.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])

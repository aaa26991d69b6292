"""What every test relies on."""

from __future__ import annotations

import pytest
import torch

# The models of the tests are so small that a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded source of random numbers that is not the global one."""
    return torch.Generator().manual_seed(0)

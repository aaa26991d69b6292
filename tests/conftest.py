"""What every test relies on."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# The models of the tests are so small that a second thread only waits for the first.
torch.set_num_threads(1)

# The same examples in every run: the solver's accuracy is a matter of probability, and a build must not be.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded source of random numbers that is not the global one."""
    return torch.Generator().manual_seed(0)

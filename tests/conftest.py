"""What every test relies on."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed

# The models of the tests are so small that a second thread only waits for the first.
torch.set_num_threads(1)

# The same examples in every run: the solver's accuracy is a matter of probability, and a build must not be.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded source of random numbers that is not the global one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process, which is a group of its own."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

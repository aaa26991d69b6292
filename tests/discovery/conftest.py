"""What the tests of discovery share: the zoo, searched once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch.distributed
from found import Search, search


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process, which is a group of its own."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def found() -> Search:
    """Searches a member of the zoo, once per session. Tests that change a model build their own."""
    return functools.cache(search)

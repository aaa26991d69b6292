"""What every test relies on."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.distributed

# What the tests share asserts too, and a failure there shows the values.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).with_name("support").iterdir()))

# The models of the tests are so small that a second thread only waits for the first.
torch.set_num_threads(1)

# The same examples in every run: the solver's accuracy is a matter of probability, and a build must not be.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

# Which fifths of the slow tests over the zoo run. "half" of the rest is what continuous integration has time for.
ZOO = {"fifth": {0}, "half": {1, 2}, "rest": {1, 2, 3, 4}, "all": {0, 1, 2, 3, 4}}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the garbage collector what stays to the end: the tests and the libraries, half a million objects.

    It looked at them again and again, for a twelfth of all the time. What it has left to see is small, and can wait.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave four fifths of the slow tests over the zoo to ``make test-zoo``: by name, the same ones in every run."""
    wanted = os.environ.get("SPECTRAL_ZOO", "fifth")
    if wanted not in ZOO:
        raise pytest.UsageError(f"SPECTRAL_ZOO={wanted!r}: expected one of {', '.join(ZOO)}")
    if not torch.cuda.is_available():
        for item in (item for item in items if item.get_closest_marker("gpu")):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    named = any("::" in argument for argument in config.args)
    left = {
        item
        for item in items
        if item.get_closest_marker("zoo") and zlib.crc32(item.name.encode()) % 5 not in ZOO[wanted]
    }
    if not named:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


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

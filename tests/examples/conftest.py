"""The examples are run as a user runs them, only smaller."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """An example that is run in this process mutes loggers: not those of the tests behind it."""
    muted = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_spectral")]
    levels = [logger.level for logger in muted]
    yield
    for logger, level in zip(muted, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Return what runs an example in an empty folder and returns what it printed on both streams."""

    def run_example(script: str, *arguments: str) -> str:
        # One thread: other processes on the machine would make two wait for each other.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        command = [sys.executable, str(ROOT / "examples" / script), *arguments]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run_example

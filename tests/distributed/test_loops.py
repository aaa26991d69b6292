"""Every kind of loop in two processes: the same numbers in both, in every loop, and as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loops import ALL
from processes import run

pytestmark = pytest.mark.slow
SCRIPT = "loops.py"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what two processes saw, by shell."""
    return run(SCRIPT, 2, tmp_path_factory.mktemp("loops"), *ALL, timeout=300)


@pytest.mark.parametrize("shell", ALL)
def test_all_processes_know_and_do_the_same(both: Any, shell: str):
    one, two = (process[shell] for process in both)
    assert one == two
    assert one["cut"] is (shell in ("sharded", "accelerated"))
    assert one["steps"] == [0, 2, 4, 6]
    assert one["moves"]
    assert any(value < 0 for value in one["scales"].values())


@pytest.mark.parametrize("shell", [name for name in ALL if name != "lightning"])
def test_every_loop_is_the_one_of_lightning(both: Any, shell: str):
    lightning, other = both[0]["lightning"], both[0][shell]
    np.testing.assert_allclose(other["ratios"], lightning["ratios"], rtol=1e-12)
    np.testing.assert_allclose(other["tokens"], lightning["tokens"], rtol=1e-12)
    np.testing.assert_allclose(other["moves"], lightning["moves"], rtol=1e-12)  # shards add up in another order


def test_two_processes_are_one(both: Any, tmp_path: Path):
    alone = run(SCRIPT, 1, tmp_path, "plain", timeout=180)[0]["plain"]
    np.testing.assert_allclose(both[0]["plain"]["ratios"], alone["ratios"], rtol=1e-3)
    np.testing.assert_allclose(both[0]["plain"]["moves"], alone["moves"], rtol=1e-2)

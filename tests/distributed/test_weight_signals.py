"""The signals of weights in two processes: each measures a share, and both know the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run

pytestmark = pytest.mark.slow
SCRIPT = "weight_signals.py"


def test_two_processes_know_what_one_knows(tmp_path: Path):
    tmp_path.joinpath("one").mkdir()
    one, two = run(SCRIPT, 2, tmp_path, timeout=120)
    (alone,) = run(SCRIPT, 1, tmp_path / "one", timeout=120)
    assert one == two == alone
    first, second = one["shares"]
    assert [layer["mlp_moved"] for layer in first] == [False] * 5
    assert [layer["mlp_moved"] for layer in second] == [True] * 5
    assert all(layer["alignment"] is not None for layer in second[:-1])
    assert one["copies"] == [[[0, 1, 2, 3, 4]], [[0, 1, 2, 4]]]

"""Loops without Lightning's Trainer, as short scripts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from lightning_spectral import History, audit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["plain", "fabric"])
def test_a_short_loop_learns_and_ends_inside_the_zone(run: Callable[..., str], tmp_path: Path, name: str):
    printed = run(f"{name}_loop.py")
    rows = re.findall(r"^step +(\d+) +loss (\S+) +ratio (\S+)$", printed, re.M)
    assert [int(step) for step, *_ in rows] == [*range(0, 181, 20)]
    assert float(rows[-1][1]) < 0.1 < 2 < float(rows[0][1])
    history = History.read(tmp_path / "runs" / name / "spectral.jsonl")
    assert history.steps == (*range(0, 201, 20),)
    assert history.measurements[-1].summary()["in_zone"] == 1
    assert (tmp_path / "runs" / name / "spectral.png").exists()


def test_transformers_trains_and_saves_a_model_without_scales(run: Callable[..., str], tmp_path: Path):
    printed = run("transformers_trainer.py")
    rows = re.findall(r"^step +(\d+) +ratio (\S+)$", printed, re.M)
    assert [int(step) for step, _ in rows] == [0, 20, 40, 60, 80, 100]
    final = tmp_path / "runs" / "transformers" / "final"
    with safe_open(final / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "log_scale" in name]  # noqa: SIM118  # it is no dict
    last = History.read(tmp_path / "runs" / "transformers" / "spectral.jsonl").measurements[-1]
    assert [layer.ratio for layer in audit(final)] == pytest.approx([layer.ratio for layer in last], rel=1e-2)

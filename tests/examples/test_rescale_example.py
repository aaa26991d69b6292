"""The example of rescaling is run as a user runs it, only smaller."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from journals import read_actions, read_journal

ROOT = Path(__file__).parents[2]
MODEL = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "32", "--batch-size", "4"]
pytestmark = pytest.mark.slow
NAMES = ["mlp-0.004-off", "mlp-0.004-on", "attention-0.004-off", "attention-0.004-on"]
RATES = ["0.001", "0.002", "0.004", "0.008", "0.016"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run it once; return the folder of its runs and what it printed."""
    folder = tmp_path_factory.mktemp("rescale")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "rescale_gpt.py"), *MODEL, "--steps", "30", "--seed", "3"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "rescale-seed3", done.stdout


def test_it_says_what_every_run_did(done: tuple[Path, str]):
    folder, printed = done
    when = r"(?:step \d+|never)"
    rows = re.findall(rf"^(MLP|attention), 8x +0\.004 +(off|on) +{when} +{when} +(\d+) ", printed, re.M)
    assert [row[:2] for row in rows] == [("MLP", "off"), ("MLP", "on"), ("attention", "off"), ("attention", "on")]
    assert [int(row[2]) for row in rows] == [len(read_actions(folder / name / "spectral.jsonl")) for name in NAMES]
    assert [int(row[2]) > 0 for row in rows] == [False, True, False, True]
    plain = re.findall(r"^as it is +(\S+) +(off|on) ", printed, re.M)
    assert plain == [(rate, state) for rate in RATES for state in ("off", "on")]
    assert "runs/rescale-seed3/rescale.png" in printed
    assert (folder / "rescale.png").read_bytes().startswith(b"\x89PNG")


def test_the_wrong_branches_start_eight_times_too_strong(done: tuple[Path, str]):
    starts = {}
    for name in NAMES:
        header, records = read_journal(done[0] / name / "spectral.jsonl")
        assert (header["rescaler"] is not None) == name.endswith("on")
        assert [record["step"] for record in records] == [0, 5, 10, 15, 20, 25, 30]
        starts[name] = [layer["ratio"] for layer in records[0]["layers"]]
    assert starts[NAMES[1]] == starts[NAMES[0]]
    assert starts[NAMES[3]] == starts[NAMES[2]]
    far = [high / low for high, low in zip(starts[NAMES[1]], starts[NAMES[3]], strict=True)]
    assert far == pytest.approx([64.0] * 2, rel=1e-2)


def test_both_runs_see_the_same_batches_and_part_when_the_scales_move(done: tuple[Path, str]):
    for branch in ("mlp", "attention"):
        losses = []
        for state in ("off", "on"):
            with (done[0] / f"{branch}-0.004-{state}" / "metrics.csv").open(newline="") as file:
                losses.append([row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]])
        assert losses[0][0] == losses[1][0]
        assert losses[0][-1] != losses[1][-1]

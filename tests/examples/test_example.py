"""The example is run as a user runs it, only smaller."""

from __future__ import annotations

import csv
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from journals import read_journal

ROOT = Path(__file__).parents[2]
MODEL = ["--layers", "3", "--width", "32", "--heads", "2", "--context", "32"]
RUN = ["--batch-size", "8", "--steps", "30", "--every-n-steps", "10"]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread: other processes on the machine would make two wait for each other.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "train_gpt.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("linearization", ["circuit", "paper"])
def test_it_trains_watches_and_says_where_everything_lies(tmp_path: Path, linearization: str):
    done = run(tmp_path, *MODEL, *RUN, "--linearization", linearization)
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.search(r"training loss (\S+) -> (\S+) nats", done.stdout).groups())
    assert last < first - 0.5
    named = [tmp_path / path for path in re.findall(r"(runs/\S+\.\w+)", done.stdout)]
    assert [path.name for path in named] == ["spectral.png", "spectral.jsonl", "metrics.csv"]
    assert all(path.stat().st_size > 0 for path in named)
    header, records = read_journal(named[1])
    assert header["linearization"] == linearization
    assert [record["step"] for record in records] == [0, 10, 20, 30]
    assert all(layer["ratio"] > 0 for record in records for layer in record["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 9, 10, 11])
def test_a_run_of_any_length_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int):
    """The learning rate's cycle of ten steps once divided by the length of its warm-up, zero."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script = importlib.import_module("train_gpt")
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *MODEL, "--steps", str(steps), "--out", str(tmp_path)])
    with (script.train(script.parse()) / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == steps
    assert all(map(math.isfinite, losses))


def test_the_model_knows_nothing_of_this_package():
    text = (ROOT / "examples" / "train_gpt.py").read_text()
    assert re.findall(r"lightning_spectral", text.partition('"""\n\nfrom __future__')[2]) == ["lightning_spectral"]

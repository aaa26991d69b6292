"""Other people's models, each watched by one callback."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from journals import read_journal

SMALL = ["--layers", "3", "--width", "32", "--every-n-steps", "10"]
pytestmark = pytest.mark.slow


def column(folder: Path, key: str) -> list[float]:
    """Return the logged values of one key."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[key]) for row in csv.DictReader(file) if row[key]]


def watched(folder: Path, printed: str, blocks: str, steps: list[int]) -> None:
    """Check that every block was measured at every step, and that table, picture and curves are there."""
    header, records = read_journal(folder / "spectral.jsonl")
    assert [block["name"] for block in header["blocks"]] == [f"{blocks}.{index}" for index in range(3)]
    assert all(block["verified"] for block in header["blocks"])
    assert [record["step"] for record in records] == steps
    ratios = [[layer["ratio"] for layer in record["layers"]] for record in records]
    assert all(0 < ratio < math.inf for row in ratios for ratio in row)
    assert column(folder, "spectral/ratio_max") == pytest.approx([max(row) for row in ratios])
    assert f"step {steps[-1]}, safe zone (0.5, 2)" in printed
    rows = re.findall(rf"^ +\d  {re.escape(blocks)}\.\d +\S+ +\S+ +(\S+)", printed, re.M)
    assert [float(row) for row in rows] == pytest.approx(ratios[-1], rel=1e-3)
    places = dict(re.findall(r"^(heatmap|every measurement) +(\S+)$", printed, re.M))
    assert folder.parents[2] / places["every measurement"] == folder / "spectral.jsonl"
    assert (folder.parents[2] / places["heatmap"]).read_bytes().startswith(b"\x89PNG")


def test_a_llama_learns_and_is_watched(run: Callable[..., str], tmp_path: Path):
    text = ["--context", "32", "--batch-size", "8", "--steps", "30"]
    printed = run("hugging_face_llama.py", *SMALL, *text, "--heads", "2", "--kv-heads", "1")
    folder = tmp_path / "runs" / "llama" / "version_0"
    watched(folder, printed, "model.model.layers", [0, 10, 20, 30])
    (page,) = re.findall(r"^report +(\S+)$", printed, re.M)
    assert "model.model.layers.2" in (tmp_path / page).read_text(encoding="utf-8")
    assert column(folder, "val/loss")[-1] < column(folder, "train/loss")[0] - 0.5


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_an_encoder_sorts_and_is_watched_in_either_arrangement(run: Callable[..., str], tmp_path: Path, norm: str):
    printed = run("transformer_encoder.py", *SMALL, "--norm", norm, "--length", "8", "--steps", "100")
    folder = tmp_path / "runs" / f"encoder-{norm}" / "version_0"
    watched(folder, printed, "encoder.layers", [*range(0, 101, 10)])
    assert column(folder, "val/accuracy")[-1] > 0.5  # of ten digits
    (printed_accuracy,) = re.findall(r"^accuracy +(\S+)% of the positions", printed, re.M)
    assert float(printed_accuracy) == pytest.approx(100 * column(folder, "val/accuracy")[-1], abs=0.1)


def test_a_vision_transformer_is_watched_and_better_than_chance(run: Callable[..., str], tmp_path: Path):
    printed = run("vision_transformer.py", *SMALL, "--heads", "2", "--steps", "100")
    folder = tmp_path / "runs" / "vision" / "version_0"
    watched(folder, printed, "model.vit.layers", [*range(0, 101, 10)])
    assert column(folder, "val/accuracy")[-1] > 0.4  # of ten digits
    assert all(0 < residual < 1 for residual in column(folder, "spectral/token_residual_min"))
    (printed_accuracy,) = re.findall(r"^accuracy +(\S+)% of 359 images", printed, re.M)
    assert float(printed_accuracy) == pytest.approx(100 * column(folder, "val/accuracy")[-1], abs=0.1)

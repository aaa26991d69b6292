"""Runs laid over each other, and a page that is written again while a run goes."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import append_measurement, measurements, ratio, steered_run, watched_run

from lightning_spectral import History, report
from lightning_spectral.cli import main
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.pages import reports
from lightning_spectral.pages.differences import difference_table, differences, shared_steps, told_difference
from lightning_spectral.runs.journal import Journal


def changed_run(path: Path, block: int, factor: float, steps: tuple[int, ...] | None = None) -> Path:
    """Write a run of five blocks, one of which has another MLP."""
    journal = Journal(path, {"linearization": "circuit"})
    for item in measurements(tuple(f"model.blocks.{index}" for index in range(5))):
        layers = [replace(layer, mlp_norm=layer.mlp_norm and layer.mlp_norm * (factor if layer.index == block else 1))
                  for layer in item]  # fmt: skip
        if steps is None or item.step in steps:
            journal.append(replace(item, layers=tuple(layers)))
    return path


def test_differences_are_those_of_the_last_common_step(tmp_path: Path):
    one = History.read(steered_run(tmp_path / "one.jsonl"))
    other = History.read(changed_run(tmp_path / "other.jsonl", 3, 4.0, (0, 20, 60)))
    steps = shared_steps(one, other)
    assert steps == (0, 20, 60)
    found = differences(one, other, 60)
    assert [item.log_factor for item in found] == pytest.approx([0.0, 0.0, 0.0, math.log(4), 0.0])
    assert found[3].mlp_factor == pytest.approx(4.0)
    assert found[3].attention_factor == 1.0
    assert told_difference(found, ("A", "B"), 60) == (
        f"At step 60, B differs most from A in block 3 (model.blocks.3): ρ = {ratio(3, 5):.4g} in A and "
        f"{4 * ratio(3, 5):.4g} in B. Its MLP is ×4, its attention ×1. 4 of 5 blocks agree within 5 %."
    )
    assert difference_table(found, ("A", "B"), 60).rows[3][4:] == ("4", "4", "1")
    backwards = [item.log_factor for item in differences(other, one, 60)]
    np.testing.assert_allclose(backwards, [-item.log_factor for item in found if item.log_factor is not None])
    assert "the ratios of all blocks agree" in told_difference(differences(one, one, 60), ("A", "B"), 60)
    gap = told_difference(differences(one, one, 30)[1:2], ("A", "B"), 30)
    assert gap == "At step 30, no block has a ratio in both A and B."


def test_the_command_line_lays_runs_over_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steered_run(tmp_path / "a" / "spectral.jsonl")
    changed_run(tmp_path / "b" / "spectral.jsonl", 0, 8.0)
    (tmp_path / "a" / "metrics.csv").write_text("step,loss\n0,3.0\n80,2.0\n")
    (tmp_path / "b" / "metrics.csv").write_text("step,loss\n0,3.0\n80,2.5\n")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    page = tmp_path / "a" / "spectral-comparison.html"
    assert capsys.readouterr().out == f"{page}\n"
    text = page.read_text()
    assert "2 runs, laid over each other." in text
    assert "B differs most from A in block 0 (model.blocks.0)" in text
    assert "loss ends at 2 (A), 2.5 (B)." in text
    assert "A: The run has failed: since step 20, tokens become one vector." in text
    assert "B: Healthy: no failure and no warning. 3 of 5 blocks outside the safe zone at step 80." in text


def test_runs_that_cannot_be_compared_are_refused_or_told(tmp_path: Path):
    steered_run(tmp_path / "a.jsonl")
    watched_run(tmp_path / "paper.jsonl", linearization="paper")
    with pytest.raises(ConfigurationError, match=r"different linearizations cannot be compared: found circuit, paper$"):
        report([tmp_path / "a.jsonl", tmp_path / "paper.jsonl"])
    with pytest.raises(ConfigurationError, match=r"expected at most 6 runs to lay over each other; got 7$"):
        report([tmp_path / "a.jsonl"] * 7)
    watched_run(tmp_path / "b.jsonl", (5, 7))
    text = report([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]).read_text()
    assert "A and B were measured at no common step." in text
    assert "The runs have different blocks. Blocks are compared by their index." in text
    assert 'data-chart="difference_B"' not in text


def test_a_watched_page_is_written_when_the_run_goes_on_and_ends_without_reloading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "spectral.jsonl"
    run.write_text('{"lightning_spectral": 1, "linearization": "circuit"}\n')
    told: list[str] = []
    looks = iter(range(5))

    def sleep(seconds: float) -> None:  # what happens between two looks at the run
        look = next(looks)
        page = run.with_suffix(".html")
        if look == 0:
            assert not page.exists()
            steered_run(tmp_path / "made.jsonl")
            (tmp_path / "made.jsonl").replace(run)
        elif look == 1:
            assert "steps 0 to 80" in page.read_text()
            assert 'data-reload="2.5"' in page.read_text()
            append_measurement(run)
        elif look == 2:
            assert "steps 0 to 90" in page.read_text()
            page.write_text("untouched")
        elif look == 3:
            assert page.read_text() == "untouched"  # nothing new, nothing written
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    page = reports.watch_report(tmp_path, every=2.5, tell=told.append)
    assert told == [
        f"{run}: nothing was measured yet; waiting",
        f"{page}, written again while the run goes; Ctrl-C ends it",
    ]
    assert "steps 0 to 90" in page.read_text()
    assert "data-reload" not in page.read_text()


def test_the_command_line_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run = steered_run(tmp_path / "spectral.jsonl")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["report", str(run), "--watch"]) == 0
    assert main(["report", str(run), "--watch", "3"]) == 0
    assert waited == [10.0, 3.0]
    assert capsys.readouterr().out.count("Ctrl-C ends it") == 2
    with pytest.raises(ConfigurationError, match="no such file or folder"):
        reports.watch_report(tmp_path / "nothing")

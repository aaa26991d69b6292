"""The trial of steering behind docs/evidence.md: its arms, its statistics where the answer is known, its file."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_1samp

from lightning_spectral import find_blocks, measure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence_runs as runs  # noqa: E402
import evidence_steering as trial  # noqa: E402
import evidence_steering_report as report  # noqa: E402

TINY = runs.Recipe(16, 2, 16, 4, 2, 2, 4, 8)


@pytest.fixture(scope="module")
def texts():
    return runs.read_texts(TINY)


def job(**values):
    plain = {"arm": "off", "start": "healthy", "layers": 2, "steps": 6, "rate": 4e-3, "seed": 0}
    return runs.Job(**plain | values)


def entry(**values):
    plain = {"arm": "off", "start": "healthy", "layers": 6, "steps": 300, "rate": 4e-3, "seed": 0}
    return plain | {"validation": 2.5, "inside": 1.0, "spike": 0.5} | values


# Arms


@pytest.mark.parametrize("arm", [arm for arm in runs.ARMS if arm != "placebo"])
def test_every_arm_trains_and_is_a_function_of_its_job(arm: str, texts):
    one, two = (runs.train(job(arm=arm), TINY, texts, None) for _ in range(2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert one["measured"] == [2, 4, 6]
    assert math.isfinite(one["validation"])
    assert len(one["last_log_ratios"]) == 2
    moved = any(value for pair in one["log_scales"] for value in pair)
    assert moved is (arm in ("scales", "band") or ("ceiling" in arm and arm != "ceiling 10"))


def test_an_arm_of_scales_that_nobody_moves_is_the_run_without(texts):
    schedule = {"measured": [2, 4, 6], "log_scales": [[0.0, 0.0]] * 3}
    off, blind = runs.train(job(), TINY, texts, None), runs.train(job(arm="placebo"), TINY, texts, schedule)
    assert {**off, "arm": 0, "seconds": 0} == {**blind, "arm": 0, "seconds": 0}


def test_a_placebo_has_the_scales_of_its_schedule(texts):
    values = [[-0.5, -0.25], [-1.0, -0.5], [-2.0, -1.0]]
    blind = runs.train(job(arm="placebo"), TINY, texts, {"measured": [2, 4, 6], "log_scales": values})
    # A measurement at the end of step k sees the scales that step had.
    assert blind["log_scales"] == [pytest.approx(pair, abs=1e-6) for pair in ([0, 0], values[0], values[1])]


def test_starts_are_what_they_are_called():
    norms = {}
    for start in runs.STARTS:
        module = runs.initialize(job(start=start), runs.Recipe())
        norms[start] = measure(module, find_blocks(module, batch=torch.zeros(2, 8, dtype=torch.long))).layers[0]
    healthy = norms["healthy"]
    assert norms["MLP 8×"].ratio / healthy.ratio == pytest.approx(8.0, rel=1e-2)
    assert healthy.ratio / norms["attention 8×"].ratio == pytest.approx(8.0, rel=1e-2)
    assert 3.0 > healthy.attention_norm > 1 / math.sqrt(4) > norms["small"].mlp_norm


def test_reparametrized_matrices_have_norm_gamma():
    module = runs.initialize(job(arm="σReparam"), TINY)
    linear = module.model.blocks[0].mlp.up
    for _ in range(200):  # of power iteration
        linear.weight  # noqa: B018
    assert torch.linalg.matrix_norm(linear.weight, 2).item() == pytest.approx(1.0, rel=1e-3)


def test_blocks_have_the_rate_of_their_depth():
    module = runs.initialize(job(arm="depth-scaled rate", layers=4), TINY)
    module.trainer = type("Trained", (), {"estimated_stepping_batches": 20})()
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["max_lr"] for group in groups] == pytest.approx([4e-3, 2e-3])
    inside = {id(parameter) for parameter in module.model.blocks.parameters()}
    assert {id(parameter) for parameter in groups[1]["params"]} == inside
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


# Jobs


def test_the_stages_end_with_every_job_done_and_placebos_after_what_they_copy():
    done: dict = {}
    for stage in trial.stages(done, quick=True):
        for one in stage:
            if one.arm == "placebo":
                schedule = trial.schedule_for(one, done)
                assert schedule == {"measured": [5], "log_scales": [[-0.5, -1.5]]}  # of the seeds 0 and 1
            scales = [[-float(one.seed), -1.0 - one.seed]]
            done[one] = entry(validation=2.5 + one.rate, measured=[5], log_scales=scales)
    assert {one.arm for one in done} == set(runs.ARMS)
    assert {(one.layers, one.steps) for one in done} == {(2, 12), (3, 12), (4, 12)}
    assert trial.schedule_for(job(), done) is None


def test_finished_runs_are_kept_line_by_line(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    trial.Results(path, {"width": 1}).add(entry(validation=1 / 3))
    trial.Results(path, {"width": 1}).add(entry(seed=1, validation=None))
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head["recipe"] == {"width": 1}
    assert [line["validation"] for line in lines] == [0.333333, None]
    assert [*trial.Results(path, {"width": 1}).entries] == [
        runs.Job("off", "healthy", 6, 300, 4e-3, seed) for seed in (0, 1)
    ]
    with pytest.raises(SystemExit, match=r"holds \{'width': 1\}, this is \{'width': 2\}: choose another --out"):
        trial.Results(path, {"width": 2})


# Statistics


def test_intervals_are_students():
    values = [-0.05, -0.02, 0.01, -0.04]
    low, high = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert report.interval(values) == pytest.approx((-0.025, low, high))


def test_a_plateau_is_made_of_neighbours():
    losses = {1e-3: {0: 2.50}, 2e-3: {0: 2.60}, 4e-3: {0: 2.515}, 8e-3: {0: 2.50}, 1.6e-2: {0: 2.519}}
    assert report.plateau(losses) == pytest.approx(1.0)  # 1e-3 is the best, and its neighbour is worse
    assert report.plateau(losses | {1e-3: {0: 2.51}}) == pytest.approx(4.0)


def test_a_run_that_diverged_counts_as_one_that_guesses():
    assert [report.loss_of(entry(validation=value)) for value in (None, 9.0, 2.0)] == [runs.WORST, runs.WORST, 2.0]
    assert [report.diverged(entry(validation=value)) for value in (None, 9.0, 2.0)] == [True, True, False]


def test_arms_are_compared_at_their_own_best_rates():
    off = [entry(rate=rate, seed=seed, validation=2.6 - rate + seed / 10) for rate in (0.1, 0.2) for seed in (0, 1)]
    band = [entry(arm="band", rate=0.1, seed=seed, validation=2.3 + seed / 10, inside=0.5) for seed in (0, 1)]
    band += [entry(arm="band", rate=0.2, seed=seed, validation=None, spike=None, inside=None) for seed in (0, 1)]
    lines = report.grid_table([*off, *band], "healthy", layers=6, steps=300).splitlines()[2:]
    assert lines == [
        "| off | 0.2 | 2.450 | +0.000, 0 of 2 | 1× | 100% | 0.50 | 0 of 4 |",
        "| band | 0.1 | 2.350 | −0.100, 2 of 2 | 1× | 25% | 0.50 | 2 of 4 |",
    ]
    assert report.grid_table(off, "small", layers=6, steps=300) == ""


def test_the_bars_are_paired_by_seed():
    off = [entry(seed=seed, validation=2.5 + seed / 10) for seed in range(5)]
    law = [entry(arm=runs.DEFAULT, seed=seed, validation=2.4 + seed / 10, inside=seed / 4) for seed in (4, 3, 2, 1)]
    (line,) = report.bars_table([*off, *law]).splitlines()[2:]
    assert line == "| healthy | 0.004 | 2.700 | −0.100 [−0.100, −0.100], 4 of 4 | 1 of 4 |"


def test_the_page_shows_the_results_that_are_there():
    """Every table of the page is what the script makes of the runs in the repository."""
    lines = (ROOT / "benchmarks" / "results" / "evidence_steering.jsonl").read_text().splitlines()[1:]
    page = (ROOT / "docs" / "evidence.md").read_text()
    found = report.tables([json.loads(line) for line in lines])
    for name, text in found.items():
        shown = re.search(rf"<!-- begin: {re.escape(name)} -->\n(.*?)\n<!-- end", page, re.DOTALL)
        assert shown is not None, name
        assert shown[1] == text

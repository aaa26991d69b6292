"""The experiments behind docs/evidence.md: their statistics where the answer is known, and a tiny run of everything."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402
import evidence_report as report  # noqa: E402
import evidence_statistics as statistics  # noqa: E402
import evidence_synthetic as synthetic  # noqa: E402
import evidence_training as training  # noqa: E402

TINY = training.Recipe(16, 2, 16, 4, 12, 4, 3, 8, 2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def result(**values):
    plain = {"layers": 4, "mlp_gain": 1.0, "attention_gain": 1.0, "rate": 1e-3, "seed": 0, "arm": "off"}
    return plain | {"validation": 2.0, "spike": 1.0, "token_residual": [0.9, 0.5], "seconds": 1.0} | values


# Predictors and outcomes.


def test_forms_are_taken_block_by_block():
    """Blocks on both sides of 1 cancel in the mean of ln ρ, and do not in its absolute value."""
    measured = {rule: [1.0, -3.0] for rule in statistics.RULES} | {"token_residual": [0.4, 0.7]}
    table = statistics.predictors([result(early=measured)], "early")
    assert {name.partition(": ")[2]: value.item() for name, value in table.items() if name.startswith("paper")} == {
        "ln ρ": -1.0,
        "|ln ρ|": 2.0,
        "max(0, ln ρ)": 0.5,
        "max(0, −ln ρ)": 1.5,
    }
    assert len(table) == 4 * len(statistics.RULES) + 2
    assert table["−token residual, last block"].item() == -0.7
    assert table["−token residual, smallest"].item() == -0.4


def test_outcomes_are_larger_where_worse():
    bad = statistics.outcomes([result(), result(validation=3.0, token_residual=[0.1, 0.2])])
    assert bad["tokens"].tolist() == [-0.5, -0.2]
    assert bad["loss"].tolist() == [2.0, 3.0]


def test_within_leaves_no_difference_between_strata(rng):
    strata = np.repeat([0, 1], 5)
    values = rng.normal(size=10)
    left = statistics.within(values + 100 * strata, strata)
    assert [np.median(left[strata == stratum]) for stratum in (0, 1)] == pytest.approx([0, 0])
    assert left == pytest.approx(statistics.within(values, strata))


# Associations, against the libraries' functions for one pair.


def test_associations_are_those_of_scipy_and_scikit_learn(rng):
    scores = rng.integers(0, 8, size=(40, 3)).astype(float)  # ties
    bad = {"tokens": rng.normal(size=40), "loss": rng.normal(size=40)}
    drawn = rng.integers(0, 40, size=40)
    found = statistics.associations(scores, bad)(drawn)
    assert found.shape == (3, len(statistics.METRICS))
    for column in range(3):
        x = scores[drawn, column]
        slow = [spearmanr(x, bad[name][drawn]).statistic for name in ("tokens", "loss")]
        for outcome, share in statistics.EVENTS.values():
            label = bad[outcome] > np.quantile(bad[outcome], share)
            slow.append(roc_auc_score(label[drawn], x))
        assert found[column] == pytest.approx(slow, abs=1e-12)


def test_a_perfect_warning_and_a_reversed_one(rng):
    x = rng.permutation(24).astype(float)
    found = statistics.associations(np.column_stack([x, -x]), {"tokens": x, "loss": x**3})(np.arange(24))
    assert found[0] == pytest.approx([1, 1, 1, 1, 1])
    assert found[1] == pytest.approx([-1, -1, 0, 0, 0])


def test_what_is_constant_predicts_nothing(rng):
    x = rng.normal(size=12)
    found = statistics.associations(np.column_stack([np.zeros(12), x]), {"tokens": x, "loss": x})(np.arange(12))
    assert np.isnan(found[0, :2]).all()
    assert found[0, 2:] == pytest.approx([0.5] * 3)
    assert np.isnan(statistics.roc_areas(np.ones(12, dtype=bool), x[:, None])).all()


def test_sides_tell_a_valley_from_a_slope():
    x = np.linspace(-3, 3, 30)
    valley = statistics.sided(x[:, None], {"tokens": x**2, "loss": -x})(np.arange(30))[0]
    assert valley == pytest.approx([1, 1, 1, -1])  # below: tokens, loss; above: tokens, loss


def test_a_side_without_runs_has_no_correlation():
    x = np.linspace(1, 3, 9)
    below_tokens, below_loss, *above = statistics.sided(x[:, None], {"tokens": x, "loss": x})(np.arange(9))[0]
    assert math.isnan(below_tokens)
    assert math.isnan(below_loss)
    assert above == pytest.approx([1, 1])


# The bootstrap.


def test_whole_configurations_are_drawn():
    clusters = np.array([2, 0, 0, 1, 2, 2])
    draws = list(statistics.resamples(clusters, 50))
    for drawn in draws:
        counts = np.bincount(drawn, minlength=6)
        assert all(len(set(counts[clusters == cluster])) == 1 for cluster in range(3))
        assert sum(counts[clusters == cluster][0] for cluster in range(3)) == 3
    again = statistics.resamples(clusters, 50)
    assert all((one == other).all() for one, other in zip(draws, again, strict=True))
    assert len({tuple(drawn) for drawn in draws}) > 5


def test_copies_of_a_run_make_nothing_surer(rng):
    """Seeds that all give one number are one observation: the standard error is that of the configurations alone."""
    values = rng.normal(size=30)
    copies, clusters = np.repeat(values, 3), np.repeat(np.arange(30), 3)
    alone = statistics.bootstrapped(lambda drawn: values[drawn].mean(), np.arange(30), 4000)
    tripled = statistics.bootstrapped(lambda drawn: copies[drawn].mean(), clusters, 4000)
    assert tripled == pytest.approx(alone)
    value, low, high, error = alone
    assert value == pytest.approx(values.mean())
    assert error == pytest.approx(values.std() / math.sqrt(30), rel=0.05)
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.15 * error)


def test_the_correction_asks_for_more_of_more_comparisons():
    one, many = (statistics.survives(np.array([2.5]), np.array([1.0]), np.array([0.0]), m).item() for m in (1, 100))
    assert (one, many) == (True, False)
    assert not statistics.survives(np.array([0.6]), np.array([0.2]), np.array([0.5]), 1).item()


def test_runs_are_compared_with_their_own_twin():
    runs = [
        result(seed=0, validation=2.0),
        result(seed=1, validation=3.0),
        result(seed=1, arm="both", validation=3.5),
        result(seed=0, arm="both", validation=1.75),
        result(seed=0, arm="low", validation=9.0),
    ]
    differences, treated = statistics.paired(runs, "both", "validation")
    assert differences.tolist() == [0.5, -0.25]
    assert [run["seed"] for run in treated] == [1, 0]
    with pytest.raises(KeyError, match=r"\(4, 1\.0, 1\.0, "):
        statistics.paired(runs[1:], "low", "validation")


def test_one_ratio_is_reached_in_two_ways():
    strong, weak = {"mlp_gain": 1.0, "attention_gain": 8.0}, {"mlp_gain": 0.125, "attention_gain": 1.0}
    watched = [
        result(**strong, validation=3.0),
        result(**strong, validation=4.0, layers=8),
        result(**weak, validation=2.5, layers=8, token_residual=[0.9, 0.75]),
        result(**weak, validation=2.75, token_residual=[0.9, 0.625]),
        result(**weak, validation=9.0, seed=5),  # without a partner
    ]
    losses, runs = statistics.matched(watched, (1.0, 8.0), (0.125, 1.0), "loss")
    assert losses.tolist() == [0.25, 1.5]
    assert [run["layers"] for run in runs] == [4, 8]
    assert statistics.matched(watched, (1.0, 8.0), (0.125, 1.0), "tokens")[0].tolist() == [0.125, 0.25]
    lines = report.same_ratio(watched, 20)
    assert [(line["strong"], line["weak"], line["rate"], line["pairs"]) for line in lines] == [
        ((1.0, 8.0), (0.125, 1.0), rate, 2) for rate in (None, 1e-3)
    ]
    assert report.same_ratio_table({"same ratio": lines}).splitlines()[2:] == [
        "| attention × 8 − MLPs / 8 | all | 2 | −0.188 [−0.250, −0.125] | 0.875 [0.250, 1.500] |",
        "| attention × 8 − MLPs / 8 | 0.001 | 2 | −0.188 (−0.250 to −0.125) | +0.875 (+0.250 to +1.500) |",
    ]


def test_the_analysis_compares_what_it_says(rng):
    """Every kind of comparison, each against scipy on the runs and outcomes that the kind is about."""

    def watched(layers, attention_gain, seed):
        early = {rule: rng.normal(size=layers).tolist() for rule in statistics.RULES}
        early["token_residual"] = rng.uniform(size=layers).tolist()
        values = {"validation": rng.normal() + layers, "token_residual": rng.uniform(size=layers).tolist()}
        return result(layers=layers, attention_gain=attention_gain, seed=seed, early=early, initial=early, **values)

    runs = [watched(layers, gain, seed) for layers in (2, 3) for gain in (0.5, 1.0, 8.0) for seed in range(4)]
    found = report.analyse([*runs, *(run | {"arm": "both", "mlp_gain": 1.0} for run in runs)], 10)
    assert (found["runs"], found["watched"], found["configurations"]) == (48, 24, 6)
    ratios = np.array([np.mean(run["early"]["paper"]) for run in runs])
    losses = np.array([run["validation"] for run in runs])
    depths = np.array([run["layers"] for run in runs])
    plain = np.array([run["attention_gain"] <= 1 for run in runs])
    every = np.ones(24, dtype=bool)
    kinds = (("pooled", every, False), ("within", every, True), ("within, plain attention", plain, True))
    kinds += (("rate 0.001", every, True),)
    for kind, chosen, relative in kinds:
        y = losses[chosen]
        if relative:
            y = np.array([loss - np.median(y[depths[chosen] == d]) for loss, d in zip(y, depths[chosen], strict=True)])
        slow = spearmanr(ratios[chosen], y).statistic
        value, low, high, _ = found[kind]["early: paper ρ: ln ρ"]["Spearman, loss"]
        assert value == pytest.approx(slow)
        assert low <= high
    assert found["sides"]["early: paper ρ"] == [(ratios < 0).sum(), (ratios > 0).sum()]
    tables = [value for value in found.values() if isinstance(value, dict) and value is not found["sides"]]
    assert sum(len(columns) for table in tables for columns in table.values() if len(table) > 1) == found["comparisons"]
    (steered, *_) = found["steering"]
    assert (steered["arm"], steered["gains"], steered["pairs"]) == ("both", "all", 24)
    assert steered["validation"] == [0.0] * 5


# Synthetic experiment.


@pytest.mark.parametrize("ratio", [0.8, 1.2])
def test_the_shared_basis_cancels_to_an_orthogonal_matrix(ratio):
    case = synthetic.Case("shared", haar=True, bulk=0.0, ratio=ratio, seed=0)
    Q = synthetic.layer(case, 64) - torch.eye(64, dtype=torch.float64)
    assert torch.linalg.norm(Q.mT @ Q - torch.eye(64)) < 1e-12
    formula = 64 * math.sqrt(math.e / (math.pi * synthetic.DEPTH))
    assert synthetic.least_rank(case, 64) == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("bulk", [0.0, 0.28])
def test_each_branch_of_the_control_has_its_own_spectrum(bulk):
    """A − I is a sum of two matrices whose Frobenius inner product of independent bases is small."""
    case = synthetic.Case("own", haar=True, bulk=bulk, ratio=3.0, seed=1)
    W = synthetic.layer(case, 96) - torch.eye(96, dtype=torch.float64)
    squares = sum(spike**2 + 95 * (bulk * spike or 0.5) ** 2 for spike in (15.0, 5.0))
    assert W.square().sum().item() == pytest.approx(squares, rel=0.15)
    assert torch.linalg.matrix_norm(W, ord=2).item() == pytest.approx(15.0, rel=0.2)


@pytest.mark.parametrize("kind", synthetic.KINDS, ids=str)
def test_least_rank_is_that_of_the_covariance(kind):
    """The paper iterates C ← A C Aᵀ and takes the entropy of the eigenvalues."""
    case = synthetic.Case(*kind, ratio=1.5, seed=2)
    A = synthetic.layer(case, 24)
    C, ranks = torch.eye(24, dtype=torch.float64), []
    for _ in range(synthetic.DEPTH):
        C = A @ C @ A.mT
        C = C / torch.linalg.matrix_norm(C, ord=2)
        shares = torch.linalg.eigvalsh(C).clamp(min=0)
        shares = shares / shares.sum()
        ranks.append(math.exp(-torch.xlogy(shares, shares).sum().item()))
    assert synthetic.least_rank(case, 24) == pytest.approx(min(ranks), rel=1e-6)


def test_results_are_sorted_by_kind_and_ratio():
    entries = {"own qr bulk=0 ratio=2 seed=0": 1.0, "own qr bulk=0 ratio=2 seed=1": 3.0}
    found = synthetic.grouped(entries)
    assert found == {"own qr bulk=0": {"2": [1.0, 3.0]}}
    assert report.synthetic_table(found).splitlines() == ["| ρ | own qr |", "| --- | --- |", "| 2 | 2.0 ± 1.4 |"]


# Training.


def test_spike_is_the_largest_rise(rng):
    losses = [5.0, *rng.normal(3.0, 0.5, size=40).tolist()]
    slow = max(losses[i] - min(losses[:i]) for i in range(10, 41))
    assert training.spike(losses) == pytest.approx(max(slow, 0.0))
    assert training.spike([float(20 - i) for i in range(20)]) == 0.0


@pytest.fixture(scope="module")
def texts():
    return training.read_texts(TINY)


def test_a_run_is_a_function_of_its_seed(texts):
    run = training.Run(2, 8.0, 1.0, 3e-3, 1)
    one, two, other = (training.train(r, TINY, texts) for r in (run, run, replace(run, seed=2)))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert one["validation"] != other["validation"]
    assert one["early"].keys() == {*statistics.RULES, "token_residual"}
    assert all(len(values) == 2 and None not in values for values in one["early"].values())
    assert one["early"] != one["initial"]


def test_gains_scale_the_ratio_at_the_start(texts):
    plain, strong = (training.train(training.Run(2, gain, 1.0, 3e-3, 0), TINY, texts)["initial"] for gain in (1.0, 8.0))
    for rule in ("circuit", "paper"):
        far = np.subtract(strong[rule], plain[rule])
        assert far == pytest.approx([math.log(8.0)] * 2, abs=0.02)


def test_a_law_that_moves_nothing_leaves_the_run_alone(texts):
    """Strong MLPs are not on the low side, so that this arm is the run without it, to the bit."""
    run = training.Run(2, 8.0, 1.0, 3e-3, 0)
    alone, low, both = (training.train(replace(run, arm=arm), TINY, texts) for arm in ("off", "low", "both"))
    same = ("validation", "spike", "largest_training", "token_residual", "log_ratio")
    assert [low[name] for name in same] == [alone[name] for name in same]
    assert low["largest_log_scale"] == 0.0
    assert both["largest_log_scale"] > 0.1
    assert both["validation"] != alone["validation"]
    assert both["initial"] is None


# The file of results.


def test_finished_work_is_kept_and_not_done_again(tmp_path, capsys):
    path, done = tmp_path / "evidence_x.json", []

    def job(key):
        return key, 1.0, lambda: done.append(key) or {"value": 1 / 3, "missing": None}

    evidence.work(evidence.Results(path, {"width": 1}), [job("b")])
    path.with_suffix(".part").write_text('{"recipe": {"wid')  # what an interrupted write leaves
    evidence.work(evidence.Results(path, {"width": 1}), [job("a"), job("b")])
    assert done == ["b", "a"]
    entry = {"value": 0.333333, "missing": None}
    assert json.loads(path.read_text())["entries"] == {"a": entry, "b": entry}
    assert "1 of 2 done" in capsys.readouterr().out


def test_results_of_another_recipe_are_refused(tmp_path):
    path = tmp_path / "evidence_x.json"
    evidence.Results(path, {"width": 1}).add("a", 1.0)
    with pytest.raises(SystemExit, match=r"holds \{'width': 1\}, this is \{'width': 2\}: choose another --out"):
        evidence.Results(path, {"width": 2})


def test_rounding_keeps_structure():
    assert evidence.rounded({"a": [1.23456789, None, True, 3], "b": (1e-9 / 3,)}) == {
        "a": [1.23457, None, True, 3],
        "b": [3.33333e-10],
    }


def test_the_grid_has_every_twin():
    runs = evidence.grid(quick=False)
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    assert {replace(run, arm="off").key for run in runs} <= set(keys)


# The report.


def test_tables_go_between_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: one -->\nold\n<!-- end: one -->\nafter\n")
    report.fill(page, {"one": "new"})
    report.fill(page, {"one": "newer"})
    assert page.read_text() == "before\n<!-- begin: one -->\nnewer\n<!-- end: one -->\nafter\n"
    with pytest.raises(SystemExit, match=r"has no place for the table 'two': expected <!-- begin: two --> …"):
        report.fill(page, {"two": "new"})


def test_cells_show_the_interval_and_what_survives():
    assert report.cell(-0.5, -0.75, 0.25) == "−0.50 [−0.75, 0.25]"
    assert report.cell(0.5, 0.25, 0.75, True) == "**0.50 [0.25, 0.75]**"
    assert report.cell(math.nan, 0.0, 0.0, False) == "–"


@pytest.mark.slow
def test_everything_runs_and_goes_on_where_it_was_stopped(tmp_path):
    """The whole experiment, tiny; then again with some of its results gone."""
    command = [sys.executable, str(ROOT / "benchmarks" / "evidence.py"), "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*options):
        done = subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed, path = run(), tmp_path / "evidence_training.json"
    assert "evidence_training.json: 0 of 30 done" in printed
    assert "| rate | arm | pairs / configurations | Δ validation loss | Δ spike |" in printed
    whole = json.loads(path.read_text())
    analysis = json.loads((tmp_path / "evidence_statistics.json").read_text())
    assert (analysis["runs"], analysis["watched"], analysis["configurations"]) == (30, 6, 3)
    for name in ("synthetic", "prediction", "steering"):
        assert (tmp_path / f"evidence_{name}.png").read_bytes().startswith(b"\x89PNG")

    kept = {key: entry for key, entry in whole["entries"].items() if not key.endswith("seed=1 low")}
    path.write_text(json.dumps(whole | {"entries": kept}))
    assert "evidence_training.json: 27 of 30 done" in run("--only", "training")
    again = json.loads(path.read_text())["entries"]
    assert {k: e | {"seconds": 0} for k, e in again.items()} == {
        k: e | {"seconds": 0} for k, e in whole["entries"].items()
    }

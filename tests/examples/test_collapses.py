"""The analysis of `benchmarks/collapses.py`: which signals tell that a training fails, where the answer is known."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lightning_spectral import Measurement
from lightning_spectral.alarms import rules
from lightning_spectral.alarms.quality import QUALITY
from lightning_spectral.records import FunctionalMeasurement, LayerMeasurement, OutputMeasurement, WeightSignals

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import collapses_report as report
import collapses_signals as signals
import collapses_statistics as statistics

SPLIT = statistics.Split(frozenset({"one", "two"}), frozenset({0, 2}))


def layer(index, mlp=1.0, residual=0.5, stack="layers", **values):
    functional = FunctionalMeasurement(update_ratio=mlp / 2, attention_logit=10.0 * mlp)
    weights = WeightSignals(mlp_change=mlp / 10, attention_change=0.05, mlp_stable_rank=4.0 + index)
    plain = {"typical_token_residual": residual, "sample_residual": residual / 2, "stream_rms": 1.0}
    return LayerMeasurement(
        index, f"{stack}.{index}", mlp, 1.0, functional=functional, weights=weights, **(plain | values)
    )


def series(*rows):
    output = OutputMeasurement(sample_residual=0.3)
    return [Measurement(10 * place, "circuit", tuple(row), output=output) for place, row in enumerate(rows)]


def training(steps, **values):
    plain = {"losses": [4.0] * steps, "gradients": [1.0] * steps, "chance": 2.0}
    return plain | values


def run(case="one", twin="sick", seed=0, verdict=None, token=0.5, **values):
    """A condensed run whose only signals are the token residual at steps 0 and 10, and the output residual at first."""
    found = {"token residual, last blocks": [0.6, token], "output residual": [0.4, None]}
    verdict = ("tokens" if twin == "sick" else "") if verdict is None else verdict
    plain = {"case": case, "twin": twin, "seed": seed, "verdict": verdict, "fails_by": "tokens", "shown": 110}
    plain |= {"truth": [[0, 0.6, 0.5, None, True], [10, token, 0.5, None, True]], "losses": [2.0, 1.0]}
    return plain | {"measured": [0, 10], "signals": found, "events": []} | values


# When a failure shows.


def test_a_loss_that_falls_shows_nothing():
    falling = [0.99 ** (step / 25) for step in range(240)]
    assert statistics.loss_shows(falling) is None
    assert statistics.loss_shows([1.0] * 99) is None


def test_a_loss_that_stalls_shows_it_after_two_windows():
    assert statistics.loss_shows([1.0] * 240) == 100
    late = [*np.linspace(10, 1, 150), *[1.0] * 100]
    first = next(k for k in range(100, 251) if np.mean(late[k - 50 : k]) >= 0.99 * np.mean(late[k - 100 : k - 50]))
    assert statistics.loss_shows(late) == first > 200


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_shows_it_at_once(bad):
    assert statistics.loss_shows([2.0, 1.0, bad, 1.0]) == 3


def test_it_happens_at_the_first_look_that_shows_it():
    truth = [[0, 0.5, 0.5, None, True], [10, 0.009, 0.5, None, True], [20, 0.5, 0.005, 3.0, True]]
    truth += [[30, None, None, None, False]]
    assert statistics.happening(truth) == 10
    ways = ("tokens", "samples", "weights", "logits", "still")
    assert [statistics.happening(truth, way) for way in ways] == [10, 20, 30, None, None]
    assert statistics.happening([[0, 0.5, 0.5, 101.0, True]], "logits") == 0
    assert statistics.happening(truth[:1]) is None


# Scores and thresholds.


def test_a_score_is_the_worst_so_far_and_larger_where_worse():
    steps, values = [0, 10, 20], [3.0, None, 1.0]
    assert statistics.score(steps, values, 10, low=False) == 3.0
    assert statistics.score(steps, values, math.inf, low=True) == -1.0
    assert statistics.score(steps, values, math.inf, low=False, latest=True) == 1.0
    assert math.isnan(statistics.score([0], [None], 10, low=True))


def test_a_threshold_is_the_extreme_with_a_margin():
    assert statistics.threshold([1.0, 2.0], low=False) == pytest.approx(2.2)
    assert statistics.threshold([1.1, 2.0], low=True) == pytest.approx(1.0)
    assert statistics.threshold([], low=True) is None


def test_telling_takes_a_value_beyond_the_threshold():
    steps, values = [0, 10, 20], [1.0, None, 0.5]
    assert statistics.told(steps, values, 0.6, low=True) == 20
    assert statistics.told(steps, values, 0.5, low=True) is None
    assert statistics.told(steps, values, 0.9, low=False) == 0


# Areas.


def test_areas_are_those_of_scikit_learn_without_the_missing():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(40, 3)).astype(float)
    scores[:5, 1] = math.nan
    label, clusters = rng.random(40) < 0.5, np.repeat(np.arange(8), 5)
    value, low, high = statistics.areas(scores, label, clusters, 200)
    for column in range(3):
        here = ~np.isnan(scores[:, column])
        assert value[column] == pytest.approx(roc_auc_score(label[here], scores[here, column]))
    assert (low < value).all()
    assert (value < high).all()


def test_areas_within_a_case_do_not_see_differences_between_cases():
    label = np.array([True, False] * 3)
    clusters = np.repeat([0, 1, 2], 2)
    scores = np.array([[2.0, 1.0], [1.0, 1.0], [12.0, 11.0], [11.0, math.nan], [102.0, 5.0], [101.0, 4.0]])
    assert statistics.areas_within(scores, label, clusters, 50)[0] == pytest.approx([1.0, 0.75])
    assert statistics.areas(scores, label, clusters, 50)[0][0] < 0.7


def test_a_column_without_both_classes_has_no_area():
    scores = np.array([[1.0, math.nan], [2.0, 1.0]])
    found = statistics.areas(scores, np.array([True, False]), np.array([0, 1]), 20)
    assert found[0][0] == 0.0
    assert np.isnan(np.array(found)[:, 1]).all()


def test_a_median_resamples_cases():
    runs = [{"case": case} for case in ("a", "a", "b")]
    value, low, high = statistics.median_of([1.0, 1.0, 9.0], runs, 100)
    assert (value, low, high) == (1.0, 1.0, 9.0)


# What a run is.


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "fails"),
        ({"fails_by": "loss", "verdict": "loss"}, "control"),
        ({"verdict": ""}, "left out"),
        ({"twin": "healthy"}, "healthy"),
        ({"twin": "healthy", "verdict": "tokens"}, "healthy"),
        ({"twin": "healthy", "verdict": "loss tokens"}, "left out"),
    ],
)
def test_labels(values, expected):
    assert statistics.label_of(run(**values)) == expected


def test_what_is_held_out():
    parts = [SPLIT.part(run(case, seed=seed)) for case, seed in (("one", 0), ("one", 1), ("three", 0))]
    assert parts == ["for rules", "held-out seeds", "held-out cases"]


@pytest.mark.parametrize(
    ("last", "losses", "expected"),
    [
        ([0.5, 0.5, math.nan, True], [1.5, 1.0], ""),
        ([0.04, 0.5, math.nan, True], [1.5, 1.0], "tokens"),
        ([math.nan, math.nan, math.nan, False], [1.5, math.nan], "weights loss"),
        ([0.6, 0.6, math.nan, True], [1.5, 1.5], "still loss"),  # as at the start, to the bit
    ],
)
def test_the_verdict_is_that_of_the_register(last, losses, expected):
    values = {"case": "vit_high_rate", "losses": losses, "truth": [[0, 0.6, 0.6, math.nan, True], [10, *last]]}
    assert signals.verdict_of(values) == expected


# Signals.


def test_every_signal_has_its_own_name_and_every_rule_its_way():
    names = [signal.name for signal in signals.SIGNALS]
    assert len(set(names)) == len(names)
    assert {rule.name for rule in rules.RULES} <= report.WAYS.keys()


def test_signals_are_the_worst_over_the_blocks():
    blocks = [layer(0, mlp=0.5, residual=0.01), layer(1, mlp=4.0, residual=0.4), layer(0, 1.0, 0.3, stack="others")]
    found = signals.signals_of(series(blocks), training(0, paper=[[0, 0.2, 3.0]]))
    expected = {"circuit ρ, lowest": 0.5, "circuit ρ, highest": 4.0, "circuit ρ, largest |ln ρ|": 1.39}
    expected |= {"paper ρ, lowest": 0.2, "paper ρ, highest": 3.0, "update ratio, highest": 2.0}
    expected |= {"token residual, last blocks": 0.3, "sample residual, smallest": 0.005, "output residual": 0.3}
    expected |= {"stable rank, MLP": 4.0, "operator change, large": 0.4, "attention logit": 40.0}
    assert {name: found[name] for name in expected} == {name: [value] for name, value in expected.items()}
    assert not {"logit bound", "gradient norm", "loss / first loss", "alignment of neighbours"} & found.keys()


def test_a_ratio_changes_from_the_median_of_the_measurements_3_to_5():
    ratios = [9.0, 9.0, 1.0, 2.0, 4.0, 2.0, 6.0]
    found = signals.signals_of(series(*([layer(0, mlp=ratio)] for ratio in ratios)), training(60))
    assert found["circuit ρ, change of ln ρ"] == [None] * 5 + [0.0, signals.three_digits(math.log(3))]


def test_a_signal_sees_only_the_past():
    measured = series([layer(0)], [layer(0)], [layer(0)])
    losses, gradients = [8.0] * 10 + [4.0] * 10 + [99.0], [1.0] * 15 + [math.inf, math.nan] + [99.0] * 4
    found = signals.signals_of(measured, training(20, losses=losses, gradients=gradients))
    assert found["loss / first loss"] == [None, 1.0, 0.5]
    assert found["loss / chance"] == [None, 4.0, 2.0]
    assert found["gradient norm"] == [None, 1.0, signals.LARGEST]


def test_condensed_numbers_are_json():
    values = [signals.three_digits(value) for value in (None, math.nan, math.inf, -math.inf, 0.0123456, 0.0)]
    assert values == [None, None, 3.4e38, -3.4e38, 0.0123, 0.0]
    json.dumps(values, allow_nan=False)


def test_events_are_those_of_the_rules_today():
    measured = series(*([layer(0, residual=0.001 if step > 1 else 0.5, sample_residual=1e-6)] for step in range(5)))
    assert ("tokens_collapsed", "failure", 30, 20) in signals.events_of(measured)


# The report.


@pytest.fixture
def runs():
    event = [["tokens_collapsed", "failure", 10, 0]]
    return [
        run(seed=0, token=0.001, events=event),
        run(seed=2, token=0.02),
        run(twin="healthy", token=0.022),
        run("two", "healthy", token=0.3),
        run(seed=1, token=0.001, events=event),
        run(twin="healthy", seed=1, token=0.4, events=event),
        run("three", token=0.5),
        run("three", "healthy", token=0.001),
        run("three", "healthy", seed=2, verdict="loss"),
        run("four", fails_by="loss", verdict="loss", token=0.2),
    ]


def row(table, *start):
    return next(line for line in table.splitlines() if line.startswith("| " + " | ".join(start))).split(" | ")


def test_thresholds_come_from_healthy_runs_for_rules_alone(runs):
    table = report.thresholds_table(runs, SPLIT, 20)
    cells = row(table, "token residual, last blocks")
    assert cells[1:5] == ["< 0.02", "1 of 2", "1 of 2", "1 of 2"]  # 0.022 / 1.1, which 0.02 is not below
    assert cells[5] == "100 [100, 100]; 1"
    assert cells[6:] == ["0 of 1", "1 of 1", "0 of 1 |"]
    assert row(table, "the loss's own rule")[2:5] == ["2 of 2", "2 of 2", "2 of 2"]


def test_rules_are_judged_by_part(runs):
    table = report.rules_table(runs, SPLIT, 20)
    assert row(table, "tokens_collapsed", "held out")[2:6] == ["1 of 2", "1 of 2", "1 of 2", "0 of 1"]
    assert row(table, "tokens_collapsed", "for rules")[6] == "0 (0 to 0); 1"
    assert row(table, "samples_collapsed", "held out")[2] == "–"
    assert row(table, "tokens_collapsing", "for rules")[2:4] == ["0 of 2", "1 of 2"]
    assert '"tokens_collapsed": Quality(1, 2, 1, 2),' in report.quality(runs, SPLIT)


def test_errors_have_names(runs):
    lines = report.errors(runs, SPLIT).splitlines()
    line = next(line for line in lines if line.startswith("* `tokens_collapsed`"))
    assert line == (
        "* `tokens_collapsed` missed: one sick 2 (for rules), three sick 0 (held-out cases). "
        "False: one healthy 1 at step 10 (held-out seeds)."
    )


def test_everything_is_written_from_the_condensed_runs(runs, tmp_path):
    path = tmp_path / "collapses.jsonl"
    path.write_text("\n".join(map(json.dumps, runs)))
    read = report.read(path, lambda run: True)
    written = report.tables(read, SPLIT, 20)
    assert "Left out: three healthy 2 (loss)." in written["collapses, runs"]
    assert row(written["collapses, areas"], "token residual, last blocks")[1:3] == ["low", "8"]
    assert "token residual, last blocks (1 of 2)" in written["collapses, negative"]
    page = report.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- begin: {name} -->\n" in page and f"<!-- end: {name} -->\n" in page for name in written)
    report.picture(read).savefig(tmp_path / "collapses.png")
    assert report.tables([], SPLIT, 20)["collapses, errors"].startswith("* `not_finite` missed: none. False: none.")


def test_the_package_says_of_its_rules_what_the_runs_show():
    runs = report.read(report.RESULTS / "collapses.jsonl", lambda run: True)
    shown = report.quality(runs, report.read_split(report.RESULTS / "failures_split.json"))
    lines = [f'"{name}": Quality{astuple(quality)},' for name, quality in QUALITY.items()]
    assert [line.strip() for line in shown.splitlines()[1:-1]] == lines

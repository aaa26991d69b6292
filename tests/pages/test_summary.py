"""The summary of a report answers: is the run healthy; if not, where, since when, by which branch, what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import action, measurements, ratio, steered_run

from lightning_spectral.alarms import Event
from lightning_spectral.alarms.advice import ADVICE
from lightning_spectral.pages.facts import facts_of
from lightning_spectral.pages.findings import summary_of
from lightning_spectral.pages.stays import STEADY, branch_that_moved, returned, stays
from lightning_spectral.pages.summary import Finding, Summary
from lightning_spectral.pages.tables import Table, norms_table
from lightning_spectral.pages.timeline import since_stopped, stopped, timeline
from lightning_spectral.records import LayerMeasurement, Measurement
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logged import NOTHING, Curve, Logged

ZONE = (0.5, 2.0)


def run_of(*ratios: Sequence[float | None], every: int = 10, **fields: Any) -> History:
    """Return a run of blocks with the given ratios, made by the MLP; tokens are measured."""
    seen = {"token_residual": 0.6, "typical_token_residual": 0.6}
    items = tuple(
        Measurement(
            every * k,
            "circuit",
            tuple(LayerMeasurement(b, f"blocks.{b}", row[k], None if row[k] is None else 1.0, **seen)
                  for b, row in enumerate(ratios)),
        )
        for k in range(len(ratios[0]))
    )  # fmt: skip
    return replace(History({}, items), **fields)


def texts(summary: Summary) -> str:
    return " ".join(finding.text for finding in summary.findings)


def slow_stay(series: Sequence[float]) -> tuple[int, bool]:
    """Return where the last stay above 2 began, and whether the end is steady: step by step, as a person would."""
    began: int | None = None
    for place, value in enumerate(series):
        if began is None and value >= 2:
            began = place
        elif began is not None and value <= 1.8:
            began = None
    assert began is not None
    calm = 0
    for value in reversed(series):
        if abs(math.log(value / series[-1])) > math.log(1.1):
            break
        calm += 1
    return began, calm >= 3


def test_a_stay_is_what_a_person_would_see():
    rng = np.random.default_rng(0)
    told = set()
    for _ in range(300):
        series = np.exp(rng.normal(scale=rng.choice([0.02, 0.1, 0.4]), size=12).cumsum() + 0.7)
        if series[-1] < 2:
            assert bool(stays(run_of(list(series)), ZONE)) is bool(series[-1] <= 0.5)
            continue
        (stay,) = stays(run_of(list(series)), ZONE)
        began, steady = slow_stay(list(series))
        assert stay.since == (None if began == 0 else 10 * began)
        assert (stay.steady is not None) is steady
        told.add((stay.since is None, steady))
    assert len(told) == 4
    assert math.exp(STEADY) == pytest.approx(1.1)


def test_a_run_upside_down_stays_on_the_other_side():
    series = [1.0, 2.5, 1.9, 3.0, 4.0]
    (above,), (below,) = (stays(run_of(rows), ZONE) for rows in (series, [1 / value for value in series]))
    assert (above.side, below.side) == ("above", "below")
    assert (above.since, above.steady, above.excess) == pytest.approx((below.since, below.steady, below.excess))
    assert above.since == 10  # 1.9 is no return


def test_a_block_outside_has_a_sentence_with_its_branches():
    items = []
    for step, mlp, attention in ((0, 1.0, 1.0), (20, 8.0, 2.0), (40, 24.0, 3.2), (60, 24.0, 3.2), (240, 24.0, 3.2)):
        items.append(Measurement(step, "circuit", (LayerMeasurement(0, "model.blocks.0", mlp, attention),)))
    history = History({}, tuple(items))
    (stay,) = stays(history, ZONE)
    assert str(stay) == (
        "Block 0 (model.blocks.0): above since step 20, steady for 200 steps, ρ = 7.5; its MLP grew ×24, its attention "
        "grew ×3.2."
    )
    assert branch_that_moved(stay) == "MLP"
    (row,) = norms_table(items[-1], (stay,)).rows
    assert row[5:] == ("since step 20, steady for 200 steps", "MLP", "above the safe zone")
    moving = stays(run_of([1.0, 2.1, 3.0, 4.0, 6.0]), ZONE)[0]
    assert "still rising (×2.86 in the last 30 steps)" in str(moving)


@pytest.mark.parametrize(
    ("mlp", "attention", "branch"),
    [(9.0, 3.0, "MLP"), (1.0, 0.25, "attention"), (2.0, 0.5, "both"), (1.0, 1.0, "neither")],
)
def test_the_branch_that_moved_a_ratio(mlp: float, attention: float, branch: str):
    start = 3.0 if branch == "neither" else 1.0
    layers = [LayerMeasurement(0, "a", start * norms[0], norms[1]) for norms in ((1.0, 1.0), (mlp, attention))]
    history = History({}, tuple(Measurement(k, "circuit", (layer,)) for k, layer in enumerate(layers)))
    assert branch_that_moved(stays(history, ZONE)[0]) == branch


def test_blocks_that_came_back_are_told_apart():
    history = run_of([1.0, 3.0, 3.0, 1.0, 1.0], [1.0] * 5, [1.0, 1.0, 1.0, 1.0, 3.0])
    assert list(returned(history, ZONE)) == [(0, 30)]
    text = texts(summary_of(history, NOTHING))
    assert "1 of 3 blocks ends outside the safe zone (0.5, 2). That is information, not a fault." in text
    assert "Outside before, and back inside: block 0 since step 30." in text


@pytest.mark.parametrize(
    ("history", "logged", "level", "verdict", "advice"),
    [
        (run_of([1.0, 1.2]), NOTHING, "good", "Healthy: no failure and no warning.", "Nothing has to be done."),
        (run_of([1.0, 9.0]), NOTHING, "good", "Healthy", "A ratio outside asks for nothing by itself."),
        (
            run_of([1.0, 1.2], events=(Event("failure", 10, 0, (0,), "FAILURE at step 10: x", name="not_finite"),)),
            NOTHING,
            "failure",
            "The run has failed: since step 0, the network computes with numbers that are not finite.",
            "Try this first: go back to the last good checkpoint",
        ),
        (
            run_of([1.0, 1.2]),
            Logged((Curve("loss", np.arange(3.0), np.array([1.0, math.nan, math.nan])),)),
            "failure",
            "The run has failed: the loss is not finite since step 1.",
            "Try this first: go back to the last good checkpoint",
        ),
        (run_of([1.0, None]), NOTHING, "warning", "Something broke: 1 block cannot be measured any more.", "Try this"),
        (
            run_of([1.0, 1.2], events=(Event("warning", 10, 0, (0,), "y", name="logits_exploding"),)),
            NOTHING,
            "warning",
            "No failure was seen, but 1 warning stands.",
            "Try this first: restart with a norm on queries and keys",
        ),
        (
            History({}, tuple(measurements(("a",), tokens=False)[:1])),
            NOTHING,
            "information",
            "No failure was seen. Tokens were not measured, so a collapse would not show.",
            "Measure tokens too",
        ),
    ],
    ids=range(7),
)
def test_the_verdict_comes_first_and_advice_last(
    history: History, logged: Logged, level: str, verdict: str, advice: str
):
    summary = summary_of(history, logged)
    assert summary.verdict.level == level
    assert summary.verdict.text.startswith(verdict)
    assert summary.advice[0].text.startswith(advice)
    levels = [finding.level for finding in summary.findings if finding.level in ("failure", "warning")]
    assert levels == sorted(levels)  # failures before warnings
    assert [finding.level for finding in summary.findings][: len(levels)] == levels  # and both before the rest


def test_every_piece_of_advice_leads_to_a_heading_of_the_documentation():
    docs = Path(__file__).parents[2]
    events = tuple(Event("failure", 10, 0, (0,), name, name=name) for name in ADVICE)
    bound = History({"rescaler": {"bounds": [0.5, 2.0]}}, run_of([1.0, 3.0, 4.0, 5.0, 6.0]).measurements)
    held = replace(bound.measurements[-1], layers=(replace(bound.measurements[-1].layers[0], mlp_scale=0.5),))
    bound = replace(bound, measurements=(*bound.measurements[:-1], held))
    runs = [replace(bound, events=events), bound, run_of([1.0, 1.2]),
            History({}, tuple(measurements(("a",), tokens=False)))]  # fmt: skip
    places = {advice.place for history in runs for advice in summary_of(history, NOTHING).advice}
    assert len(places) >= len(ADVICE) + 5
    for place in places:
        page, _, anchor = place.partition("#")
        titles = [line.lstrip("# ") for line in (docs / page).read_text().splitlines() if line.startswith("#")]
        anchors = {title.lower().replace(" ", "-").replace(",", "") for title in titles}
        assert anchor in anchors, place


def test_what_is_over_is_no_failure_any_more():
    failure = Event("failure", 10, 0, (0,), "x", name="tokens_collapsed")
    over = Event("note", 20, 20, (), "the tokens are apart again", name="tokens_collapsed_over")
    summary = summary_of(run_of([1.0] * 4, events=(failure, over)), NOTHING)
    assert summary.verdict == Finding("information", "Nothing is wrong at the end. What went wrong before is over.")
    assert "A failure at step 10 (all tokens of a sample have become one vector) is over since step 20." in texts(
        summary
    )


# Steering.


def steered(scales: Sequence[float], ratios: Sequence[float], header: Mapping[str, Any]) -> History:
    items = tuple(
        Measurement(10 * k, "circuit", (LayerMeasurement(0, "a", value, 1.0, 1 / scale, scale),))
        for k, (scale, value) in enumerate(zip(scales, ratios, strict=True))
    )
    return History({"rescaler": header}, items)


def test_a_controller_at_its_bounds_is_the_first_thing_that_is_said():
    scales, ratios = [1.0, 0.5, 0.26, 0.25, 0.25], [0.1, 0.2, 0.3, 0.3, 0.3]
    history = steered(scales, ratios, {"bounds": [0.25, 4.0]})
    assert stopped(history).tolist() == [[False, False, True, True, True]]
    assert since_stopped(history) == {0: 20}
    summary = summary_of(history, NOTHING)
    assert summary.verdict.level == "warning"
    assert summary.findings[0].text == (
        "1 of 1 block stays outside, with scales at the bounds (0.25, 4.0) since step 20: block 0."
    )
    assert "ResidualRescaler(bounds=…)" in summary.advice[0].text
    for inside in ([*ratios[:-1], 0.6], [1.0] * 5):
        assert since_stopped(steered(scales, inside, {"bounds": [0.25, 4.0]})) == {}
    for header in ({}, {"bounds": None}, {"bounds": [0, 4]}, {"bounds": [0.25, 4.0], "dry_run": True}):
        assert not stopped(steered(scales, ratios, header)).any()


def test_a_block_that_the_ceiling_law_leaves_outside_is_told_in_the_words_of_that_law():
    """Its settings have no bounds. It does no more for a block without an action, or for one at its floor."""
    header = {"law": "GainCeiling", "warmup_steps": 10}
    ratios = [9.0, 9.0, 9.0, 9.0, 9.0]
    lowered = action(10, 0) | {"reason": "MLP outside the safe zone less its margin: 9, limit 4"}
    floored = action(30, 0) | {"reason": "MLP outside the safe zone less its margin, lowered to its floor: 4, limit 3"}
    history = replace(steered([1.0] * 5, ratios, header), actions=(lowered, floored))
    assert stopped(history).tolist() == [[False, False, True, True, True]]  # warm-up, an action that goes on
    summary = summary_of(history, NOTHING)
    assert summary.verdict.level != "warning"
    assert (
        "1 of 1 block stays outside, and the controller leaves that so since step 20: block 0. GainCeiling raises no "
        "branch. It lowers none below its floor and, in a trained model, none below its norm at the start."
    ) in texts(summary)
    assert "bounds" not in texts(summary)
    assert any(advice.text.endswith("GainCeiling(floor=…).") for advice in summary.advice)
    just_left = steered([1.0] * 3, [1.0, 1.0, 9.0], header)  # the law did not act on the last measurement
    moving = replace(history, actions=tuple(lowered | {"step": step} for step in (10, 20, 30)))
    assert stopped(just_left).tolist() == [[False, False, False]]
    assert stopped(moving).tolist() == [[False, False, False, False, False]]
    for other in (just_left, moving, steered([1.0] * 5, ratios, header | {"dry_run": True})):
        assert since_stopped(other) == {}


def test_a_run_that_the_ceiling_law_steers_is_not_advised_to_try_it():
    events = (Event("warning", 10, 0, (0,), "x", name="tokens_collapsing"),)
    for header, tries in (({}, True), ({"rescaler": {"law": "GainCeiling"}}, False)):
        advice = summary_of(replace(run_of([1.0, 1.2]), header=header, events=events), NOTHING).advice
        assert ("auto_rescale=True" in advice[0].text) is tries
        assert advice[0].text.startswith("Try this first: restart with ")


def test_one_measurement_of_a_steered_run_tells_nothing_of_its_law():
    assert since_stopped(steered([1.0], [9.0], {"law": "GainCeiling", "warmup_steps": 0})) == {}


def test_actions_are_added_up(tmp_path: Path):
    history = History.read(steered_run(tmp_path / "spectral.jsonl"))
    text = "The controller moved scales of 2 blocks in 3 actions, from step 40 to step 60."
    assert text in texts(summary_of(history, NOTHING))
    once = replace(history, actions=tuple(item for item in history.actions if item["step"] == 60))
    assert "2 blocks in 2 actions, at step 60." in texts(summary_of(once, NOTHING))
    dry = replace(history, header={"rescaler": {"dry_run": True}})
    told = texts(summary_of(dry, NOTHING))
    assert "The controller would have moved" in told
    assert "Scales end" not in told  # there are none
    idle = replace(history, actions=())
    assert "The controller was on and moved no scale." in texts(summary_of(idle, NOTHING))


def test_one_block_and_one_look_at_the_tokens_are_told_in_the_singular():
    text = texts(summary_of(run_of([1.0, 1.2]), NOTHING))
    assert "The block ends inside the safe zone (0.5, 2)." in text
    text = texts(summary_of(run_of([1.0, 1.2], [1.0, 1.1]), NOTHING))
    assert "All 2 blocks end inside the safe zone (0.5, 2)." in text
    told = "Token residual behind block 0: 0.6 at step 0; never below 0.01, where tokens count as one vector."
    assert told in texts(summary_of(run_of([1.0]), NOTHING))


def test_what_the_controller_begins_and_cannot_do_are_events():
    held = {"reason": "held by the bounds of the scales, ratio too low"}
    low = {"reason": "ratio too low"}
    floor = {"reason": "MLP outside the safe zone less its margin, lowered to its floor: 4, limit 3"}
    actions = [action(10, 0) | low, action(10, 1) | low, action(20, 0) | low, action(20, 1) | held,
               action(40, 0) | low, action(40, 1) | held, action(50, 0) | floor]  # fmt: skip
    events = timeline(run_of([1.0] * 6, [1.0] * 6, actions=tuple(actions)))
    assert [(event.step, event.message) for event in events] == [
        (10, "controller begins to steer, ratio too low: blocks 0–1"),
        (20, "the bounds of the scales stop the controller: block 1"),
        (40, "controller begins to steer, ratio too low: block 0"),
        (50, "the controller has come to a floor, or to a norm at the start: block 0"),
    ]


# The list of events.


def test_events_in_a_table_have_no_prefix_and_every_block():
    rows = [[1.0, 3.0]] * 6 + [[1.0, 0.1]]
    message = "step 10: block 0 (blocks.0) is above the zone at 3; and 3 more. The zone is (0.5, 2); to leave it is"
    crossed = Event("note", 10, 10, tuple(range(7)), message, name="ratio_crossed")
    advice = ("Try this first: go back (docs/x.md#y)", "Try: go back. docs/x.md#y")  # of early releases, and of now
    failed = [Event("failure", 10, 10, (0,), f"FAILURE at step 10: it broke. {text}") for text in advice]
    texts = [event.message for event in timeline(run_of(*rows, events=(crossed, *failed)))]
    listed = ", ".join(f"{block} (ρ = 3)" for block in range(6))
    assert texts == [
        f"above the safe zone: blocks {listed}; below the safe zone: block 6 (ρ = 0.1)",
        "it broke",
        "it broke",
    ]


def test_columns_of_numbers_are_told_from_columns_of_words():
    table = Table("t", ("a", "b", "c", "d"), (("1", "1.5e−07", "x", "–"), ("2,000", "–", "3", "–")))
    assert table.numeric == (True, True, False, False)
    assert Table("t", ("a",), ()).numeric == (True,)


# Tokens and facts.


def test_the_witness_of_the_tokens_is_told():
    text = texts(summary_of(History({}, tuple(measurements(("a", "b")))), NOTHING))
    smallest = 0.5 * math.exp(-5 - 0.1)
    assert f"Token residual behind block 1: 0.17 at step 10, {smallest:.2g} at step 60, smallest {smallest:.2g}" in text
    assert "; below 0.01, where tokens count as one vector." in text
    short = texts(summary_of(History({}, tuple(measurements(("a", "b"))[:3])), NOTHING))
    assert "never below 0.01" in short


def test_jacobians_have_no_zone():
    items = [replace(item, linearization="jacobian") for item in measurements(("a", "b"))]
    text = texts(summary_of(History({}, tuple(items)), NOTHING))
    assert "No safe zone is known for ratios of Jacobians." in text
    assert "outside" not in text


def test_of_many_blocks_the_farthest_have_sentences_and_the_rest_a_list():
    names = tuple(f"b{index}" for index in range(40))
    summary = summary_of(History({}, tuple(measurements(names))), NOTHING)
    blocks = [finding.text for finding in summary.findings if finding.text.startswith("Block ")]
    assert len(blocks) == 12
    assert blocks[0].startswith("Block 39 (b39): above since step 10, still rising")
    assert f"ρ = {ratio(39, 6):.4g}" in blocks[0]
    assert "Nearer to the safe zone, and outside too: blocks 0–1, 3–27." in texts(summary)


def test_the_facts_of_a_run():
    items = tuple(replace(item, seconds=0.5) for item in measurements(("a",))[:3])
    header = {"model": {"name": "GPT", "parameters": 3_010_000}, "versions": {"python": "3.12.1", "torch": "2.13.0"}}
    began = 1_750_000_000.0
    facts = dict(facts_of(History(header, items, times={0: began, 10: began + 60, 20: began + 7500})))
    assert facts == {
        "model": "GPT, 3.01 M parameters, 1 block",
        "measured": "3 times, steps 0 to 20, linearization “circuit”",
        "date": "2025-06-15 15:06 to 17:11 UTC",
        "duration": "2 h 5 min",
        "cost of measuring": "1.5 s, 500 ms a measurement (0.013 % of the duration)",
        "versions": "python 3.12.1, torch 2.13.0",
    }
    earlier = facts_of(History({}, items))
    assert [name for name, _ in earlier] == ["model", "measured", "cost of measuring"]
    for strange in ({"model": 3}, {"model": {"name": [1], "parameters": "x"}}, {"versions": [1]}, {"versions": {}}):
        assert dict(facts_of(History(strange, items)))["model"]

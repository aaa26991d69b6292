"""The control law: numbers in, decisions out. The plant is the real one: ln ρ = weights + mlp - attention."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from lightning_spectral.control.actions import news
from lightning_spectral.control.band import BlockState, ResidualRescaler, check_zones, decide
from lightning_spectral.control.law import Action, Reading
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import LayerMeasurement, Measurement

ZONE = (0.5, 2.0)
SHARP = ResidualRescaler(smoothing=0.0, patience=1)  # decides on each measurement alone
CASES = 2000


class Plant:
    """One block, measured exactly, whose scales a controller moves."""

    def __init__(self, log_ratio: float, mlp: float = 0.0, attention: float = 0.0) -> None:
        self.weights, self.mlp, self.attention = log_ratio - mlp + attention, mlp, attention
        self.states: tuple[BlockState, ...] = ()
        self.step = 0

    @property
    def log_ratio(self) -> float:
        return self.weights + self.mlp - self.attention

    def measure(self, rescaler: ResidualRescaler, noise: float = 0.0) -> Action | None:
        """Let the law see one measurement and do what it says."""
        reading = Reading(self.log_ratio + noise, self.mlp, self.attention)
        actions, self.states = decide(rescaler, ZONE, self.step, [reading], self.states)
        self.step += 10
        if not actions:
            return None
        if not rescaler.dry_run:
            self.mlp += actions[0].mlp
            self.attention += actions[0].attention
        return actions[0]

    def changes(self, rescaler: ResidualRescaler, measurements: int) -> list[float]:
        """Return what each of some measurements does to ln ρ."""
        actions = [self.measure(rescaler) for _ in range(measurements)]
        return [0.0 if action is None else action.mlp - action.attention for action in actions]


def only(
    rescaler: ResidualRescaler, reading: Reading, state: BlockState | None = None, step: int = 100
) -> tuple[Action | None, BlockState]:
    """Decide about one block."""
    actions, (after,) = decide(rescaler, ZONE, step, [reading], [] if state is None else [state])
    return (actions[0] if actions else None), after


# By hand: ln 8 = 2.0794, ln 2 = 0.6931, ln 1.4 = 0.3365


@pytest.mark.parametrize(
    ("settings", "changes", "end"),
    [
        # default: one measurement of patience, four steps at the limit (half of 0.8794 is 0.4397 still), half of 0.4794
        ({}, [0, -0.4, -0.4, -0.4, -0.4, -0.2397, 0, 0, 0], 0.2397),
        # a quarter: 1.6794 / 4 is above the limit, from 1.2794 on each action leaves three quarters of the error
        (
            {"gain": 0.25},
            [0, -0.4, -0.4, -0.31986, -0.23990, -0.17992, -0.13494, -0.10121, 0, 0],
            0.30362,
        ),
        # without a limit: 2.0794 · (1/2)³ = 0.2599
        ({"max_step": 10.0, "patience": 4}, [0, 0, 0, -1.0397, -0.5199, -0.2599, 0, 0], 0.2599),
        # all at once
        ({"gain": 1.0, "max_step": 10.0, "patience": 1}, [-2.0794, 0, 0], 0.0),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_a_block_at_eight_with_fixed_weights(
    settings: dict[str, Any], changes: list[float], end: float, smoothing: float
):
    """The average follows what the law does, so that smoothing changes nothing where the weights do not move."""
    plant = Plant(math.log(8))
    assert plant.changes(ResidualRescaler(smoothing=smoothing, **settings), len(changes)) == pytest.approx(
        changes, abs=6e-5
    )
    assert plant.log_ratio == pytest.approx(end, abs=6e-5)
    assert plant.mlp == pytest.approx(-plant.attention)


def test_each_action_leaves_the_same_part_of_the_error():
    rescaler = ResidualRescaler(gain=0.3, max_step=9.0, patience=1)
    plant = Plant(-3.0)
    errors = [plant.log_ratio]
    while plant.measure(rescaler) is not None:
        errors.append(plant.log_ratio)
    parts = [after / before for before, after in pairwise(errors)]
    assert parts == pytest.approx([0.7] * 6)  # 3 · 0.7⁶ = 0.3529, and ln 0.7 = -0.3567
    assert errors[-2] < math.log(0.7) < errors[-1]


def test_an_action_says_which_block_why_and_whether_it_begins():
    readings = [Reading(0.0, 0.0, 0.0), Reading(2.0, 0.0, 0.0), Reading(-2.0, 0.0, 0.0)]
    actions, states = decide(SHARP, ZONE, 10, readings, [])
    assert [(action.block, action.reason, action.begins) for action in actions] == [
        (1, "ratio too high", True),
        (2, "ratio too low", True),
    ]
    assert [action.log_ratio for action in actions] == [2.0, -2.0]
    again, _ = decide(SHARP, ZONE, 20, readings, states)
    assert [action.begins for action in again] == [False, False]


# Properties


def settings_of(source: random.Random, **fixed: Any) -> ResidualRescaler:
    inner, bound = source.uniform(1.05, 1.95), source.uniform(1.1, 8.0)
    chosen = {
        "gain": source.uniform(0.01, 1.0),
        "max_step": source.choice([source.uniform(0.01, 1.0), 50.0]),
        "patience": source.randint(1, 4),
        "smoothing": source.choice([0.0, source.uniform(0.0, 0.99)]),
        "inner_zone": (1 / inner, inner),
        "mode": source.choice(["both", "mlp", "attention"]),
        "sides": source.choice(["both", "low", "high"]),
        "bounds": (1 / bound, bound),
        "dry_run": source.random() < 0.2,
    }
    return ResidualRescaler(**chosen | fixed)


def cases(seed: int, **fixed: Any) -> Iterator[tuple[ResidualRescaler, Reading, BlockState]]:
    """Yield settings with symmetric zones, and what the law may meet with them: scales on both sides of the bounds."""
    source = random.Random(seed)
    for _ in range(CASES):
        smoothed = source.choice([None, source.gauss(0.0, 1.5)])
        state = BlockState(smoothed, source.randint(0, 4), source.random() < 0.5, source.random() < 0.3)
        yield (
            settings_of(source, **fixed),
            Reading(source.gauss(0.0, 1.5), source.gauss(0.0, 1.0), source.gauss(0.0, 1.0)),
            state,
        )


def test_mirrored_readings_give_mirrored_changes():
    acted = 0
    for rescaler, reading, state in cases(1):
        assert reading.log_ratio is not None
        assert reading.mlp is not None
        assert reading.attention is not None
        action, after = only(rescaler, reading, state)
        mirrored, mirrored_after = only(
            replace(rescaler, sides={"low": "high", "high": "low"}.get(rescaler.sides, "both")),
            Reading(-reading.log_ratio, -reading.mlp, -reading.attention),
            replace(state, smoothed=None if state.smoothed is None else -state.smoothed),
        )
        assert mirrored_after.smoothed == pytest.approx(-after.smoothed)
        assert replace(mirrored_after, smoothed=0.0) == replace(after, smoothed=0.0)
        assert (action is None) == (mirrored is None)
        if action is not None and mirrored is not None:
            acted += action.moves
            assert (mirrored.mlp, mirrored.attention) == pytest.approx((-action.mlp, -action.attention))
            assert (mirrored.held, mirrored.begins) == (action.held, action.begins)
    assert acted > CASES / 10


def test_branches_are_equals():
    """Which branch is called MLP makes no difference but the sign of ln ρ."""
    swap: dict[Any, Any] = {"mlp": "attention", "attention": "mlp", "low": "high", "high": "low", "both": "both"}
    for rescaler, reading, state in cases(2):
        assert reading.log_ratio is not None
        action, _ = only(rescaler, reading, state)
        swapped, _ = only(
            replace(rescaler, mode=swap[rescaler.mode], sides=swap[rescaler.sides]),
            Reading(-reading.log_ratio, reading.attention, reading.mlp),
            replace(state, smoothed=None if state.smoothed is None else -state.smoothed),
        )
        assert (action is None) == (swapped is None)
        if action is not None and swapped is not None:
            assert (swapped.mlp, swapped.attention) == pytest.approx((action.attention, action.mlp))


def test_nothing_moves_inside_the_inner_zone():
    for rescaler, reading, state in cases(3):
        inside = math.log(rescaler.inner_zone[1]) * (0.999 if state.active else -0.999)
        action, after = only(rescaler, replace(reading, log_ratio=inside), replace(state, smoothed=inside))
        assert action is None
        assert after == BlockState(after.smoothed)
        assert after.smoothed == pytest.approx(inside)


def test_a_step_is_limited_and_goes_towards_balance():
    for rescaler, reading, state in cases(4):
        action, _ = only(rescaler, reading, state)
        if action is not None:
            change = action.mlp - action.attention
            assert abs(change) <= min(rescaler.max_step, rescaler.gain * abs(action.log_ratio)) + 1e-12
            assert change * action.log_ratio <= 0


def test_scales_stay_inside_the_bounds_and_never_move_further_out():
    outside = 0
    for rescaler, reading, state in cases(5):
        action, _ = only(rescaler, reading, state)
        if action is None:
            continue
        low, high = map(math.log, rescaler.bounds)
        for before, change in ((reading.mlp, action.mlp), (reading.attention, action.attention)):
            assert before is not None
            after = before + change
            outside += not low <= before <= high
            assert min(before, low) - 1e-12 <= after <= max(before, high) + 1e-12
    assert outside > CASES / 10


def test_the_geometric_mean_of_both_scales_stays_also_at_a_bound():
    held = 0
    for rescaler, reading, state in cases(6, mode="both"):
        action, _ = only(rescaler, reading, state)
        if action is not None:
            held += action.held and action.moves
            assert action.mlp == -action.attention
    assert held > CASES / 100


def test_one_scale_moves_where_one_is_asked_for():
    for mode, still in (("mlp", "attention"), ("attention", "mlp")):
        for rescaler, reading, state in cases(7, mode=mode):
            action, _ = only(rescaler, replace(reading, **{still: None}), state)
            assert action is None or getattr(action, still) == 0.0
            assert only(rescaler, reading, state)[0] == action  # the other scale is not even looked at


def test_the_guard_lets_the_mlp_give_way_alone_while_tokens_fall():
    guarded, falling = only(SHARP, Reading(2.0, 0.0, 0.0, tokens_fall=True))
    free, _ = only(SHARP, Reading(2.0, 0.0, 0.0))
    assert guarded is not None
    assert free is not None
    assert (guarded.mlp, guarded.attention) == (free.mlp, 0.0)
    assert (free.mlp, free.attention) == (-0.2, 0.2)
    assert guarded.reason == "ratio too high, attention not raised because the token residual falls"
    assert guarded.refused
    again, _ = only(SHARP, Reading(2.0, 0.0, 0.0, tokens_fall=True), falling)
    assert again is not None
    assert (again.mlp, again.attention) == (-0.2, 0.0)
    assert not again.refused  # said once


def test_the_guard_does_nothing_where_attention_is_lowered_or_left_alone_or_the_guard_is_off():
    for rescaler, log_ratio in (
        (SHARP, -2.0),
        (replace(SHARP, mode="mlp"), 2.0),
        (replace(SHARP, mode="mlp"), -2.0),
        (replace(SHARP, mode="attention"), -2.0),
        (replace(SHARP, guard=False), 2.0),
    ):
        readings = [Reading(log_ratio, 0.0, 0.0, tokens_fall=fall) for fall in (False, True)]
        free, guarded = (only(rescaler, reading)[0] for reading in readings)
        assert free == guarded
        assert free is not None


def test_the_guard_holds_a_law_that_moves_attention_only_and_says_so_once():
    rescaler, state, told = replace(SHARP, mode="attention"), None, []
    for fall in (True, True, False, True, True):
        action, state = only(rescaler, Reading(2.0, 0.0, 0.0, tokens_fall=fall), state)
        told.append(None if action is None else (action.attention, action.refused))
    assert told == [(0.0, True), None, (0.4, False), (0.0, True), None]


@pytest.mark.parametrize(("sides", "sign"), [("low", -1), ("high", 1)])
def test_the_other_side_is_left_alone(sides: str, sign: int):
    for rescaler, reading, state in cases(8, sides=sides):
        action, after = only(rescaler, reading, state)
        assert after.smoothed is not None
        if action is not None:
            assert action.log_ratio * sign > 0
        elif after.smoothed * sign < 0:
            assert (after.outside, after.active) == (0, False)


def test_equal_numbers_give_equal_decisions_and_nothing_is_modified():
    for rescaler, reading, state in cases(9):
        given = ([reading, reading], [state])
        kept = copy.deepcopy(given)
        assert decide(rescaler, ZONE, 5, *given) == decide(copy.deepcopy(rescaler), ZONE, 5, *kept)
        assert given == kept


def test_a_state_survives_a_checkpoint():
    for rescaler, reading, state in cases(10):
        restored = BlockState.from_dict(json.loads(json.dumps(state.to_dict())))
        assert restored == state
        assert only(rescaler, reading, restored) == only(rescaler, reading, state)


def test_a_state_of_another_version_is_read_as_far_as_it_goes():
    assert BlockState.from_dict({}) == BlockState()
    assert BlockState.from_dict({"outside": 3, "mood": "good"}) == BlockState(outside=3)


# When it acts


def test_it_acts_only_after_patience_in_a_row():
    rescaler = replace(SHARP, patience=3)
    plant = Plant(1.0)
    assert plant.changes(rescaler, 2) == [0.0, 0.0]
    plant.weights = 0.5  # inside the safe zone, although outside the inner one: counting begins anew
    assert plant.changes(rescaler, 1) == [0.0]
    assert plant.states[0].outside == 0
    plant.weights = 1.0
    assert plant.changes(rescaler, 3) == [0.0, 0.0, -0.4]


def test_between_the_zones_it_goes_on_but_does_not_begin():
    plant = Plant(0.5)
    assert plant.changes(SHARP, 3) == [0.0, 0.0, 0.0]
    plant.weights = 0.8
    assert plant.changes(SHARP, 2) == pytest.approx([-0.4, -0.2])  # the second from 0.4, between the zones
    plant.weights += 0.35  # from 0.2 to 0.55: it rests there
    assert plant.changes(SHARP, 3) == pytest.approx([-0.275, 0.0, 0.0])


def test_the_edges_of_the_zones_are_outside():
    assert only(SHARP, Reading(math.log(2.0), 0.0, 0.0))[0] is not None
    assert only(SHARP, Reading(math.log(1.999), 0.0, 0.0))[0] is None
    steered = BlockState(None, 0, active=True)
    assert only(SHARP, Reading(math.log(1.4), 0.0, 0.0), steered)[0] is not None
    assert only(SHARP, Reading(math.log(1.399), 0.0, 0.0), steered)[0] is None


def test_warm_up_is_silent_and_counts_nothing():
    rescaler = ResidualRescaler(patience=2, warmup_steps=30)
    plant = Plant(math.log(8))
    # measured at steps 0, 10, 20, then 30 and 40 are the patience
    assert plant.changes(rescaler, 5) == [0.0, 0.0, 0.0, 0.0, -0.4]


def test_with_a_margin_it_acts_before_the_edge():
    inside = Reading(math.log(1.7), 0.0, 0.0)
    assert only(replace(SHARP, patience=1), inside, BlockState())[0] is None
    action, _ = only(replace(SHARP, patience=1, margin=0.2), inside, BlockState())
    assert action is not None
    assert action.moves
    below = Reading(math.log(1.6), 0.0, 0.0)  # the edge is 2 / e^0.2 = 1.637
    assert only(replace(SHARP, patience=1, margin=0.2), below, BlockState())[0] is None


def test_one_outlier_does_not_steer_a_healthy_block():
    states: tuple[BlockState, ...] = ()
    for log_ratio in [0.0, math.log(100.0), 0.0, 0.0, 0.0, 0.0]:
        actions, states = decide(ResidualRescaler(), ZONE, 0, [Reading(log_ratio, 0.0, 0.0)], states)
        assert actions == ()


def test_a_block_that_was_steered_rests_during_a_later_warm_up():
    state = BlockState(smoothed=2.0, outside=5, active=True)
    action, after = only(replace(SHARP, warmup_steps=101), Reading(2.0, 0.0, 0.0), state)
    assert action is None
    assert (after.outside, after.active) == (0, False)


def test_crumbs_that_are_left_to_a_bound_are_not_worth_a_move():
    near = Reading(2.0, -math.log(4.0) + 4e-4, 0.0)
    action, _ = only(SHARP, near, BlockState(smoothed=2.0, outside=5, active=True))
    assert action is not None
    assert not action.moves
    assert math.copysign(1.0, action.attention) == 1.0  # and no negative zero in the journal


@pytest.mark.parametrize("log_ratio", [None, math.nan, math.inf, -math.inf])
def test_what_was_not_measured_moves_nothing_and_is_not_remembered(log_ratio: float | None):
    for rescaler, reading, state in cases(11):
        assert only(rescaler, replace(reading, log_ratio=log_ratio), state) == (None, state)


def test_an_unmeasured_block_does_not_disturb_the_others():
    readings = [Reading(None, 0.0, 0.0), Reading(2.0, 0.0, 0.0), Reading(2.0, None, 0.0)]
    actions, states = decide(SHARP, ZONE, 0, readings, [])
    assert [action.block for action in actions] == [1]
    assert [state.smoothed for state in states] == [None, 2.0 - 0.4, 2.0]


@pytest.mark.parametrize(
    ("mode", "missing"), [("both", "mlp"), ("both", "attention"), ("mlp", "mlp"), ("attention", "attention")]
)
def test_without_its_scale_nothing_moves_and_the_average_goes_on(mode: str, missing: str):
    for rescaler, reading, state in cases(12, mode=mode):
        action, after = only(rescaler, replace(reading, **{missing: None}), state)
        assert action is None
        assert reading.log_ratio is not None
        past = reading.log_ratio if state.smoothed is None else state.smoothed
        assert after.smoothed == pytest.approx(past + (1 - rescaler.smoothing) * (reading.log_ratio - past))


def test_a_dry_run_tells_what_it_would_do_and_does_not_believe_that_it_was_done():
    rescaler = ResidualRescaler(dry_run=True)
    plant = Plant(math.log(8))
    assert plant.changes(rescaler, 5) == [0.0, -0.4, -0.4, -0.4, -0.4]
    assert plant.states[0].smoothed == pytest.approx(math.log(8))
    for settings, reading, state in cases(13, dry_run=False):
        wet, _ = only(settings, reading, state)
        dry, after = only(replace(settings, dry_run=True), reading, state)
        assert dry == wet
        assert dry is None or after.smoothed == dry.log_ratio


# Bounds


def test_a_bound_cuts_the_step_and_is_told_once():
    """From ρ = 8, scales between 3/4 and 4/3 take away 2 ln(4/3) = 0.5754, and no more."""
    rescaler = replace(SHARP, bounds=(3 / 4, 4 / 3))
    plant = Plant(math.log(8))
    first, second, *rest = [plant.measure(rescaler) for _ in range(6)]
    assert first is not None
    assert second is not None
    assert first.mlp - first.attention == pytest.approx(-0.4)
    assert not first.held
    assert second.mlp - second.attention == pytest.approx(-0.1754, abs=6e-5)
    assert second.held
    assert second.reason == "held by the bounds of the scales, ratio too high"
    assert rest == [None] * 4
    assert (plant.mlp, plant.attention) == pytest.approx((math.log(3 / 4), math.log(4 / 3)))


def test_a_scale_that_stands_at_its_bound_is_told_once():
    plant = Plant(math.log(8), mlp=math.log(0.25), attention=0.3)
    first, *rest = [plant.measure(SHARP) for _ in range(4)]
    assert first is not None
    assert (first.held, first.begins, first.moves) == (True, True, False)
    assert rest == [None] * 3


def test_a_bound_is_told_once_also_where_the_optimizer_pulls_the_scale_off_it():
    rescaler = replace(SHARP, bounds=(3 / 4, 4 / 3))
    plant = Plant(math.log(8))
    told = []
    for _ in range(8):
        action = plant.measure(rescaler)
        assert action is not None
        assert action.moves
        layer = LayerMeasurement(0, "b.0", math.exp(plant.log_ratio), 1.0)
        told.append(news([action], Measurement(plant.step, "circuit", (layer,)), dry_run=False) is not None)
        plant.mlp += 0.01  # weight decay, or a gradient
        plant.attention -= 0.01
    assert told == [True, True] + [False] * 6  # that it begins, that it is held


def test_a_bound_that_held_once_is_told_again_when_it_holds_again():
    rescaler = replace(SHARP, bounds=(3 / 4, 4 / 3))
    plant = Plant(math.log(8))
    plant.changes(rescaler, 4)
    plant.weights = 0.0
    assert plant.measure(rescaler) is not None  # too low now: free to move back
    plant.weights = math.log(8)
    action = plant.measure(rescaler)
    assert action is not None
    assert action.held
    assert plant.measure(rescaler) is None


# Closed loop


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("start", [8.0, 1 / 8, 32.0])
def test_a_noisy_block_comes_inside_and_stays_with_few_actions(start: float, seed: int):
    """The weights wander and the measurement is noisy; the block has to be inside after 20 measurements."""
    source = random.Random(seed)
    plant = Plant(math.log(start))
    ratios, actions = [], 0
    for _ in range(200):
        plant.weights += source.gauss(0.0, 0.01)
        actions += plant.measure(ResidualRescaler(bounds=(1 / 16, 16.0)), noise=source.gauss(0.0, 0.05)) is not None
        ratios.append(plant.log_ratio)
    assert max(map(abs, ratios[20:])) < math.log(2)
    assert actions < 20


def test_a_steady_pull_is_held_inside_the_zone():
    """Weights that grow by 0.02 a measurement are met by an action now and then, not by one each time."""
    plant = Plant(0.0)
    actions = 0
    for _ in range(300):
        plant.weights += 0.02
        actions += plant.measure(ResidualRescaler(bounds=(1e-3, 1e3))) is not None
        assert abs(plant.log_ratio) < math.log(2) + 0.1  # patience and smoothing cost a few measurements
    assert 10 < actions < 60


# Settings


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("gain", [0, 0.0, -0.5, 1.0001, math.nan, math.inf, "0.5", None, True]),
        ("max_step", [0, -0.4, math.nan, math.inf, "0.4", None, True]),
        ("patience", [0, -1, 1.0, "2", None, True]),
        ("smoothing", [-0.1, 1, 1.0, math.nan, math.inf, "0.5", None, False]),
        ("margin", [-0.1, math.nan, math.inf, "0.2", None, True]),
        ("inner_zone", [(0.7,), (1.4, 0.7), (0, 1.4), (0.7, math.inf), (1.1, 1.4), (0.7, 0.9), (1, 2), None, 1, "ab"]),
        ("mode", ["all", "MLP", None, 1, ("mlp",)]),
        ("sides", ["left", "", None, True]),
        ("bounds", [(4.0, 0.25), (-1.0, 4.0), (0.25, math.nan), (2.0, 4.0), (0.25, 0.5), (0.5, 1.0), None, 4.0]),
        ("warmup_steps", [-1, 0.5, "10", None, True]),
        ("dry_run", [0, 1, "no", None]),
        ("learnable", [0, 1, "yes", None]),
    ],
)
def test_a_bad_setting_is_named(field: str, values: list[Any]):
    for value in values:
        with pytest.raises(ConfigurationError, match=rf"^{field}=.*: expected "):
            ResidualRescaler(**{field: value})


def test_the_limits_of_the_settings_are_allowed_and_lists_become_tuples():
    rescaler = ResidualRescaler(gain=1, smoothing=0, patience=1, inner_zone=[0.8, 1.25], bounds=[0.5, 2])  # type: ignore[arg-type]
    assert (rescaler.inner_zone, rescaler.bounds) == ((0.8, 1.25), (0.5, 2.0))
    assert hash(rescaler) == hash(replace(rescaler))


@pytest.mark.parametrize("safe", [(0.7, 2.0), (0.5, 1.4), (0.8, 1.2), (0.9, 5.0)])
def test_an_inner_zone_that_reaches_the_safe_zone_is_refused(safe: tuple[float, float]):
    with pytest.raises(ConfigurationError, match=r"^inner_zone=\(0\.7, 1\.4\): expected .* inside safe_zone=\("):
        check_zones(ResidualRescaler(), safe)


def test_a_margin_counts_in_the_zones():
    with pytest.raises(
        ConfigurationError, match=r"expected an interval inside safe_zone=\(0\.5, 2\.0\) less margin=0\.4"
    ):
        check_zones(ResidualRescaler(margin=0.4), (0.5, 2.0))


def test_zones_one_inside_the_other_are_fine():
    check_zones(ResidualRescaler(), ZONE)
    narrow = ResidualRescaler(inner_zone=(0.9, 1.1))
    check_zones(narrow, (0.8, 1.25))
    with pytest.raises(ConfigurationError, match=r"inside safe_zone=\(0\.9, 1\.1\)"):
        check_zones(narrow, (0.9, 1.1))

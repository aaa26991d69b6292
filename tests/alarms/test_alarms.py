"""Events: what is info, what is a warning, and that an alarm takes two witnesses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import pytest

from lightning_spectral.alarms import Event, Memory, falling_tokens, observe
from lightning_spectral.alarms.rules import COLLAPSED
from lightning_spectral.records import LayerMeasurement, Measurement

HEALTHY = [0.9, 0.8, 0.75, 0.7, 0.68, 0.66]  # token residual over depth
COLLAPSING = [0.4, 0.2, 0.12, 0.08, 0.05, 0.03]
GONE = [0.1, 0.05, 0.02, 0.01, 0.008, 0.005]


def measured(step: int, ratios: Sequence[float | None], residuals: Sequence[float | None] = ()) -> Measurement:
    known = [*residuals, *[None] * (len(ratios) - len(residuals))]
    layers = tuple(
        LayerMeasurement(index, f"b.{index}", ratio, 1.0, token_residual=r, typical_token_residual=r)
        for index, (ratio, r) in enumerate(zip(ratios, known, strict=True))
    )
    return Measurement(step, "circuit", layers)


class Watched:
    """A run, measured every ten steps."""

    def __init__(self) -> None:
        self.memory, self.step = Memory(), 0
        self.events: list[Event] = []

    def see(
        self, ratios: Sequence[float | None], residuals: Sequence[float | None] = (), times: int = 1
    ) -> list[Event]:
        """Measure the same some times over and return what was said."""
        said: list[Event] = []
        for _ in range(times):
            events, self.memory = observe(self.memory, measured(self.step, ratios, residuals))
            said += events
            self.step += 10
        self.events += said
        return said

    def levels(self) -> list[str]:
        return [event.level for event in self.events]


# Info


def test_a_block_that_starts_inside_says_nothing():
    assert Watched().see([1.0, 0.6]) == []


def test_a_crossing_is_said_once_with_block_value_and_side():
    run, told = Watched(), []
    for ratio in (1.0, 3.0, 4.0, 0.1, 1.0, 1.0):
        told += [(event.level, event.step, event.blocks, event.message) for event in run.see([ratio])]
    assert told == [
        ("info", 10, (0,), "spectral ratio, step 10, zone (0.5, 2): block 0 (b.0) is above the zone at 3"),
        ("info", 30, (0,), "spectral ratio, step 30, zone (0.5, 2): block 0 (b.0) is below the zone at 0.1"),
        ("info", 40, (0,), "spectral ratio, step 40, zone (0.5, 2): block 0 (b.0) is back in the zone at 1"),
    ]


@pytest.mark.parametrize(("ratio", "side"), [(0.5, -1), (2.0, 1), (0.5001, 0), (1.9999, 0)])
def test_the_edges_are_outside_as_in_the_summary(ratio: float, side: int):
    run = Watched()
    run.see([ratio])
    assert run.memory.blocks[0].side == side
    assert measured(0, [ratio]).summary()["in_zone"] == (side == 0)


def test_a_block_without_a_ratio_stays_where_it_was():
    run = Watched()
    run.see([3.0])
    assert run.see([None]) == []
    assert run.memory.blocks[0].side == 1


def test_many_crossings_make_one_line():
    run = Watched()
    run.step = 7
    (event,) = run.see([3.0] * 96)
    assert event.message.startswith("spectral ratio, step 7, zone (0.5, 2): block 0 (b.0) is above the zone at 3; ")
    assert event.message.endswith("; and 92 more")
    assert "\n" not in event.message
    assert len(event.blocks) == 96


# Warning


def test_a_block_that_settled_outside_and_stays_there_is_no_reason_to_warn():
    run = Watched()
    run.see([4.0, 1.0], times=40)
    assert run.levels() == ["info"]


def test_a_block_that_drifts_away_from_where_it_had_settled_is_warned_of_once():
    run = Watched()
    run.see([4.0, 1.0], times=15)  # a hundred steps that are passed over, then the baseline
    run.see([5.9, 1.0], times=5)  # less than half as much again
    assert run.levels() == ["info"]
    run.see([6.1, 1.0], times=10)
    assert run.levels() == ["info", "warning"]
    warning = run.events[-1]
    assert (warning.blocks, warning.since, warning.step) == ((0,), 0, 210)  # the median of three, two of them new
    assert (
        "block 0 (b.0) at 6.1, outside since step 0, had settled at 4, times 1.05 since step 140. " in warning.message
    )
    assert warning.message.startswith("spectral WARNING, step 210, zone (0.5, 2): ")
    assert warning.message.endswith(
        "No alarm: ratios alone do not show a collapse; tokens were not measured (geometry=True). If the loss suffers "
        "too, try a smaller learning rate or a longer warm-up"
    )
    assert run.memory.drifting == {0}


def test_a_warning_is_repeated_only_after_the_block_has_come_back():
    run = Watched()
    run.see([4.0], times=15)
    for ratio in (7.0, 5.5, 7.0):  # 5.5 is more than half the way: still the same event
        run.see([ratio], times=4)
    assert run.levels().count("warning") == 1
    run.see([4.0], times=4)
    assert not run.memory.drifting
    run.see([7.0], times=4)
    assert run.levels().count("warning") == 2


def test_blocks_that_drift_one_after_the_other_are_told_of_when_they_have_doubled():
    run = Watched()
    run.see([4.0] * 8, times=15)
    for drifting in range(1, 9):
        run.see([7.0] * drifting + [4.0] * (8 - drifting), times=3)
    warnings = [event for event in run.events if event.level == "warning"]
    assert [len(event.blocks) for event in warnings] == [1, 2, 4, 8]


def test_the_first_hundred_steps_and_measurements_are_no_baseline():
    often, rarely = Watched(), Watched()
    for measurement in range(50):  # every two steps: settled from step 100 on
        often.step = 2 * measurement
        often.see([2.1 + 0.1 * measurement])
    assert often.memory.blocks[0].settled == ()
    for measurement in range(5):  # every thousand steps: settled from the sixth measurement on
        rarely.step = 1000 * measurement
        rarely.see([2.1])
    assert rarely.memory.blocks[0].settled == ()
    rarely.see([2.1], times=20)
    assert list(rarely.memory.blocks[0].settled) == pytest.approx([math.log(2.1)] * 5)


@pytest.mark.parametrize(("settled", "later"), [(1.0, 1.9), (4.0, 2.5), (0.3, 0.45), (1.0, 2.2)])
def test_inside_back_towards_the_zone_or_too_short_is_no_drift(settled: float, later: float):
    run = Watched()
    run.see([settled], times=15)
    run.see([later], times=2 if later == 2.2 else 8)
    assert "warning" not in run.levels()


def test_a_block_that_jumps_from_side_to_side_stays_on_none():
    run = Watched()
    run.see([1.0], times=15)
    for ratio in (9.0, 0.1) * 8:
        run.see([ratio])
    assert set(run.levels()) == {"info"}


# Alarm


@pytest.mark.parametrize(
    ("ratio", "residuals", "levels"),
    [
        (1.0, HEALTHY, []),
        (1.0, COLLAPSING, []),  # one witness
        (1.0, GONE, ["warning"]),  # tokens that are one vector are told of, whatever does it
        (0.1, HEALTHY, ["info"]),  # the other witness
        (0.1, COLLAPSING, ["info", "alarm"]),
        (0.1, GONE, ["info", "warning", "alarm"]),  # the ratio has to stay outside for three measurements
        (9.0, HEALTHY, ["info"]),
        (9.0, COLLAPSING, ["info"]),  # a dominating MLP does not average tokens
        (9.0, GONE, ["info", "warning", "alarm"]),
    ],
)
def test_an_alarm_takes_two_witnesses(ratio: float, residuals: list[float], levels: list[str]):
    run = Watched()
    run.see([ratio] * 6, residuals, times=20)
    assert run.levels() == levels


def test_an_alarm_says_where_since_when_and_what_to_try():
    run = Watched()
    run.see([1.0] * 6, HEALTHY)
    run.see([1.0, 0.1, 0.2, 1.0, 1.0, 1.0], COLLAPSING, times=3)
    alarm = run.events[-1]
    assert (alarm.level, alarm.step, alarm.since, alarm.blocks) == ("alarm", 30, 10, (1, 2))
    assert alarm.message == (
        "spectral ALARM, step 30, zone (0.5, 2): tokens become one vector: token residual 0.4 behind block 0, 0.03 "
        "behind block 5 (0.66 at step 0). In 2 of 6 blocks attention outweighs the MLP: block 1 (b.1) at 0.1; block 2 "
        "(b.2) at 0.2. Try a smaller learning rate or a longer warm-up, balance_init_ before training, or "
        "auto_rescale=True"
    )


def test_a_fall_over_training_is_forecast_and_alarms_before_it_arrives():
    run, alarm, step = Watched(), None, 0
    while alarm is None:
        last = 0.8 * 0.8**step  # reaches 0.02 after 16.5 measurements
        alarm = next((event for event in run.see([0.2] * 2, [0.9, last]) if event.level == "alarm"), None)
        step += 1
    assert 0.8 * 0.8 ** (step - 1) > COLLAPSED
    assert alarm.forecast is not None
    assert alarm.forecast.at == pytest.approx(10 * math.log(COLLAPSED / 0.8) / math.log(0.8))
    assert alarm.forecast.earliest <= alarm.forecast.at + 1e-9
    assert f"collapsed by step {alarm.forecast.at:.0f}" in alarm.message


def test_a_slow_fall_is_not_soon():
    run = Watched()
    for measurement in range(20):
        run.see([0.2] * 2, [0.9, 0.8 * 0.98**measurement])
    assert "alarm" not in run.levels()


def test_one_bad_batch_is_no_alarm():
    run = Watched()
    run.see([0.1] * 6, HEALTHY, times=8)
    run.see([0.1] * 6, GONE)
    run.see([0.1] * 6, HEALTHY, times=8)
    assert "alarm" not in run.levels()


def test_an_alarm_is_said_once_and_its_end_once():
    run = Watched()
    run.see([0.1] * 6, COLLAPSING, times=10)
    assert run.levels() == ["info", "alarm"]
    assert run.memory.told == "alarm"
    run.see([0.1] * 6, HEALTHY, times=10)
    assert run.levels() == ["info", "alarm", "info"]
    assert run.events[-1].message.startswith(
        "spectral, step 120, zone (0.5, 2): tokens are apart again: token residual"
    )
    assert run.memory.told is None
    run.see([0.1] * 6, COLLAPSING, times=3)
    assert run.levels()[-1] == "alarm"


def test_measurements_without_tokens_are_no_checks():
    run = Watched()
    run.see([0.1] * 6, COLLAPSING)
    run.see([0.1] * 6, times=5)
    assert run.levels() == ["info"]
    run.see([0.1] * 6, COLLAPSING)
    assert run.levels() == ["info", "alarm"]


def test_massive_activations_have_no_say():
    layers = tuple(
        LayerMeasurement(i, f"b.{i}", 0.1, 1.0, token_residual=low, typical_token_residual=high)
        for i, (low, high) in enumerate(zip(GONE, HEALTHY, strict=True))
    )
    memory, said = Memory(), []
    for step in range(10):
        events, memory = observe(memory, Measurement(step, "circuit", layers))
        said += [event.level for event in events]
    assert said == ["info"]


def test_equal_tokens_are_below_every_threshold():
    run = Watched()
    run.see([0.1] * 3, [0.0] * 3, times=5)
    assert run.levels() == ["info", "warning", "alarm"]


# Memory


def test_blocks_whose_tokens_fall_are_known_one_by_one():
    run = Watched()
    for measurement in range(6):
        run.see([1.0] * 3, [0.9, 0.8 * 0.9**measurement, 0.5 + 0.1 * (measurement % 2)])
    assert falling_tokens(run.memory) == {1}


def test_a_memory_survives_the_round_trip_at_any_moment():
    straight, resumed = Watched(), Watched()
    for measurement in range(40):
        ratio = 4.0 if measurement < 15 else 0.1
        residuals = [0.9, 0.8 * 0.85**measurement]
        straight.see([ratio, 1.0], residuals)
        resumed.see([ratio, 1.0], residuals)
        resumed.memory = Memory.from_dict(asdict(resumed.memory) | {"unknown": 1})
    assert straight.events == resumed.events
    assert straight.memory == resumed.memory
    assert {"info", "alarm"} <= set(straight.levels())


def test_the_memory_does_not_grow():
    run = Watched()
    run.see([3.0, 0.2], HEALTHY[:2], times=20)
    size = len(json.dumps(asdict(run.memory)))
    run.see([3.0, 0.2], HEALTHY[:2], times=200)
    assert len(json.dumps(asdict(run.memory))) < 1.2 * size


def test_an_event_is_plain_json():
    run = Watched()
    for measurement in range(10):
        run.see([0.2] * 2, [0.9, 0.8 * 0.7**measurement * (1 + 0.1 * (measurement % 2))])
    events = [json.loads(json.dumps(asdict(event), allow_nan=False)) for event in run.events]
    assert events[0]["forecast"] is None
    alarm = next(event for event in events if event["level"] == "alarm")
    assert set(alarm) == {"level", "step", "since", "blocks", "message", "forecast"}
    assert alarm["forecast"]["earliest"] < alarm["forecast"]["at"] < alarm["forecast"]["latest"]

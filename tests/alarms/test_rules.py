"""Events: what is a note, a warning or a failure, and what each of them says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest

from lightning_spectral.alarms import Event, Memory, falling_tokens, observe
from lightning_spectral.alarms.advice import ADVICE, WORDS
from lightning_spectral.alarms.quality import sureness
from lightning_spectral.alarms.rules import FAILURES, RULES
from lightning_spectral.alarms.signs import COLLAPSED
from lightning_spectral.records import (
    FunctionalMeasurement,
    LayerMeasurement,
    Measurement,
    OutputMeasurement,
    WeightSignals,
)
from lightning_spectral.records.measurements import NOT_FINITE, OutputKind

HEALTHY = [0.9, 0.8, 0.75, 0.7, 0.68, 0.66]  # token residual over depth
COLLAPSING = [0.4, 0.2, 0.12, 0.08, 0.05, 0.03]
GONE = [0.1, 0.05, 0.02, 0.01, 0.008, 0.005]
ZONE = "The safe zone is (0.5, 2); outside is information"


def measured(
    step: int,
    ratios: Sequence[float | None],
    residuals: Sequence[float | None] = (),
    *,
    samples: float | None = None,
    output: OutputMeasurement | None = None,
) -> Measurement:
    known = [*residuals, *[None] * (len(ratios) - len(residuals))]
    layers = tuple(
        LayerMeasurement(
            index,
            f"b.{index}",
            ratio,
            1.0,
            token_residual=r,
            typical_token_residual=r,
            sample_residual=None if r is None else samples,
            stream_rms=None if r is None else 1.0,
        )
        for index, (ratio, r) in enumerate(zip(ratios, known, strict=True))
    )
    return Measurement(step, "circuit", layers, output=output)


class Watched:
    """A run, measured every ten steps."""

    def __init__(self) -> None:
        self.memory, self.step = Memory(), 0
        self.events: list[Event] = []

    def see(
        self, ratios: Sequence[float | None], residuals: Sequence[float | None] = (), times: int = 1, **beside: Any
    ) -> list[Event]:
        """Measure the same some times over and return what was said."""
        said: list[Event] = []
        for _ in range(times):
            said += self.take(measured(self.step, ratios, residuals, **beside))
        return said

    def take(self, measurement: Measurement) -> tuple[Event, ...]:
        events, self.memory = observe(self.memory, measurement)
        self.events += events
        self.step += 10
        return events

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    def levels(self) -> list[str]:
        return [event.level for event in self.events]


# Notes on ratios


def test_a_block_that_starts_inside_says_nothing():
    assert Watched().see([1.0, 0.6]) == []


def test_a_crossing_is_said_once_with_block_value_and_side():
    run, told = Watched(), []
    for ratio in (1.0, 3.0, 4.0, 0.1, 1.0, 1.0):
        told += [(event.level, event.step, event.blocks, event.message) for event in run.see([ratio])]
    assert told == [
        ("note", 10, (0,), f"step 10: block 0 (b.0) is above the safe zone at 3. {ZONE}"),
        ("note", 30, (0,), f"step 30: block 0 (b.0) is below the safe zone at 0.1. {ZONE}"),
        ("note", 40, (0,), f"step 40: block 0 (b.0) is back in the safe zone at 1. {ZONE}"),
    ]


@pytest.mark.parametrize(("ratio", "side"), [(0.5, -1), (2.0, 1), (0.5001, 0), (1.9999, 0)])
def test_the_edges_are_outside_as_in_the_summary(ratio: float, side: int):
    run = Watched()
    run.see([ratio])
    assert run.memory.blocks[0].side == side
    assert measured(0, [ratio]).summary()["in_zone"] == (side == 0)


@pytest.mark.parametrize(
    ("zone", "ratios", "told"),
    [
        ((0.5, 2.0), [1.9, 2.0, 1.95, 2.1, 1.81, 1.8, 1.9, 2.0], [0, 1, 1, 1, 1, 0, 0, 1]),
        ((0.5, 2.0), [0.5, 0.54, 0.5, 0.56, 0.54], [-1, -1, -1, 0, 0]),
        ((0.5, 2.0), [3.0, 0.1, 3.0], [1, -1, 1]),
        ((0.98, 1.02), [1.02, 1.015, 1.0, 0.985, 0.98, 0.985, 1.0], [1, 1, 0, 0, -1, -1, 0]),
    ],
)
def test_a_block_leaves_at_an_edge_and_is_back_well_inside(
    zone: tuple[float, float], ratios: list[float], told: list[int]
):
    """A ratio that hovers at an edge is told once; the rules themselves ask for the side that it is on."""
    run, seen = Watched(), []
    for ratio in ratios:
        run.take(replace(measured(run.step, [ratio]), safe_zone=zone))
        seen.append(run.memory.blocks[0].told)
        assert run.memory.blocks[0].side == (ratio >= zone[1]) - (ratio <= zone[0])
    assert seen == told
    assert len(run.events) == sum(one != two for one, two in zip([0, *told], told, strict=False))


def test_a_memory_from_before_hysteresis_tells_no_crossing_twice():
    run = Watched()
    run.see([3.0])
    old = asdict(run.memory)
    del old["blocks"][0]["told"]
    run.memory = Memory.from_dict(old)
    assert run.see([3.0]) == []


def test_a_block_without_a_ratio_stays_where_it_was():
    run = Watched()
    run.see([3.0])
    assert run.see([None]) == []
    assert run.memory.blocks[0].side == 1


def test_many_crossings_make_one_line():
    run = Watched()
    run.step = 7
    (event,) = run.see([3.0] * 96)
    assert event.message.startswith("step 7: block 0 (b.0) is above the safe zone at 3; ")
    assert event.message.endswith(f"; and 92 more. {ZONE}")
    assert "\n" not in event.message
    assert len(event.blocks) == 96


def test_a_block_that_settled_outside_and_stays_there_does_not_drift():
    run = Watched()
    run.see([4.0, 1.0], times=40)
    assert run.names() == ["ratio_crossed"]


def test_a_block_that_drifts_away_from_where_it_had_settled_is_told_once():
    run = Watched()
    run.see([4.0, 1.0], times=15)  # a hundred steps that are passed over, then the baseline
    run.see([5.9, 1.0], times=5)  # less than half as much again
    assert run.names() == ["ratio_crossed"]
    run.see([6.1, 1.0], times=10)
    assert run.names() == ["ratio_crossed", "ratio_drifts"]
    drift = run.events[-1]
    assert (drift.level, drift.blocks, drift.since, drift.step) == ("note", (0,), 0, 210)  # the median of three
    assert drift.message == (
        "step 210: ratios move away from where they had settled: block 0 (b.0) at 6.1, outside since step 0, had "
        "settled at 4, times 1.05 since step 140. A ratio alone does not show a failure"
    )
    assert run.memory.drifting == {0}


def test_a_drift_is_told_again_only_after_the_block_has_come_back():
    run = Watched()
    run.see([4.0], times=15)
    for ratio in (7.0, 5.5, 7.0):  # 5.5 is more than half the way: still the same event
        run.see([ratio], times=4)
    assert run.names().count("ratio_drifts") == 1
    run.see([4.0], times=4)
    assert not run.memory.drifting
    run.see([7.0], times=4)
    assert run.names().count("ratio_drifts") == 2


def test_blocks_that_drift_one_after_the_other_are_told_of_when_they_have_doubled():
    run = Watched()
    run.see([4.0] * 8, times=15)
    for drifting in range(1, 9):
        run.see([7.0] * drifting + [4.0] * (8 - drifting), times=3)
    drifts = [event for event in run.events if event.name == "ratio_drifts"]
    assert [len(event.blocks) for event in drifts] == [1, 2, 4, 8]


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
    assert "ratio_drifts" not in run.names()


def test_a_block_that_jumps_from_side_to_side_stays_on_none():
    run = Watched()
    run.see([1.0], times=15)
    for ratio in (9.0, 0.1) * 8:
        run.see([ratio])
    assert set(run.names()) == {"ratio_crossed"}


# Tokens


@pytest.mark.parametrize("ratio", [0.1, 1.0, 9.0])
@pytest.mark.parametrize(
    ("residuals", "names"), [(HEALTHY, []), (GONE, ["tokens_collapsed"])], ids=["healthy", "collapsed"]
)
def test_tokens_that_are_one_vector_are_a_failure_whatever_the_ratio(
    ratio: float, residuals: list[float], names: list[str]
):
    run = Watched()
    run.see([ratio] * 6, residuals, times=20)
    assert [event.name for event in run.events if event.level == "failure"] == names


@pytest.mark.parametrize(("ratio", "names"), [(0.1, ["tokens_collapsing"]), (1.0, []), (9.0, [])])
def test_tokens_on_their_way_to_one_vector_are_a_warning_where_attention_dominates(ratio: float, names: list[str]):
    run = Watched()
    run.see([ratio] * 6, COLLAPSING, times=20)
    assert [event.name for event in run.events if event.level != "note"] == names


def test_a_collapse_is_told_at_the_second_measurement_with_what_came_before_and_what_to_try():
    run = Watched()
    run.see([1.0] * 6, HEALTHY)
    run.see([1.0] * 6, GONE, times=2)
    (failure,) = run.events
    assert (failure.level, failure.step, failure.since, failure.blocks) == ("failure", 20, 10, (5,))
    assert failure.message == (
        "FAILURE at step 20: the network gives every token the same answer. At the output of block 5 (b.5) the "
        "tokens of a sample have been nearly identical since step 10: they differ by 0.005 of their size (0.66 at step "
        "0). Try: restart with norm layers in front of attention and MLP (norm_first=True in PyTorch's layers); if "
        "they are there already, restart with auto_rescale=True where you make this monitor: factors then limit "
        "attention and MLP. "
        f"{sureness('tokens_collapsed')}More: docs/monitor.md#tokens_collapsed"
    )
    assert failure.values == pytest.approx({"token_residual": 0.005, "token_residual_before": 0.66, "step_before": 0.0})
    assert failure.advice == ("pre_norm", "ceiling", "lower_rate", "warm_up")


def test_the_ratio_explains_where_attention_outweighs_the_mlp():
    run = Watched()
    run.see([1.0, 0.1, 0.2, 1.0, 1.0, 1.0], GONE, times=2)
    assert "; attention, which averages tokens, outweighs the MLP in 2 of 6 blocks. Try: " in run.events[-1].message
    run = Watched()
    run.see([3.0] * 6, GONE, times=2)
    assert "outweighs" not in run.events[-1].message


def test_a_fall_over_training_is_forecast_and_told_before_it_arrives():
    run, warning, step = Watched(), None, 0
    while warning is None:
        last = 0.8 * 0.8**step
        warning = next((event for event in run.see([0.2] * 2, [0.9, last]) if event.level == "warning"), None)
        step += 1
    assert 0.8 * 0.8 ** (step - 1) > COLLAPSED
    assert warning.forecast is not None
    assert warning.forecast.at == pytest.approx(10 * math.log(COLLAPSED / 0.8) / math.log(0.8))
    assert warning.forecast.earliest <= warning.forecast.at + 1e-9
    assert f"at this pace they count as identical by step {warning.forecast.at:.0f}; " in warning.message


def test_a_slow_fall_is_not_soon():
    run = Watched()
    for measurement in range(20):
        run.see([0.2] * 2, [0.9, 0.8 * 0.98**measurement])
    assert set(run.levels()) == {"note"}


def test_one_bad_batch_is_no_failure():
    run = Watched()
    run.see([0.1] * 6, HEALTHY, times=8)
    run.see([0.1] * 6, GONE)
    run.see([0.1] * 6, HEALTHY, times=8)
    assert set(run.levels()) == {"note"}


def test_tokens_that_come_apart_are_no_failure():
    run = Watched()
    for residual in (0.5, 0.002, 0.004, 0.008, 0.2):  # below the threshold three times, and rising twice
        run.see([1.0] * 2, [0.9, residual])
    assert run.events == []


@pytest.mark.parametrize("every", [1, 5])
def test_tokens_that_begin_alike_and_come_apart_are_no_failure(every: int):
    """LeViT of vit-pytorch, whose biases in front of BatchNorm are in all tokens; it learns."""
    rising = [3e-9, 1.2e-6, 2.8e-6, 6e-6, 1.1e-5, 2e-5, 1e-4, 4e-4, 9e-4, 0.002, 0.004, 0.006, 0.007, 0.007, 0.008]
    alike, run = OutputMeasurement(0.001, 0.07, "sample", 10), Watched()
    for residual in rising[::every]:
        run.see([1.0] * 6, [residual] * 6, samples=residual, output=alike)
    assert run.events == []
    run.see([1.0] * 6, [1e-3] * 6, times=2, samples=1e-3, output=alike)  # a fall behind it is one
    assert run.names() == ["tokens_collapsed"]


def test_noise_of_equal_tokens_is_no_rise():
    run = Watched()
    for residual in (1e-7, 3e-7, 1e-7, 6e-7):
        run.see([1.0] * 2, [0.9, residual])
    assert run.names() == ["tokens_collapsed"]


def test_a_failure_is_said_once_and_its_end_once():
    run = Watched()
    run.see([1.0] * 6, GONE, times=10)
    assert run.names() == ["tokens_collapsed"]
    assert run.memory.is_on("tokens_collapsed")
    run.see([1.0] * 6, HEALTHY, times=10)
    assert run.names() == ["tokens_collapsed", "tokens_collapsed_over"]
    expected = "step 120: the tokens are apart again: they differ by 0.66 of their size (0.005 at step 50)"
    assert run.events[-1].message == expected
    assert not run.memory.is_on("tokens_collapsed")
    run.see([1.0] * 6, GONE, times=3)
    assert run.names()[-1] == "tokens_collapsed"
    assert run.events[-1].since == 200


def test_measurements_without_tokens_are_no_checks():
    run = Watched()
    run.see([1.0] * 6, GONE)
    run.see([1.0] * 6, times=5)
    assert run.names() == []
    run.see([1.0] * 6, GONE)
    assert run.names() == ["tokens_collapsed"]


def test_massive_activations_have_no_say():
    layers = tuple(
        LayerMeasurement(i, f"b.{i}", 0.1, 1.0, token_residual=low, typical_token_residual=high, stream_rms=1.0)
        for i, (low, high) in enumerate(zip(GONE, HEALTHY, strict=True))
    )
    run = Watched()
    for step in range(10):
        run.take(Measurement(step, "circuit", layers))
    assert set(run.levels()) == {"note"}


def test_the_last_block_of_every_stack_is_looked_at():
    run = Watched()
    collapsed = [replace(layer, name=f"encoder.{layer.index}") for layer in measured(0, [1.0] * 6, GONE)]
    healthy = [replace(layer, index=6 + layer.index) for layer in measured(0, [1.0] * 6, HEALTHY)]
    for step in (0, 10):
        run.take(Measurement(step, "circuit", (*collapsed, *healthy)))
    assert [event.blocks for event in run.events] == [(5,)]
    assert "At the output of block 5 (encoder.5)" in run.events[0].message


def test_blocks_that_mix_no_tokens_make_none_alike():
    """As a variable that is the same at all times, in a model of time series that treats each variable alone."""
    run = Watched()
    apart = measured(0, [1.0] * 3, HEALTHY[:3])
    alone = [replace(layer, index=3, name="variables.0", attention_norm=None) for layer in measured(0, [1.0], [0.0])]
    for step in (0, 10, 20):
        run.take(Measurement(step, "circuit", (*apart, *alone)))
    assert run.events == []
    run = Watched()
    mixing = [replace(layer, attention_reason="it is a token mixer") for layer in alone]
    for step in (0, 10):
        run.take(Measurement(step, "circuit", (*apart, *mixing)))
    assert [event.name for event in run.events] == ["tokens_collapsed"]


# Samples


POOLED = OutputMeasurement(0.8, 0.9, kind="sample")


def test_a_run_that_is_steered_is_not_told_to_steer():
    run = Watched()
    for step in (0, 10, 20):
        found = measured(step, [1.0] * 6, HEALTHY, samples=1e-6)
        run.take(replace(found, layers=tuple(replace(layer, mlp_scale=0.7) for layer in found.layers)))
    assert run.events[-1].name == "samples_collapsed"
    assert run.events[-1].advice == ("lower_rate", "stop_gradient")
    assert "auto_rescale" not in run.events[-1].message


@pytest.mark.parametrize("kind", ["sample", "stream"])
def test_tokens_that_are_or_may_be_pooled_may_agree(kind: OutputKind):
    pooled, run = OutputMeasurement(0.8, 0.9, kind), Watched()
    run.see([1.0] * 6, GONE, times=5, samples=0.7, output=pooled)
    run.see([0.1] * 6, COLLAPSING, times=5, samples=0.7, output=pooled)
    assert set(run.levels()) == {"note"}
    run.see([1.0] * 6, GONE, times=2, samples=1e-5, output=replace(pooled, sample_residual=1e-5))
    assert run.names()[-1] == "tokens_collapsed"
    assert ", and different samples give the same output" in run.events[-1].message


def test_samples_that_are_one_are_a_failure_though_tokens_differ():
    run = Watched()
    run.see([1.0] * 6, HEALTHY, times=2, samples=0.5, output=replace(POOLED, width=8))
    run.see([1.0] * 6, HEALTHY, times=2, samples=0.5, output=OutputMeasurement(0.004, 0.03, kind="sample", width=8))
    (failure,) = run.events
    assert (failure.name, failure.step, failure.since, failure.blocks) == ("samples_collapsed", 30, 20, ())
    assert failure.message == (
        "FAILURE at step 30: the network gives every input the same answer. Since step 20 the outputs for "
        "different samples have been nearly identical: they differ by 0.03 of their size. Try: restart with "
        "auto_rescale=True where you make this monitor: factors then limit attention and MLP. "
        f"{sureness('samples_collapsed')}More: docs/monitor.md#samples_collapsed"
    )


@pytest.mark.parametrize(
    ("samples", "output"),
    [
        (0.5, OutputMeasurement(0.004, 0.1, kind="token")),  # a language model that has learned frequencies
        (0.005, OutputMeasurement(0.004, 0.9, kind="sample")),  # a few samples of one class, and others in the batch
        (0.5, OutputMeasurement(0.004, 0.06, kind="sample", width=64)),  # a few embeddings of one class
        (0.5, OutputMeasurement(0.004, 0.004, kind="sample", width=1)),  # a number whose mean is large
        (0.5, OutputMeasurement(None, None, kind="sample", width=64)),
        (None, None),
    ],
)
def test_samples_that_are_alike_for_a_reason_are_no_failure(samples: float | None, output: OutputMeasurement | None):
    run = Watched()
    run.see([1.0] * 6, HEALTHY, times=5, samples=samples, output=output)
    assert run.events == []


def read_off(pooled: float, batch: float = 0.9) -> OutputMeasurement:
    return OutputMeasurement(0.5, batch, kind="sample", width=2, pooled_residual=pooled)


@pytest.mark.parametrize(("pooled", "batch"), [(0.005, 0.2), (5e-5, 0.9)])
def test_class_tokens_that_become_one_are_a_failure_of_a_model_with_two_outputs(pooled: float, batch: float):
    run = Watched()
    run.see([1.0] * 6, HEALTHY, times=2, samples=0.5, output=read_off(0.4))
    run.see([1.0] * 6, HEALTHY, times=2, samples=0.5, output=read_off(pooled, batch))
    (failure,) = run.events
    assert (failure.name, failure.step, failure.since, failure.blocks) == ("samples_collapsed", 30, 20, ())
    assert (
        "Since step 20 the vectors that the output is made of, such as class tokens, for different samples have been "
        f"nearly identical: they differ by {pooled:.2g} of their size"
    ) in failure.message
    run.see([1.0] * 6, HEALTHY, times=3, samples=0.5, output=read_off(0.4))
    assert run.events[-1].name == "samples_collapsed_over"
    assert run.events[-1].message.endswith(
        "different samples give different outputs again: they differ by 0.4 of their size"
    )


@pytest.mark.parametrize(
    "series",
    [
        [1e-5] * 30,  # a LayerScale of 1e-5 hides what a class token has seen, and a warm-up lasts
        [2e-5 * 1.3**n for n in range(30)],  # it comes to see
        [0.4, 0.4, 5e-5, 1e-2, 3e-2],  # a collapse that ends
        [0.4, 0.005, 0.4, 0.4, 0.4],  # one batch of one class
        [0.02] * 30,
    ],
)
def test_class_tokens_that_have_not_come_closer_are_no_failure(series: list[float]):
    run = Watched()
    for pooled in series:
        run.see([1.0] * 6, HEALTHY, samples=0.5, output=read_off(pooled, 0.1))
    assert run.events == []


def test_a_few_class_tokens_of_one_class_in_a_batch_of_several_are_no_failure():
    run = Watched()
    run.see([1.0] * 6, HEALTHY, times=2, samples=0.5, output=read_off(0.4))
    run.see([1.0] * 6, HEALTHY, times=5, samples=0.5, output=read_off(0.005, 0.9))
    assert run.events == []


def test_class_tokens_that_see_nothing_are_told_when_the_run_is_under_way():
    run = Watched()
    run.see([1.0] * 6, HEALTHY, times=20, samples=0.5, output=read_off(0.0, 0.0))
    assert [(event.name, event.step) for event in run.events] == [("samples_collapsed", 110)]


@pytest.mark.parametrize(("samples", "told"), [(1e-5, []), (1e-8, [("samples_collapsed", 110)])])
def test_a_stream_of_class_tokens_alone_may_begin_alike(samples: float, told: list[tuple[str, int]]):
    run = Watched()
    for step in range(0, 200, 10):
        (layer,) = measured(step, [1.0], [0.5], samples=samples)
        run.take(Measurement(step, "circuit", (replace(layer, token_residual=None, typical_token_residual=None),)))
    assert [(event.name, event.step) for event in run.events] == told


def test_embeddings_that_begin_alike_in_a_healthy_run_are_no_failure():
    run = Watched()
    run.see([1.0] * 6, HEALTHY, times=20, samples=0.5, output=OutputMeasurement(0.02, 0.03, kind="sample", width=1000))
    assert run.events == []


def test_a_stream_that_is_the_same_for_all_samples_is_a_failure_of_every_model():
    run = Watched()
    run.see([1.0] * 6, HEALTHY, times=2, samples=1e-6, output=OutputMeasurement(0.5, 0.9, kind="token"))
    assert [(event.name, event.blocks) for event in run.events] == [("samples_collapsed", (5,))]
    assert "Since step 0 what leaves block 5 (b.5) for different samples" in run.events[0].message


# What is not finite


def broken(measurement: Measurement, index: int, **changes: Any) -> Measurement:
    layers = [replace(layer, **changes) if layer.index == index else layer for layer in measurement]
    return replace(measurement, layers=tuple(layers))


def test_weights_that_are_not_finite_are_told_at_once_with_what_had_grown():
    run = Watched()
    for norm in (1.0, 1.1, 4.4):
        logit = FunctionalMeasurement(attention_logit=3.0)
        run.take(broken(measured(run.step, [1.0] * 3, HEALTHY[:3]), 1, mlp_norm=norm, functional=logit))
    measurement = measured(run.step, [1.0] * 3)
    run.take(
        broken(broken(measurement, 1, mlp_norm=None, mlp_reason=NOT_FINITE), 2, mlp_norm=None, mlp_reason=NOT_FINITE)
    )
    failure = run.events[-1]
    assert (failure.name, failure.step, failure.since, failure.blocks) == ("not_finite", 30, 30, (1,))
    assert failure.branch == "mlp"
    assert failure.values == {"blocks_not_finite": 2.0}
    assert failure.message.startswith(
        "FAILURE at step 30: the network computes with NaN or infinity. At step 30 the MLP of block 1 (b.1) is the "
        "first that is not finite; at step 20 everything was finite, but the norm of the MLP's weights in block 1 was "
        "4 times that of step 10"
    )


def test_nothing_may_have_grown_before():
    run = Watched()
    run.see([1.0] * 3, HEALTHY[:3], times=3)
    run.take(broken(measured(run.step, [1.0] * 3, HEALTHY[:3]), 0, stream_finite=False, stream_rms=None))
    (failure,) = run.events
    assert "At step 30 what leaves block 0 (b.0) is the first that is not finite" in failure.message
    assert "everything was finite, and nothing had grown much. " in failure.message


def test_an_output_that_is_not_finite_is_told_too_and_hides_other_failures():
    run = Watched()
    output = OutputMeasurement(None, None, finite=False)
    run.see([1.0] * 6, GONE, times=3, output=output)
    assert run.names() == ["not_finite"]
    assert "the output of the network is not finite, its blocks are" in run.events[0].message


def test_the_first_measurement_may_be_the_one_that_is_not_finite():
    run = Watched()
    run.take(broken(measured(0, [1.0]), 0, attention_norm=None, attention_reason=NOT_FINITE))
    (failure,) = run.events
    assert failure.branch == "attention"
    assert "the attention of block 0 (b.0) is the first that is not finite" in failure.message
    assert "everything was finite" not in failure.message


# What does not move


def still(step: int, *, moved: bool | None, other: bool | None = None) -> Measurement:
    signals = WeightSignals(mlp_moved=moved, attention_moved=other)
    return broken(measured(step, [1.0] * 3), 1, weights=signals)


def test_weights_that_stay_as_they_were_are_told_after_three_measurements():
    run = Watched()
    for step in (0, 10, 20, 30):
        assert run.names() == []
        run.take(still(step, moved=False, other=False))
    (failure,) = run.events
    assert (failure.level, failure.name, failure.step, failure.since) == ("failure", "nothing_moves", 30, 0)
    assert failure.message == (
        "FAILURE at step 30: no block of the network learns. None of its 2 trainable attention and MLP branches has "
        "changed since step 0, not by one bit. Try: check that the optimizer holds the parameters of the "
        f"model that is trained. {sureness('nothing_moves')}More: docs/monitor.md#nothing_moves"
    )


@pytest.mark.parametrize(("moved", "other"), [(True, False), (False, True), (None, None)])
def test_one_branch_that_moves_is_enough_and_frozen_ones_need_not(moved: bool | None, other: bool | None):
    run = Watched()
    for step in range(0, 100, 10):
        run.take(still(step, moved=moved and step > 0, other=other and step > 0))
    assert run.events == []


# Attention logits


def attending(step: int, *logits: float | None) -> Measurement:
    layers = [
        replace(layer, functional=None if logit is None else FunctionalMeasurement(attention_logit=logit))
        for layer, logit in zip(measured(step, [1.0] * len(logits)), logits, strict=True)
    ]
    return Measurement(step, "circuit", tuple(layers))


def test_logits_in_the_hundreds_are_a_warning_once():
    run = Watched()
    for logit in (2.0, 60.0, 99.0, 150.0, 300.0, 9000.0):
        run.take(attending(run.step, 3.0, logit, None))
    (warning,) = run.events
    assert (warning.level, warning.name, warning.step, warning.since) == ("warning", "logits_exploding", 40, 30)
    assert (warning.blocks, warning.branch) == ((1,), "attention")
    assert warning.message == (
        "WARNING at step 40: attention fixes on single tokens. In block 1 (b.1) the largest attention logit, as the "
        "softmax reads it, has been above 100 since step 30 (300 now, 99 at step 20); a softmax of logits so large is "
        "mostly one-hot, and then passes hardly any gradient. Try: restart with a norm on queries and keys (QK-norm). "
        f"{sureness('logits_exploding')}More: docs/monitor.md#logits_exploding"
    )
    for _ in range(3):
        run.take(attending(run.step, 3.0, 50.0, None))
    assert run.events[-1].message == "step 80: no attention logit is above 100 any more"


def test_logits_that_no_kernel_shows_are_no_news():
    run = Watched()
    for _ in range(5):
        run.take(attending(run.step, None, None))
    assert run.events == []


# All of them


def test_every_rule_has_advice_in_words_and_a_sentence_that_needs_no_jargon():
    assert set(ADVICE) == {rule.name for rule in RULES}
    assert all(name in WORDS for advice in ADVICE.values() for name in advice)
    assert set(FAILURES) < set(ADVICE)


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
    assert {"note", "warning", "failure"} <= set(straight.levels())


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
    warning = next(event for event in events if event["level"] == "warning")
    beside = {"name", "branch", "values", "advice"}
    assert set(warning) == {"level", "step", "since", "blocks", "message", "forecast"} | beside
    assert warning["forecast"]["earliest"] < warning["forecast"]["at"] < warning["forecast"]["latest"]

"""The memory of a run: schedule, logged names, and the parts that the monitor is made of."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from lightning_spectral.alarms import Memory
from lightning_spectral.errors import ExampleInputError
from lightning_spectral.pages import one_screen
from lightning_spectral.records import LayerMeasurement, Measurement
from lightning_spectral.runs.series import Series, logged_values
from lightning_spectral.watch.first_forward import FirstForward


def measurement(*ratios: float | None, step: int = 0) -> Measurement:
    layers = tuple(LayerMeasurement(index, f"b.{index}", ratio, 1.0) for index, ratio in enumerate(ratios))
    return Measurement(step, "circuit", layers, seconds=0.25)


# Series


def test_the_schedule_is_exact():
    series, measured = Series("circuit"), []
    for step in range(12):
        if series.due(step, 5):
            series.scheduled_step = step
            measured.append(step)
    assert measured == [0, 5, 10]


def test_a_series_goes_on_only_from_where_it_has_been():
    series = Series("circuit")
    assert not series.reaches(100)
    series.observe(measurement(1.0, step=10))
    assert [series.reaches(step) for step in (9, 10, 11)] == [False, True, True]


def test_a_state_survives_the_round_trip_and_shares_nothing():
    series = Series("circuit", warm_start={"basis": torch.ones(2)})
    series.observe(measurement(3.0, step=4))
    copy = Series("circuit")
    copy.load_state_dict(state := series.state_dict())
    state["memory"]["blocks"].clear()
    state["warm_start"]["basis"].zero_()
    assert copy.memory == series.memory
    assert copy.memory.blocks[0].side == 1
    assert bool((copy.warm_start["basis"] == 1).all())
    assert copy.measured_step == 4


def test_the_state_of_another_linearization_is_not_taken_up():
    series = Series("circuit")
    series.load_state_dict({"linearization": "paper", "measured_step": 7})
    assert series.measured_step is None


# Names


def test_values_that_do_not_exist_are_absent():
    values = logged_values(measurement(None, None), Memory(), "spectral", per_layer=True)
    assert "spectral/ratio_max" not in values
    assert "spectral_blocks/ratio/00" not in values
    assert values["spectral_blocks/attention_norm/00"] == 1.0
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize(("blocks", "last"), [(3, "02"), (11, "10"), (101, "100")])
def test_indices_are_padded_so_that_keys_sort_like_blocks(blocks: int, last: str):
    values = logged_values(measurement(*[1.0] * blocks), Memory(), "s", per_layer=True)
    keys = [key for key in values if "s_blocks/ratio/" in key]
    assert keys == sorted(keys)
    assert keys[-1] == f"s_blocks/ratio/{last}"


def test_values_of_earlier_releases_come_back_by_the_keys_of_this_one():
    now = logged_values(measurement(1.0, 3.0), Memory(), "s", per_layer=True, rescaled=1)
    before = {key.replace("_health/", "/").replace("_blocks/", "/"): value for key, value in now.items()}
    for values in (before | {"s/worst_layer": 1.0}, now):
        series = Series("circuit")
        series.load_state_dict({"values": values})
        assert series.values == now


# Table


def test_a_small_model_is_shown_whole():
    text = one_screen(measurement(1.0, None, 4.0))
    assert [f"b.{index}" in text for index in range(3)] == [True] * 3
    assert text.splitlines()[-1] == "min 1, median 2, max 4; 1 of 2 blocks inside the safe zone; measured in 250 ms"


def test_a_deep_model_is_cut_to_the_blocks_farthest_from_balance():
    ratios = [1.0] * 96
    ratios[17], ratios[50] = 5.0, 0.1
    lines = one_screen(measurement(*ratios), rows=10).splitlines()
    assert len(lines) == 14
    assert [name in "\n".join(lines) for name in ("b.17 ", "b.50 ")] == [True, True]
    assert "… and 86 blocks nearer to balance" in lines[-2]


def test_a_model_without_ratios_has_a_table_too():
    assert one_screen(measurement(None)).splitlines()[-1] == "no block has a ratio"


def test_every_block_has_one_line_whatever_its_name_and_its_reason_are():
    layers = (
        LayerMeasurement(0, "a\nb\u2028", None, 1.0, mlp_reason="has not the shape\n\n  Exception raised from\r\nx"),
        LayerMeasurement(1, "c" * 500, 1.0, None, attention_reason="why " * 500),
    )
    *_, first, second, last = one_screen(Measurement(0, "circuit", layers)).splitlines()
    assert "a b" in first
    assert first.endswith("mlp: has not the shape Exception raised from x")
    assert "why why" in second
    assert len(second) < 500
    assert last == "no block has a ratio"
    assert len(one_screen(Measurement(0, "circuit", ())).splitlines()) == 3


# Numbers that are none


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_no_number_gives_no_ratio_and_says_so(bad: float):
    layer = LayerMeasurement(0, "b", bad, 1.0)
    assert (layer.ratio, layer.log_ratio, layer.reason) == (None, None, f"mlp: its norm is {bad}")
    scaled = LayerMeasurement(0, "b", 1.0, None, attention_scale=bad)
    assert (scaled.ratio, scaled.reason) == (None, f"attention: its residual scale is {bad}")
    plain = Measurement(0, "circuit", (layer, scaled)).to_dict()
    json.dumps(plain, allow_nan=False)
    assert [found["mlp_norm"] for found in plain["layers"]] == [None, 1.0]
    assert [found["attention_scale"] for found in plain["layers"]] == [1.0, None]


# The first forward pass


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(self.small(x))


def test_the_call_of_the_root_is_preferred():
    root = Outer()
    listener = FirstForward(root, batch=None)
    x = torch.ones(1, 2)
    root(x)
    ((module, args),) = [(call.module, call.args) for call in listener.calls()]
    assert module is root
    assert args[0] is x


def test_without_it_every_outermost_call_counts():
    root = Outer()
    listener = FirstForward(root, batch=None)
    root.large(root.small(torch.ones(1, 2)))
    root.small(torch.zeros(1, 2))
    assert [call.module for call in listener.calls()] == [root.small, root.large]
    assert bool((listener.calls()[0].args[0] == 1).all())  # the first one of each


def test_what_the_run_does_not_train_is_left_out_unless_it_trains_nothing():
    root = Outer()
    listener = FirstForward(root, batch=None)
    root.large(root.small(torch.ones(1, 2)))
    assert [call.module for call in listener.calls([root.small.weight])] == [root.small]
    assert [call.module for call in listener.calls([torch.ones(1)])] == [root.small, root.large]


def test_the_strategys_way_into_the_training_step_is_not_a_forward_pass():
    root, batch = Outer(), torch.ones(1, 2)
    listener = FirstForward(root, batch)

    def redirected(batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        found: torch.Tensor = root.small(batch)
        return found

    redirected.__module__ = "lightning.pytorch.strategies.strategy"  # which makes such a function
    root.forward = redirected  # type: ignore[method-assign]
    root(batch.clone(), 0)  # on its way, the strategy may make a new object of the batch
    assert [call.module for call in listener.calls()] == [root.small]


def test_a_listener_that_was_stopped_leaves_nothing_behind():
    root = Outer()
    before = {module: dict(vars(module)) for module in root.modules()}
    listener = FirstForward(root, batch=None)
    listener.stop()
    root(torch.ones(1, 2))
    assert all(vars(module).keys() == before[module].keys() for module in root.modules())
    with pytest.raises(ExampleInputError, match="set `example_input_array`"):
        listener.calls()

"""The record of a run: what the file says, and what no file may say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from lightning_spectral.alarms import Event
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Forecast, FunctionalMeasurement, LayerMeasurement, Measurement
from lightning_spectral.runs.history import _LAYER, History, _measurement, in_order
from lightning_spectral.runs.journal import Journal

HEADER = {"linearization": "circuit"}
EVENT = Event("failure", 5, 0, (0, 1), "tokens become one vector", Forecast(9.0, 7.0, math.inf))
ACTION = {"step": 5, "action": "rescale", "block": 0, "name": "a", "ratio": 2.0, "smoothed_ratio": 2.0}
ACTION |= {"mlp_scale": 1.0, "attention_scale": 1.0, "mlp_log_change": -0.1, "attention_log_change": 0.1}
ACTION |= {"reason": "above the zone"}


def measurement(step: int, norm: float = 2.0, **changes: Any) -> Measurement:
    seen = {"functional": FunctionalMeasurement(update_ratio=0.5, update_cosine=-0.1), "token_residual": 0.25}
    first = LayerMeasurement(0, "a\u2028b\x85", norm, 1.0, 1.5, 0.5, error_bound=1e-3, effective_rank=3.0, **seen)  # type: ignore[arg-type]
    second = LayerMeasurement(1, "c", None, 1.0, mlp_reason="the weights are not finite", mlp_expert="shared")
    return replace(Measurement(step, "circuit", (first, second), seconds=0.25), **changes)


def written(path: Path, measurements: Sequence[Measurement], *lines: Mapping[str, Any]) -> Path:
    journal = Journal(path, HEADER)
    for item in measurements:
        journal.append(item)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def test_a_history_is_what_the_run_wrote(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    journal = Journal(path, HEADER)
    journal.append(measurement(0))
    event = {"level": "failure", "step": 5, "since": 0, "blocks": [0, 1], "message": EVENT.message}
    event["forecast"] = {"at": 9.0, "earliest": 7.0, "latest": math.inf}
    journal.append(measurement(5, 3.0), [event, ACTION])
    history = History.read(path)
    assert history.measurements == (measurement(0), measurement(5, 3.0))
    assert [item.seconds for item in history.measurements] == [0.25, 0.25]
    assert (history.events, history.actions, history.torn) == ((EVENT,), (ACTION,), False)
    assert history.header["linearization"] == "circuit"
    assert history.steps == (0, 5)


def test_every_field_of_a_layer_is_read():
    assert set(_LAYER) == {field.name for field in fields(LayerMeasurement)}


def test_values_are_arrays_with_gaps(tmp_path: Path):
    history = History.read(written(tmp_path / "spectral.jsonl", [measurement(5, 3.0), measurement(0)]))
    nan = math.nan
    np.testing.assert_array_equal(history.values("ratio"), [[2.0, 3.0], [nan, nan]])
    np.testing.assert_array_equal(history.values("mlp_scale"), [[1.5, 1.5], [1.0, 1.0]])
    assert History({}, ()).values("ratio").shape == (0, 0)


def test_of_two_measurements_at_one_step_the_later_counts(tmp_path: Path):
    history = History.read(written(tmp_path / "spectral.jsonl", [measurement(0), measurement(0, 7.0)]))
    assert history.measurements == (measurement(0, 7.0),)


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_a_torn_last_line_is_left_out_and_told(tmp_path: Path, cut: int):
    path = written(tmp_path / "spectral.jsonl", [measurement(0), measurement(5)])
    path.write_bytes(path.read_bytes()[:-1][:-cut])
    history = History.read(path)
    assert history.torn
    assert history.steps == (0,)


def test_a_file_that_is_only_a_header_is_an_empty_history(tmp_path: Path):
    history = History.read(written(tmp_path / "spectral.jsonl", []))
    assert (history.measurements, history.torn) == ((), False)
    with pytest.raises(ConfigurationError, match="a heatmap needs at least one measurement"):
        history.plot_heatmap()


def test_kinds_of_entries_that_are_not_known_yet_are_passed_over(tmp_path: Path):
    path = written(tmp_path / "spectral.jsonl", [measurement(0)], {"weather": "fine", "step": 3})
    assert History.read(path).measurements == (measurement(0),)


def test_values_of_a_run_that_diverged_are_missing(tmp_path: Path):
    entry = measurement(0).to_dict()
    entry["layers"][0] |= {"token_residual": math.nan, "mlp_norm": math.inf, "attention_scale": math.nan}
    (layer, _) = History.read(written(tmp_path / "spectral.jsonl", [], entry)).measurements[0].layers
    assert (layer.token_residual, layer.ratio) == (None, None)
    assert math.isnan(layer.attention_scale)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["step"], -1, "found -1, expected a whole number from 0 to"),
        (["step"], True, "found True, expected a whole number"),
        (["step"], 10**30, "expected a whole number from 0 to"),
        (["safe_zone"], [2.0, 0.5], "the safe zone is"),
        (["safe_zone"], [0.5], "not enough values"),
        (["layers"], 5, "found 5, expected a list"),
        (["layers", 0, "index"], 10**6, "block 1000000"),
        (["layers", 0, "mlp_norm"], "2", "found '2', expected a number"),
        (["layers", 0, "mlp_norm"], 10**400, "found 10{49,51}, expected a number"),
        (["layers", 0, "attention_norm"], -1.0, "found -1.0, expected a number of at least 0"),
        (["layers", 0, "name"], ["x"], "found a list, expected text"),
        (["layers", 0, "name"], {"x" * 1000: "\x1b[2J"}, "found a dict, expected text$"),
        (["layers", 0, "functional"], {"update_ratio": "x"}, "found 'x', expected a number"),
    ],
    ids=range(13),
)
def test_what_no_run_writes_is_left_out_and_told_in_one_line(tmp_path: Path, where: list[Any], value: Any, said: str):
    entry: Any = json.loads(json.dumps(measurement(0).to_dict()))
    place = entry
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    history = History.read(written(tmp_path / "spectral.jsonl", [measurement(0)], entry, measurement(9).to_dict()))
    assert (history.measurements, list(history.damaged)) == ((measurement(0), measurement(9)), [3])
    assert re.search(said, history.damaged[3])
    assert history.damaged[3].isprintable()
    assert len(history.damaged[3]) < 130


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"level": "failure", "step": 3}, "blocks"),
        ({"level": "doom", "step": 3}, "found 'doom', expected one of failure, note, warning"),
        ({"level": "note", "step": 3, "since": 3, "blocks": [], "message": 4}, "found 4, expected text"),
        (ACTION | {"mlp_log_change": None}, "found None, expected a number"),
        ({"action": "rescale", "step": 3}, "block"),
    ],
)
def test_events_and_actions_are_read_as_strictly(tmp_path: Path, entry: dict[str, Any], said: str):
    history = History.read(written(tmp_path / "spectral.jsonl", [], entry, ACTION))
    assert (history.events, history.actions, list(history.damaged)) == ((), (ACTION,), [2])
    assert re.search(said, history.damaged[2])


def test_a_measurement_without_a_step_hides_itself(tmp_path: Path):
    entry = measurement(5).to_dict()
    del entry["step"]
    history = History.read(written(tmp_path / "spectral.jsonl", [measurement(0)], entry, measurement(9).to_dict()))
    assert (history.steps, history.damaged) == ((0, 9), {3: "KeyError: 'step'"})


def test_a_later_format_is_refused(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    path.write_text('{"lightning_spectral": 2}\n')
    with pytest.raises(ConfigurationError, match=r"is of format '2', this release reads format 1"):
        History.read(path)


def test_two_linearizations_are_never_mixed(tmp_path: Path):
    other = measurement(5, linearization="paper")
    with pytest.raises(ConfigurationError, match="one linearization; found circuit, paper"):
        History.read(written(tmp_path / "spectral.jsonl", [measurement(0), other]))


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_figures_are_written_in_every_format(tmp_path: Path, kind: str):
    history = History({}, (measurement(0), measurement(5, 3.0)))
    for name, figure in {"heatmap": history.plot_heatmap(), "profile": measurement(0).plot()}.items():
        figure.savefig(tmp_path / f"{name}.{kind}")
        assert (tmp_path / f"{name}.{kind}").stat().st_size > 5000


def test_a_profile_shows_norms_and_ratios_of_every_block():
    above, below = measurement(0, 8.0).plot().axes
    mlp, attention = above.get_lines()
    np.testing.assert_array_equal(mlp.get_ydata(), [8.0, math.nan])
    np.testing.assert_array_equal(attention.get_ydata(), [1.0, 1.0])
    assert [line.get_label() for line in (mlp, attention)] == ["MLP", "attention"]
    assert [bar.get_height() for bar in below.patches[:2]] == pytest.approx([3.0, math.nan], nan_ok=True)
    assert "safe zone" in [text.get_text() for text in below.texts]


def test_a_heatmap_of_jacobians_has_no_zone():
    plain = History({}, (measurement(0, 8.0, linearization="jacobian"), measurement(5, linearization="jacobian")))
    axes, bar = plain.plot_heatmap().axes
    assert "safe zone" not in [text.get_text() for text in bar.texts]
    assert not [item for item in axes.collections if isinstance(item, LineCollection)]


def test_a_part_of_adapters_is_read_back():
    (back,) = in_order([_measurement(measurement(0, adapters="base").to_dict())])
    assert back == measurement(0, adapters="base")


def test_a_profile_of_jacobians_has_no_zone():
    assert not list(measurement(0, linearization="jacobian").plot().axes[1].texts)


def test_a_profile_without_a_single_ratio_is_drawn(tmp_path: Path):
    layers = (LayerMeasurement(0, "a", None, None, mlp_reason="NaN"), LayerMeasurement(1, "b", 0.0, 1.0))
    Measurement(0, "circuit", layers).plot().savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()

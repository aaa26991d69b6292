"""The heatmap: what is in the picture, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from lightning_spectral.display.figure import log_ticks
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import LayerMeasurement, Measurement
from lightning_spectral.runs.history import History, in_order


def measurement(step: int, ratios: Sequence[float | None], **fields: object) -> Measurement:
    layers = tuple(
        LayerMeasurement(
            index, f"blocks.{index}", mlp_norm=ratio, attention_norm=1.0, mlp_reason=None if ratio else "NaN"
        )
        for index, ratio in enumerate(ratios)
    )
    return Measurement(step, **{"linearization": "circuit", "layers": layers} | fields)  # type: ignore[arg-type]


def heatmap(measurements: Sequence[Measurement]) -> Figure:
    return History({}, in_order(measurements)).plot_heatmap()


def painted(figure) -> np.ma.MaskedArray:
    """Return the values in the picture, shape (blocks, measurements)."""
    (mesh,) = [item for item in figure.axes[0].collections if isinstance(item, QuadMesh)]
    return mesh.get_array()


def zone_lines(figure) -> int:
    (lines,) = [item for item in figure.axes[0].collections if isinstance(item, LineCollection)]
    return len(lines.get_segments())


def test_cells_are_log_ratios_by_block_and_step():
    values = painted(heatmap([measurement(0, [1.0, 0.5]), measurement(10, [2.0, 4.0])]))
    np.testing.assert_allclose(values, np.log([[1.0, 2.0], [0.5, 4.0]]))


def test_missing_ratios_are_masked_and_hatched():
    figure = heatmap([measurement(0, [1.0, None, 1.0])])
    assert painted(figure).mask[:, 0].tolist() == [False, True, False]
    assert figure.axes[0].patch.get_hatch()


def test_a_run_read_back_gives_the_same_picture(tmp_path: Path):
    measurements = [measurement(0, [1.0, None]), measurement(7, [2.0, 3.0])]
    path = tmp_path / "spectral.jsonl"
    path.write_text("\n".join(json.dumps(item.to_dict()) for item in measurements))
    np.testing.assert_array_equal(painted(History.read(path).plot_heatmap()), painted(heatmap(measurements)))


def test_of_two_measurements_at_one_step_the_later_counts():
    values = painted(heatmap([measurement(5, [1.0]), measurement(5, [2.0])]))
    np.testing.assert_allclose(values, [[math.log(2)]])


def test_measurements_are_drawn_in_order_of_steps():
    values = painted(heatmap([measurement(9, [2.0]), measurement(0, [1.0])]))
    np.testing.assert_allclose(values, np.log([[1.0, 2.0]]))


@pytest.mark.parametrize(
    ("ratios", "segments"),
    [([1.0, 1.0, 1.0], 0), ([1.0, 2.5, 1.0], 2), ([1.0, 2.0, 1.9], 2), ([0.4, 0.4, 1.0], 1), ([3.0, 0.1, 3.0], 2)],
)
def test_lines_stand_where_blocks_inside_and_outside_the_zone_meet(ratios: list[float], segments: int):
    assert zone_lines(heatmap([measurement(0, ratios)])) == segments


def test_the_scale_is_labelled_in_ratios_and_the_same_in_every_run():
    for ratios in ([1.1, 1.2], [1.1, 3.0], [1.0, 1e9]):
        bar = heatmap([measurement(0, ratios)]).axes[1]
        assert [label.get_text() for label in bar.get_yticklabels()][::2] == ["1/16", "1/4", "1", "4", "16"]
        np.testing.assert_allclose(bar.get_ylim(), (-math.log(16), math.log(16)))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.05, 40.0, [0.1, 0.3, 1, 3, 10, 30]),
        (0.05, 20.0, [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]),
        (0.06, 0.09, [0.06, 0.065, 0.07, 0.075, 0.08, 0.085, 0.09]),
        (1e-8, 1e8, [1e-8, 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6, 1e8]),
        (4.9, 8.1, [5, 5.5, 6, 6.5, 7, 7.5, 8]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_apart(low: float, high: float, ticks: list[float]):
    np.testing.assert_allclose(log_ticks(low, high, 9), ticks)


def test_ticks_never_collide():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = float(np.exp(rng.normal(scale=5)))
        span = float(rng.uniform(0.02, 30))
        ticks = log_ticks(low, low * math.exp(span), 8)
        assert 1 <= len(ticks) <= 9
        assert (np.diff(np.log(ticks)) >= span / 8 - 1e-9).all()


def test_every_cell_is_as_wide_as_its_share_of_the_steps():
    figure = heatmap([measurement(step, [1.0]) for step in (0, 10, 30)])
    assert figure.axes[0].get_xlim() == (-5.0, 40.0)


@pytest.mark.parametrize("blocks", [1, 2, 12, 96])
def test_a_picture_is_written_for_any_depth(tmp_path: Path, blocks: int):
    path = tmp_path / "spectral.png"
    heatmap([measurement(step, [1.0] * blocks) for step in range(3)]).savefig(path)
    assert path.stat().st_size > 1000


def test_no_picture_without_a_single_ratio_fails():
    assert painted(heatmap([measurement(0, [None, None])])).mask.all()


def test_drawing_leaves_no_global_state():
    heatmap([measurement(0, [1.0])])
    assert Gcf.get_all_fig_managers() == []


def test_nothing_to_draw_is_refused():
    with pytest.raises(ConfigurationError, match="at least one measurement"):
        heatmap([])


def test_two_linearizations_are_never_mixed():
    with pytest.raises(ConfigurationError, match="one linearization; found circuit, paper"):
        heatmap([measurement(0, [1.0]), measurement(1, [1.0], linearization="paper")])


def test_without_matplotlib_the_message_says_what_to_type(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"drawing needs matplotlib: pip install matplotlib"):
        heatmap([measurement(0, [1.0])])

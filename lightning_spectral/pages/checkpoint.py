"""The page of a checkpoint, or of two checkpoints side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_spectral.pages.canvas import (
    ATTENTION,
    MLP,
    canvas,
    hover,
    legend_above,
    log_range,
    shade_zone,
    tick_logs,
    tick_ratios,
)
from lightning_spectral.pages.page import Section, check_installed, write_page
from lightning_spectral.pages.summary import Advice, Finding, Summary
from lightning_spectral.pages.tables import comparison_table, norms_table
from lightning_spectral.pages.words import clear, clear_name, many, zone_of, zone_words
from lightning_spectral.records import Measurement

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

__all__ = ["write_checkpoint_page"]

_RATIO = "Bars go up from ρ = 1 where the MLP is larger, and down where attention is larger."
_RATIO_CHANGE = "Lines go from the ratio in the first checkpoint (hollow) to the ratio in the second (filled)."
_NORMS = "The largest singular value of each branch as a linear operator. Circles: MLP. Squares: attention."
_NORMS_CHANGE = f"{_NORMS} Hollow: the first checkpoint. Filled: the second."


def write_checkpoint_page(
    output: str | os.PathLike[str], paths: Sequence[str], measurements: Sequence[Measurement]
) -> None:
    """Write the measurement of one checkpoint, or of two with the same blocks, as one HTML file.

    Args:
        output: Path of the page.
        paths: The checkpoints.
        measurements: One per path, the older first.

    Raises:
        ModuleNotFoundError: The extra ``report`` is not installed.
        OSError: The page cannot be written.
    """
    check_installed()
    compared = len(measurements) == 2
    last = measurements[-1]
    table = comparison_table(*measurements) if compared else norms_table(last)
    sections = [
        Section("Ratio of every block", _RATIO_CHANGE if compared else _RATIO, ("ratio",)),
        Section("Spectral norms", _NORMS_CHANGE if compared else _NORMS, ("norms",)),
        Section("Every block", "The numbers behind the charts.", tables=(table,), unfolded=True),
    ]
    about = " → ".join(clear(path, 300) for path in paths)
    write_page(Path(output), "Spectral audit", about, _summary(measurements), sections, _charts(measurements))


def _summary(measurements: Sequence[Measurement]) -> Summary:
    last = measurements[-1]
    verdict = f"{many(len(last.layers), 'block')}, by the “{clear(last.linearization)}” linearization."
    words = tuple(Finding("information", text) for text in _story(measurements))
    advice = (Advice("A ratio outside the safe zone asks for nothing by itself.", "docs/ratio.md#not-a-verdict"),)
    return Summary(Finding("information", verdict), words, advice if zone_of(last) else ())


def _story(measurements: Sequence[Measurement]) -> Iterator[str]:
    last = measurements[-1]
    yield from zone_words(measurements[0], last, zone_of(last), ("before", "now"))
    yield from (f"{clear(note, 300)}." for measurement in measurements for note in measurement.notes)


def _charts(measurements: Sequence[Measurement]) -> dict[str, figure]:
    from bokeh.models import Range1d

    indices = [layer.index for layer in measurements[-1]]
    x_range = Range1d(min(indices, default=0) - 0.8, max(indices, default=0) + 0.8)
    return {"ratio": _ratios(measurements, x_range), "norms": _norms(measurements, x_range)}


def _columns(measurement: Measurement) -> dict[str, Any]:
    columns = {
        name: [getattr(layer, name) for layer in measurement] for name in ("ratio", "mlp_norm", "attention_norm")
    }
    numbers = {name: np.array([value or np.nan for value in values]) for name, values in columns.items()}
    names = [clear_name(layer.name) for layer in measurement]
    return {"block": [layer.index for layer in measurement], "name": names, **numbers}


def _ratios(measurements: Sequence[Measurement], x_range: Range1d) -> figure:
    first, last = (_columns(measurements[position]) for position in (0, -1))
    zone = zone_of(measurements[-1])
    y_range = log_range(first["ratio"], last["ratio"], zone or 1.0)
    plot = canvas("ratio", 340, x_range, y_axis_type="log", y_range=y_range)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "block", "ρ = ‖MLP‖₂ / ‖attention‖₂"
    shade_zone(plot, zone)
    tick_ratios(plot, zone)
    source = last | {"before": first["ratio"], "colour": np.where(last["ratio"] > 1, MLP, ATTENTION)}
    tips = [("block", "@block @name"), ("ρ", "@ratio{%.4g}")]
    formats = {"@ratio": "printf", "@before": "printf"}
    if len(measurements) == 1:
        bars = plot.vbar("block", 0.7, "ratio", 1.0, color="colour", source=source)
        hover(plot, bars, tips, formatters=formats)
        return plot
    plot.segment("block", "before", "block", "ratio", line_color="colour", line_width=3, source=source)
    for ordinate, fill in (("before", "white"), ("ratio", "colour")):
        style = {"fill_color": fill, "line_color": "colour", "size": 10, "line_width": 2}
        marks = plot.scatter("block", ordinate, source=source, **style)
        hover(plot, marks, [tips[0], ("ρ before", "@before{%.4g}"), ("ρ after", "@ratio{%.4g}")], formatters=formats)
    return plot


def _norms(measurements: Sequence[Measurement], x_range: Range1d) -> figure:
    columns = [_columns(measurement) for measurement in measurements]
    norms = [column[name] for column in columns for name in ("mlp_norm", "attention_norm")]
    plot = canvas("norms", 320, x_range, y_axis_type="log", y_range=log_range(*norms))
    plot.xaxis.axis_label, plot.yaxis.axis_label = "block", "spectral norm"
    tick_logs(plot)
    for column in columns:
        hollow = len(columns) == 2 and column is columns[0]
        for name, label, marker, colour in (
            ("mlp_norm", "MLP", "circle", MLP),
            ("attention_norm", "attention", "square", ATTENTION),
        ):
            if not hollow:
                plot.line("block", name, color=colour, line_alpha=0.5, source=column)
            style = {"fill_color": "white" if hollow else colour, "line_color": colour, "size": 9}
            marks = plot.scatter("block", name, marker=marker, legend_label=label, source=column, **style)
            tooltips = [("block", "@block @name"), (label, f"@{name}{{%.4g}}")]
            hover(plot, marks, tooltips, formatters={f"@{name}": "printf"})
    legend_above(plot)
    return plot

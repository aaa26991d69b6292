"""Charts of a run: series of every block over time, events, actions of the controller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_spectral.display.heatmap import step_edges
from lightning_spectral.pages.canvas import (
    INK,
    Floats,
    canvas,
    colour_bar,
    counting,
    depth_colours,
    hover,
    label_ends,
    legend_above,
    log_range,
    rounded,
    shade_zone,
    tick_logs,
    tick_ratios,
)
from lightning_spectral.pages.heat import heat_chart
from lightning_spectral.pages.losses import logged_charts
from lightning_spectral.pages.timeline import is_ceiling, stopped, timeline
from lightning_spectral.pages.words import clear, clear_name, zone_of
from lightning_spectral.records import Event
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logged import NOTHING, Logged

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource, Range1d
    from bokeh.plotting import figure

__all__ = ["QUANTITIES", "run_charts"]

# Attribute of LayerMeasurement -> (label of the axis, kind of the axis).
QUANTITIES = {
    "ratio": ("ρ = ‖MLP‖₂ / ‖attention‖₂", "log"),
    "mlp_norm": ("‖MLP‖₂", "log"),
    "attention_norm": ("‖attention‖₂", "log"),
    "mlp_scale": ("scale of the MLP", "log"),
    "attention_scale": ("scale of attention", "log"),
    "typical_token_residual": ("token residual", "linear"),
    "effective_rank": ("effective rank", "linear"),
}
NAMED = 24  # lines that can be told apart by their labels alone
# Levels of events, from the bottom up. Height, shape and colour all tell the level.
LEVELS = {"note": ("circle", "#0072b2"), "warning": ("triangle", "#e69f00"), "failure": ("square", "#d55e00")}


def run_charts(history: History, logged: Logged = NOTHING) -> dict[str, figure]:
    """Return the charts of a run by name. What was not measured has no chart. All share the step axis.

    Args:
        history: The run.
        logged: Its losses and learning rates.
    """
    from bokeh.models import Range1d

    edges = step_edges(history.steps)
    x_range = Range1d(float(edges[0]), float(edges[-1]))
    charts = logged_charts(logged, x_range)
    values = {name: _drawable(history.values(name), scale) for name, (_, scale) in QUANTITIES.items()}
    shown = {name: table for name, table in values.items() if np.isfinite(table).any() and not _constant(name, table)}
    source = _source(history, shown)
    zone = zone_of(history.measurements[-1])
    if "ratio" in shown:
        charts["heatmap"] = heat_chart(history, x_range, zone)
    for name, table in shown.items():
        charts[name] = _lines(name, table, source, x_range, zone)
    if events := timeline(history):
        charts["events"] = _events(events, x_range)
    if history.actions:
        charts["actions"] = _actions(history, x_range)
    return charts


def _drawable(table: Floats, scale: str) -> Floats:
    """Replace 0 by a gap on a logarithmic axis, which has no place for it."""
    return np.where(table > 0, table, np.nan) if scale == "log" else table


def _constant(name: str, table: Floats) -> bool:
    """Whether a table is of scales that all stayed at 1, as in a run without a controller."""
    return name.endswith("_scale") and bool(np.all(table == 1.0))


def _source(history: History, shown: dict[str, Floats]) -> ColumnDataSource:
    """Return the data of all line charts, one row per block. Each chart takes another column as its y values."""
    from bokeh.models import ColumnDataSource

    steps = np.asarray(history.steps, dtype=np.int32 if history.steps[-1] < 2**31 else np.float64)
    names = {layer.index: clear_name(layer.name) for measurement in history.measurements for layer in measurement}
    blocks = range(max(names) + 1)
    columns: dict[str, Any] = {"block": list(blocks), "name": [names.get(block, "") for block in blocks]}
    columns["steps"] = [steps for _ in blocks]
    return ColumnDataSource(columns | {name: list(rounded(table)) for name, table in shown.items()})


def _lines(
    name: str, table: Floats, source: ColumnDataSource, x_range: Range1d, zone: tuple[float, float] | None
) -> figure:
    from bokeh.models import LinearColorMapper, PrintfTickFormatter

    label, scale = QUANTITIES[name]
    wanted = [table, zone or 1.0] if name == "ratio" else [table]
    y_range = log_range(*wanted) if scale == "log" else (0.0, float(np.nanmax(table)) * 1.05 or 1.0)
    plot = canvas(name, 380 if name == "ratio" else 300, x_range, y_axis_type=scale, y_range=y_range)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer step", label
    plot.yaxis.formatter = PrintfTickFormatter(format="%.4g")
    if name == "ratio":
        shade_zone(plot, zone)
        tick_ratios(plot, zone)
    elif scale == "log":
        tick_logs(plot)
    blocks = table.shape[0]
    mapper = LinearColorMapper(depth_colours(blocks), low=-0.5, high=max(blocks, 2) - 0.5)
    colour = {"field": "block", "transform": mapper}
    # Many lines are drawn thin and opaque, which is several times as fast in a browser.
    style = {"line_width": 1.6, "line_alpha": 0.9} if blocks <= NAMED else {"line_width": 1.0, "line_alpha": 1.0}
    lines = plot.multi_line("steps", name, source=source, line_color=colour, **style)
    lines.hover_glyph = lines.glyph.clone(line_color=INK, line_width=3, line_alpha=1.0)
    tooltips = [("block", "@block @name"), ("step", "$snap_x{0}"), (label, "$snap_y{%.4g}")]
    hover(plot, lines, tooltips, formatters={"$snap_y": "printf"}, line_policy="nearest")
    _lonely(plot, table, source, colour)
    label_ends(
        plot, {block: float(row[np.isfinite(row)][-1]) for block, row in enumerate(table) if np.isfinite(row).any()}
    )
    if blocks > NAMED:
        colour_bar(plot, mapper, "block").ticker = counting()
    return plot


def _lonely(plot: figure, table: Floats, source: ColumnDataSource, colour: Any) -> None:
    """Mark values without a neighbour in time, which no line connects."""
    there = np.pad(np.isfinite(table), ((0, 0), (1, 1)))
    rows, columns = np.nonzero(there[:, 1:-1] & ~there[:, :-2] & ~there[:, 2:])
    if rows.size == 0:
        return
    steps = source.data["steps"][0]
    points = {"step": steps[columns], "value": table[rows, columns], "block": rows}
    marks = plot.scatter("step", "value", size=7, color=colour, source=points)
    tooltips = [("block", "@block"), ("step", "@step"), ("value", "@value{%.4g}")]
    hover(plot, marks, tooltips, formatters={"@value": "printf"})


def _events(events: Sequence[Event], x_range: Range1d) -> figure:
    plot = canvas("events", 170, x_range, y_range=list(LEVELS))
    source = {
        "step": [event.step for event in events],
        "level": [event.level for event in events],
        "message": [clear(event.message, 600) for event in events],
        "marker": [LEVELS[event.level][0] for event in events],
        "colour": [LEVELS[event.level][1] for event in events],
    }
    marks = plot.scatter("step", "level", marker="marker", fill_color="colour", line_color=INK, size=13, source=source)
    plot.ygrid.grid_line_color = None
    plot.xaxis.axis_label = "optimizer step"
    hover(plot, marks, [("step", "@step"), ("", "@message")])
    return plot


def _actions(history: History, x_range: Range1d) -> figure:
    """Draw after each measurement how many blocks were moved, and how many were not and stay outside."""
    moved, held = ({step: set[int]() for step in history.steps} for _ in range(2))
    for action in history.actions:
        if action["step"] in moved and action["action"] in ("rescale", "hold"):
            (moved if action["action"] == "rescale" else held)[action["step"]].add(action["block"])
    for block, column in np.argwhere(stopped(history)):
        held[history.steps[column]].add(int(block))
    steps = [step for step in history.steps if moved[step] or held[step]]
    counts = {"moved": [len(moved[step]) for step in steps], "held": [len(held[step] - moved[step]) for step in steps]}
    most = max((sum(pair) for pair in zip(*counts.values(), strict=True)), default=1)
    plot = canvas("actions", 240, x_range, y_range=(0, 1.1 * most))
    width = 0.8 * float(np.min(np.diff(history.steps), initial=np.ptp(history.steps) / 20 or 1.0))
    source = {"step": steps, **counts}
    left = "left as they are" if is_ceiling(history) else "at the bounds"
    labels = ["scales moved", f"outside, {left}" if is_ceiling(history) else f"outside, scales {left}"]
    style = {"width": width, "fill_color": ["#009e73", "#cc79a7"], "line_color": None, "legend_label": labels}
    bars = plot.vbar_stack(list(counts), x="step", source=source, **style)
    for bar in bars:
        hover(plot, bar, [("step", "@step"), ("blocks moved", "@moved"), (f"blocks {left}", "@held")])
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer step", "blocks"
    plot.yaxis.ticker = counting()
    legend_above(plot)
    return plot

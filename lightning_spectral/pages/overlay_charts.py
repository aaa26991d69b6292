"""Charts of several runs, laid over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_spectral.display.figure import Floats
from lightning_spectral.display.heatmap import step_edges
from lightning_spectral.pages.canvas import (
    canvas,
    hover,
    legend_above,
    log_range,
    rounded,
    shade_zone,
    tick_ratios,
    title_above,
)
from lightning_spectral.pages.differences import shared_steps
from lightning_spectral.pages.heat import cells
from lightning_spectral.pages.losses import COLOURS, DASHES, curve_chart
from lightning_spectral.pages.words import clear_name, zone_of
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logged import Curve, Logged

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

__all__ = ["Run", "overlay_charts"]

RHO = "ρ = ‖MLP‖₂ / ‖attention‖₂"
ALIKE = (2 / 3, 1.5)  # factors between two runs whose colours are faint
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus")


@dataclass(frozen=True, slots=True)
class Run:
    """One of the runs.

    Attributes:
        letter: What stands for the run in charts.
        path: Its file, safe to show.
        history: What the file says.
        logged: What its loggers have left.
    """

    letter: str
    path: str
    history: History
    logged: Logged


def overlay_charts(runs: Sequence[Run]) -> dict[str, figure]:
    """Return the charts by name. All but the one over the blocks share the step axis."""
    from bokeh.models import Range1d

    edges = [step_edges(run.history.steps) for run in runs]
    x_range = Range1d(float(min(edge[0] for edge in edges)), float(max(edge[-1] for edge in edges)))
    charts = {}
    if curves := [(f"{run.letter} {curve.name}", curve) for run in runs for curve in run.logged.losses]:
        charts["loss"] = curve_chart("loss", "loss", curves[: len(COLOURS)], x_range)
    charts["ratio"] = _ratios(runs, x_range)
    if (blocks := _blocks(runs)) is not None:
        charts["blocks"] = blocks
    for other in runs[1:]:
        if (chart := _difference(runs[0], other, x_range)) is not None:
            charts[f"difference_{other.letter}"] = chart
    tokens = [(run.letter, curve) for run in runs if (curve := _token_curve(run.history)) is not None]
    if tokens:
        charts["tokens"] = curve_chart("tokens", "token residual", tokens, x_range)
    return charts


def _ratios(runs: Sequence[Run], x_range: Range1d) -> figure:
    """Draw the median, the smallest and the largest ratio of each run."""
    zone = zone_of(runs[0].history.measurements[-1])
    tables = [run.history.values("ratio") for run in runs]
    plot = canvas("ratio", 380, x_range, y_axis_type="log", y_range=log_range(*tables, zone or 1.0))
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer step", RHO
    shade_zone(plot, zone)
    tick_ratios(plot, zone)
    kinds: dict[str, Callable[[Floats], Any]] = {"median": np.median, "smallest": np.min, "largest": np.max}
    for run, table, colour, dash in zip(runs, tables, COLOURS, DASHES, strict=False):
        for kind, reduce in kinds.items():
            values = np.array([reduce(column[np.isfinite(column)]) if np.isfinite(column).any() else np.nan
                               for column in table.T])  # fmt: skip
            source = {"step": list(run.history.steps), "value": rounded(values)}
            width = 3.0 if kind == "median" else 1.0
            legend = {"legend_label": run.letter} if kind == "median" else {}
            line = plot.line("step", "value", color=colour, line_dash=dash, line_width=width, source=source, **legend)
            rows = [("", f"{run.letter}, {kind} of the blocks"), ("step", "@step{0}"), ("ρ", "@value{%.4g}")]
            hover(plot, line, rows, formatters={"@value": "printf"})
    legend_above(plot)
    return plot


def _blocks(runs: Sequence[Run]) -> figure | None:
    """Draw the ratio of every block of each run, at the last step that all have."""
    from bokeh.models import Range1d

    steps = set.intersection(*(set(run.history.steps) for run in runs))
    if not steps:
        return None
    layers = [next(item for item in run.history.measurements if item.step == max(steps)).layers for run in runs]
    ratios = [np.array([np.nan if layer.ratio is None else layer.ratio for layer in found]) for found in layers]
    zone = zone_of(runs[0].history.measurements[-1])
    last = max(layer.index for found in layers for layer in found)
    plot = canvas("blocks", 320, Range1d(-0.8, last + 0.8), y_axis_type="log", y_range=log_range(*ratios, zone or 1.0))
    plot.xaxis.axis_label, plot.yaxis.axis_label = "block", RHO
    shade_zone(plot, zone)
    tick_ratios(plot, zone)
    for run, found, values, colour, marker in zip(runs, layers, ratios, COLOURS, MARKERS, strict=False):
        names = [clear_name(layer.name) for layer in found]
        source = {"block": [layer.index for layer in found], "name": names, "value": values}
        plot.line("block", "value", color=colour, line_alpha=0.4, source=source)
        style = {"color": colour, "size": 9, "marker": marker, "legend_label": run.letter}
        marks = plot.scatter("block", "value", source=source, **style)
        rows = [("", f"{run.letter}, step {max(steps):,}"), ("block", "@block @name"), ("ρ", "@value{%.4g}")]
        hover(plot, marks, rows, formatters={"@value": "printf"})
    legend_above(plot)
    return plot


def _difference(one: Run, other: Run, x_range: Range1d) -> figure | None:
    steps = shared_steps(one.history, other.history)
    first, second = (_ratios_at(run.history, steps) for run in (one, other))
    blocks = min(len(first), len(second))
    factors = second[:blocks] / first[:blocks]
    if not np.isfinite(factors).any():
        return None
    names = {layer.index: clear_name(layer.name) for layer in other.history.measurements[-1]}
    label = f"ρ, {other.letter} / {one.letter}"
    plot = cells(f"difference_{other.letter}", factors, steps, names, x_range, ALIKE, label, edge="")
    title_above(plot, label)
    return plot


def _ratios_at(history: History, steps: Sequence[int]) -> Floats:
    """Return the ratios at some of the measured steps, shape ``(blocks, steps)``."""
    place = {step: column for column, step in enumerate(history.steps)}
    return history.values("ratio")[:, [place[step] for step in steps]]


def _token_curve(history: History) -> Curve | None:
    residuals = history.values("typical_token_residual")
    rows = np.flatnonzero(np.isfinite(residuals).any(axis=1))
    if rows.size == 0:
        return None
    there = np.isfinite(residuals[rows[-1]])
    steps = np.asarray(history.steps, dtype=float)
    return Curve(f"block {rows[-1]}", steps[there], residuals[rows[-1]][there])

"""Charts of what the loggers of a run have written: losses and learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_spectral.pages.canvas import canvas, hover, legend_above, log_range, rounded, tick_logs
from lightning_spectral.pages.words import clear
from lightning_spectral.runs.logged import Curve, Logged

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

__all__ = ["COLOURS", "curve_chart", "logged_charts"]

# Okabe and Ito, without the yellow, which is invisible on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("solid", "dashed", "dotdash", "dotted", "solid", "dashed")
FEW = 60  # points of a curve that are marked
WIDE = 20  # largest over smallest value, from which on an axis is logarithmic


def logged_charts(logged: Logged, x_range: Range1d) -> dict[str, figure]:
    """Return the charts of what was logged, by name."""
    kinds = {"loss": ("loss", logged.losses), "rate": ("learning rate", logged.rates)}
    return {
        name: curve_chart(name, label, [(curve.name, curve) for curve in curves], x_range)
        for name, (label, curves) in kinds.items()
        if any(np.isfinite(curve.values).any() for curve in curves)
    }


def curve_chart(name: str, label: str, curves: Sequence[tuple[str, Curve]], x_range: Range1d) -> figure:
    """Draw curves over the steps, each with its own colour and dash.

    Args:
        name: Name of the chart in the page.
        label: Label of the y axis.
        curves: Each with the text that stands for it.
        x_range: Range of the x axis.
    """
    from bokeh.models import PrintfTickFormatter

    values = np.concatenate([curve.values[np.isfinite(curve.values)] for _, curve in curves])
    logarithmic = name == "loss" and values.min() > 0 and values.max() > WIDE * values.min()
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    y_range = log_range(values) if logarithmic else (low - margin, high + margin)
    plot = canvas(name, 240, x_range, y_range=y_range, y_axis_type="log" if logarithmic else "linear")
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer step", label
    plot.yaxis.formatter = PrintfTickFormatter(format="%.4g")
    if logarithmic:
        tick_logs(plot)
    for (text, curve), colour, dash in zip(curves, COLOURS, DASHES, strict=False):
        thin, shown = curve.thinned(), clear(text, 60)
        finite = np.where(np.isfinite(thin.values), thin.values, np.nan)
        source = {"step": thin.steps, "value": rounded(finite), "name": [shown] * len(finite)}
        line = plot.line(
            "step", "value", color=colour, line_dash=dash, line_width=1.8, legend_label=shown, source=source
        )
        marks = [line]
        if np.isfinite(finite).sum() <= FEW:
            marks.append(plot.scatter("step", "value", color=colour, size=5, legend_label=shown, source=source))
        rows = [("", "@name"), ("step", "@step{0}"), (label, "@value{%.4g}")]
        hover(plot, marks[-1], rows, formatters={"@value": "printf"})
    legend_above(plot)
    return plot

"""What the charts of a page have in common: size, tools, colours, hover, rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.display.figure import power_of_two

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

__all__ = [
    "canvas",
    "colour_bar",
    "counting",
    "depth_colours",
    "hover",
    "log_range",
    "rounded",
    "shade_zone",
    "tick_powers_of_two",
]

Floats = NDArray[np.float64]

# The same as in the figures: blue is attention, red is the MLP (Okabe-Ito).
MLP, ATTENTION, INK, FAINT = "#d55e00", "#0072b2", "#22262b", "#6a7178"
HOVERED = 4  # things told of at one place
MANTISSA = 14  # bits that a value in a chart keeps, four digits: what is dropped halves the size of the page


def canvas(name: str, height: int, x_range: Range1d, **options: Any) -> figure:
    """Return an empty chart as wide as its place, with tools that a keyboard reaches.

    Args:
        name: What the page calls it.
        height: In pixels.
        x_range: Shared by all charts that have the same abscissa.
        options: Of the figure.
    """
    from bokeh.models import (
        BoxZoomTool,
        ClickPanTool,
        PanTool,
        ResetTool,
        SaveTool,
        ZoomInTool,
        ZoomOutTool,
    )
    from bokeh.plotting import figure

    across = {"dimensions": "width"}
    zoom = BoxZoomTool(**across)
    clicks = [ZoomInTool(**across), ZoomOutTool(**across), ClickPanTool(direction="left", factor=0.25)]
    clicks += [ClickPanTool(direction="right", factor=0.25)]
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=x_range,
        tools=[zoom, PanTool(**across), *clicks, ResetTool(), SaveTool()],
        active_drag=zoom,
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        name=name,
        **options,
    )
    plot.toolbar.logo = None
    _style_axes(plot)
    return plot


def _style_axes(plot: figure) -> None:
    from bokeh.models import BasicTickFormatter

    plot.xaxis.formatter, plot.xaxis.ticker = BasicTickFormatter(use_scientific=False), counting()
    plot.grid.grid_line_color, plot.grid.grid_line_alpha = INK, 0.08
    plot.axis.axis_line_color = plot.axis.minor_tick_line_color = None
    plot.axis.major_tick_line_color = FAINT
    plot.axis.major_label_text_color = plot.axis.axis_label_text_color = INK
    plot.axis.major_label_text_font_size = plot.axis.axis_label_text_font_size = "13px"
    plot.axis.axis_label_text_font_style = "normal"


def counting() -> Any:
    """Return ticks for steps and blocks: there are no halves."""
    from bokeh.models import BasicTicker

    return BasicTicker(min_interval=1)


def hover(plot: figure, renderer: Any, rows: Sequence[tuple[str, str]], **options: Any) -> None:
    """Show values under the pointer, of a few things that lie there.

    Args:
        plot: The chart.
        renderer: What is pointed at.
        rows: What a value is called, and its place in the data as Bokeh writes it, such as ``@step``.
        options: Of the tool.
    """
    from bokeh.models import HoverTool

    shown = "".join(f'<div><span style="opacity: 0.75">{label}</span> {value}</div>' for label, value in rows)
    tooltips = f'<div style="max-width: min(32rem, 70vw); overflow-wrap: anywhere">{shown}</div>'
    plot.add_tools(HoverTool(renderers=[renderer], tooltips=tooltips, limit=HOVERED, visible=False, **options))


def log_range(*values: Any, margin: float = 1.15) -> Range1d:
    """Return a range that holds all positive values, for a logarithmic axis."""
    from bokeh.models import Range1d

    flat = np.concatenate([np.ravel(np.asarray(item, dtype=float)) for item in values])
    flat = flat[np.isfinite(flat) & (flat > 0)]
    low, high = (flat.min(), flat.max()) if flat.size else (1.0, 1.0)
    return Range1d(float(low) / margin, float(high) * margin)


def shade_zone(plot: figure, zone: tuple[float, float] | None) -> None:
    """Mark ρ = 1, and the safe zone where there is one, on a chart of ratios."""
    from bokeh.models import BoxAnnotation, Label, Span

    plot.add_layout(Span(location=1.0, dimension="width", line_color=INK, line_width=1, line_alpha=0.7))
    if zone is None:
        return
    low, high = zone
    plot.add_layout(BoxAnnotation(bottom=low, top=high, fill_color=INK, fill_alpha=0.07, level="underlay"))
    for edge in zone:
        plot.add_layout(Span(location=edge, dimension="width", line_color=INK, line_dash="dashed", line_alpha=0.6))
    style = {"text_font_size": "12px", "text_color": INK, "text_align": "right", "x_units": "screen"}
    plot.add_layout(Label(x=0, y=high, x_offset=70, y_offset=-16, text="safe zone", **style))


def tick_powers_of_two(plot: figure) -> None:
    """Label an axis of ratios as its readers think, at most eight times."""
    low, high = math.ceil(math.log2(plot.y_range.start)), math.floor(math.log2(plot.y_range.end))
    powers = [power for power in range(low, high + 1) if power % math.ceil((high - low + 1) / 8) == 0]
    if len(powers) > 2:
        plot.yaxis.ticker = [2.0**power for power in powers]
        plot.yaxis.major_label_overrides = {2.0**power: power_of_two(power) for power in powers}


def colour_bar(plot: figure, mapper: Any, title: str) -> Any:
    """Put the scale of a chart's colours beside it."""
    from bokeh.models import ColorBar

    bar = ColorBar(color_mapper=mapper, title=title, width=12, background_fill_color=None, padding=4)
    bar.update(major_label_text_color=INK, title_text_color=INK, major_label_text_font_size="12px")
    plot.add_layout(bar, "right")
    return bar


def depth_colours(count: int) -> tuple[str, ...]:
    """Return colours from the first block (dark) to the last, which stay apart in grey and under colour blindness."""
    from bokeh.palettes import Viridis256

    # Without the yellow end, which is not seen on white.
    return tuple(Viridis256[round(position)] for position in np.linspace(0, 190, max(count, 2)))


def rounded(values: Floats) -> NDArray[np.float32]:
    """Round to ``MANTISSA`` bits, so that what is behind them compresses to nothing."""
    mantissa, exponent = np.frexp(values)
    scale = 2.0**MANTISSA
    return np.ldexp(np.round(mantissa * scale) / scale, exponent).astype(np.float32)

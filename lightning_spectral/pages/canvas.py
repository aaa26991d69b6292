"""Parts that all charts of a page share: size, tools, colours, hover, rounding."""

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

# As in the figures: blue is attention, red is the MLP (Okabe-Ito).
MLP, ATTENTION, INK, FAINT = "#d55e00", "#0072b2", "#22262b", "#6a7178"
HOVERED = 4  # values shown at one place under the pointer
MANTISSA = 14  # bits kept of a value in a chart (four digits), which halves the size of the page


def canvas(name: str, height: int, x_range: Range1d, **options: Any) -> figure:
    """Return an empty chart, as wide as its place in the page, with tools that can be reached by keyboard.

    Args:
        name: Name of the chart in the page.
        height: In pixels.
        x_range: Range of the x axis, shared by all charts with the same abscissa.
        options: Further options of the Bokeh figure.
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
    """Return ticks at whole numbers, for steps and blocks."""
    from bokeh.models import BasicTicker

    return BasicTicker(min_interval=1)


def hover(plot: figure, renderer: Any, rows: Sequence[tuple[str, str]], **options: Any) -> None:
    """Show the values under the pointer, of at most 4 marks.

    Args:
        plot: The chart.
        renderer: The marks that respond to the pointer.
        rows: Label of each value, and its field in Bokeh's notation, such as ``@step``.
        options: Further options of the tool.
    """
    from bokeh.models import HoverTool

    shown = "".join(f'<div><span style="opacity: 0.75">{label}</span> {value}</div>' for label, value in rows)
    tooltips = f'<div style="max-width: min(32rem, 70vw); overflow-wrap: anywhere">{shown}</div>'
    plot.add_tools(HoverTool(renderers=[renderer], tooltips=tooltips, limit=HOVERED, visible=False, **options))


def log_range(*values: Any, margin: float = 1.15) -> Range1d:
    """Return the range of a logarithmic axis that contains all positive values."""
    from bokeh.models import Range1d

    flat = np.concatenate([np.ravel(np.asarray(item, dtype=float)) for item in values])
    flat = flat[np.isfinite(flat) & (flat > 0)]
    low, high = (flat.min(), flat.max()) if flat.size else (1.0, 1.0)
    return Range1d(float(low) / margin, float(high) * margin)


def shade_zone(plot: figure, zone: tuple[float, float] | None) -> None:
    """Mark ρ = 1 and, if there is one, the safe zone on a chart of ratios."""
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
    """Label an axis of ratios with powers of two, at most eight labels."""
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
    """Return colours from the first block (dark) to the last, distinct in grey and under colour blindness."""
    from bokeh.palettes import Viridis256

    # Without the yellow end, which is invisible on white.
    return tuple(Viridis256[round(position)] for position in np.linspace(0, 190, max(count, 2)))


def rounded(values: Floats) -> NDArray[np.float32]:
    """Round to ``MANTISSA`` bits: the other bits become zeros, which compress to nothing."""
    mantissa, exponent = np.frexp(values)
    scale = 2.0**MANTISSA
    return np.ldexp(np.round(mantissa * scale) / scale, exponent).astype(np.float32)

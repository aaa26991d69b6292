"""Parts that all charts of a page share: size, tools, colours, hover, rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.display.figure import log_ticks, power_of_two
from lightning_spectral.pages.words import block_list, many

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

__all__ = [
    "canvas",
    "colour_bar",
    "counting",
    "depth_colours",
    "hover",
    "label_ends",
    "legend_above",
    "log_range",
    "rounded",
    "shade_zone",
    "tick_logs",
    "tick_ratios",
    "title_above",
]

Floats = NDArray[np.float64]

# As in the figures: blue is attention, red is the MLP (Okabe-Ito).
MLP, ATTENTION, INK, FAINT = "#d55e00", "#0072b2", "#22262b", "#6a7178"
AROUND = 90  # pixels of a chart above and below its frame
LINE, LABEL = 15, 22  # pixels of a line of text, and of a label with some air
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
        min_width=200,  # while a window changes, charts have none for a moment, and would leave ink at the left edge
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
    plot.toolbar.stylesheets = ["@media print { :host { display: none; } }"]  # the page's own do not reach into it
    _style_axes(plot)
    return plot


def _style_axes(plot: figure) -> None:
    from bokeh.models import BasicTickFormatter, NoOverlap

    plot.xaxis.formatter, plot.xaxis.ticker = BasicTickFormatter(use_scientific=False), counting()
    plot.xaxis.major_label_policy = NoOverlap(min_distance=4)  # charts are as narrow as the window
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
    from bokeh.models import BoxAnnotation, Span

    plot.add_layout(Span(location=1.0, dimension="width", line_color=INK, line_width=1, line_alpha=0.7))
    if zone is None:
        return
    low, high = zone
    plot.add_layout(BoxAnnotation(bottom=low, top=high, fill_color=INK, fill_alpha=0.07, level="underlay"))
    for edge in zone:
        plot.add_layout(Span(location=edge, dimension="width", line_color=INK, line_dash="dashed", line_alpha=0.6))


def tick_ratios(plot: figure, zone: tuple[float, float] | None) -> None:
    """Label an axis of ratios with powers of two and the edges of the safe zone, which the lines cannot cover there."""
    low, high = math.ceil(math.log2(plot.y_range.start)), math.floor(math.log2(plot.y_range.end))
    every = math.ceil((high - low + 1) / _room(plot))
    labels = {2.0**power: power_of_two(power) for power in range(low, high + 1) if power % every == 0}
    if len(labels) < 3:
        labels = {tick: f"{tick:.4g}" for tick in log_ticks(plot.y_range.start, plot.y_range.end, _room(plot))}
    if zone is not None:
        near = math.log(plot.y_range.end / plot.y_range.start) / _room(plot) / 2
        apart = {tick: text for tick, text in labels.items() if min(abs(math.log(tick / edge)) for edge in zone) > near}
        labels = apart | {edge: f"zone {labels.get(edge, f'{edge:g}')}" for edge in zone}
    plot.yaxis.ticker = sorted(labels)
    plot.yaxis.major_label_overrides = labels


def tick_logs(plot: figure) -> None:
    """Label a logarithmic axis with round numbers that do not collide."""
    ticks = log_ticks(plot.y_range.start, plot.y_range.end, _room(plot))
    plot.yaxis.ticker = ticks
    plot.yaxis.major_label_overrides = {tick: f"{tick:.6g}" for tick in ticks}


def _room(plot: figure) -> int:
    """Return how many labels find room on the y axis."""
    height: int = plot.height
    return max((height - AROUND) // LABEL, 2)


def label_ends(plot: figure, ends: Mapping[int, float]) -> None:
    """Label the ends of lines beside the chart, where no line can cover the labels.

    Args:
        plot: The chart.
        ends: Last value of each line, by the index of its block. Blocks that end side by side share a label.
    """
    from bokeh.models import FixedTicker, LinearAxis, LogAxis, LogScale

    logarithmic = isinstance(plot.y_scale, LogScale)
    reach = math.log if logarithmic else float
    low, high = reach(plot.y_range.start), reach(plot.y_range.end)
    nearest = (high - low) * LINE / (plot.height - AROUND)
    clusters: list[list[int]] = []
    for block in sorted(ends, key=ends.__getitem__):
        if clusters and reach(ends[block]) - reach(ends[clusters[-1][0]]) < nearest:
            clusters[-1].append(block)
        else:
            clusters.append([block])
    places = [float(np.mean([reach(ends[block]) for block in blocks])) for blocks in clusters]
    labels = {
        math.exp(place) if logarithmic else place: _short(blocks)
        for place, blocks in zip(places, clusters, strict=True)
    }
    axis = (LogAxis if logarithmic else LinearAxis)(ticker=FixedTicker(ticks=sorted(labels)), axis_label="block")
    axis.major_label_overrides = labels
    plot.add_layout(axis, "right")
    _style_axes(plot)


def _short(blocks: Sequence[int]) -> str:
    listed = block_list(blocks).partition(" ")[2]
    return listed if len(listed) <= 9 else many(len(blocks), "block")


def legend_above(plot: figure) -> None:
    """Put the legend of a chart above its frame, where it covers nothing."""
    legend = plot.legend[0]
    plot.add_layout(legend, "above")
    style = {"background_fill_alpha": 0, "border_line_color": None, "label_text_color": INK, "padding": 0}
    legend.update(orientation="horizontal", **style)
    legend.ncols = 2


def title_above(plot: figure, text: str) -> None:
    """Put a title above a chart, beside its tools, to tell it from others under the same heading."""
    style = {"text_color": INK, "text_font_size": "13px", "text_font_style": "normal"}
    plot.title.update(text=text, **style)


def colour_bar(plot: figure, mapper: Any, title: str | None = None) -> Any:
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

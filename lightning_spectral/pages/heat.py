"""The chart of the ratio over depth and time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_spectral.display.figure import power_of_two
from lightning_spectral.display.heatmap import scale_limit, step_edges
from lightning_spectral.pages.canvas import canvas, colour_bar, counting, hover, rounded
from lightning_spectral.runs.history import History

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

__all__ = ["heat_chart", "zone_palette"]

SHADES = 256
PALE, STRONG = 0.3, 0.5  # share of the palette used just inside, and just outside, an edge of the zone


def heat_chart(history: History, x_range: Range1d, zone: tuple[float, float] | None) -> figure:
    """Draw ρ of every block (upwards) at every measured step (to the right)."""
    from bokeh.models import FixedTicker, LogColorMapper

    ratios = history.values("ratio")
    blocks = ratios.shape[0]
    plot = canvas("heatmap", min(max(180 + 12 * blocks, 260), 620), x_range, y_range=(-0.5, blocks - 0.5))
    limit = scale_limit(np.log(ratios))
    mapper = LogColorMapper(zone_palette(limit, zone), low=2.0**-limit, high=2.0**limit, nan_color="#a3a8ad")
    pieces = dict(_pieces(ratios, history.steps))
    image = plot.image(image="image", x="x", y=-0.5, dw="dw", dh=blocks, source=pieces, color_mapper=mapper)
    hover(plot, image, [("block", "@block"), ("step", "@step"), ("ρ", "@image{%.4g}")], formatters={"@image": "printf"})
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer step", "block"
    plot.yaxis.ticker, plot.grid.grid_line_color = counting(), None
    labels = {2.0**power: power_of_two(power) for power in range(-limit, limit + 1)}
    if zone is not None:
        labels |= {edge: f"{labels.get(edge, f'{edge:g}')} zone" for edge in zone}
    bar = colour_bar(plot, mapper, "ρ")
    bar.update(ticker=FixedTicker(ticks=sorted(labels)), major_label_overrides=labels)
    return plot


def _pieces(ratios: Any, steps: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Cut the columns into images, because all columns of an image have one width. Each has its steps and blocks."""
    edges = step_edges(steps)
    cuts = np.flatnonzero(np.diff(np.diff(edges))) + 1
    pieces = np.split(np.arange(len(steps)), cuts)
    yield "x", [edges[piece[0]] for piece in pieces]
    yield "dw", [edges[piece[-1] + 1] - edges[piece[0]] for piece in pieces]
    yield "image", [rounded(ratios[:, piece]) for piece in pieces]
    shapes = [(ratios.shape[0], len(piece)) for piece in pieces]
    at = [np.asarray(steps, dtype=np.int32 if steps[-1] < 2**31 else np.float64)[piece] for piece in pieces]
    yield "step", [np.broadcast_to(columns, shape) for columns, shape in zip(at, shapes, strict=True)]
    rows = np.arange(ratios.shape[0], dtype=np.uint16)[:, None]
    yield "block", [np.broadcast_to(rows, shape) for shape in shapes]


def zone_palette(limit: int, zone: tuple[float, float] | None) -> tuple[str, ...]:
    """Return colours for log₂ ρ from -limit to limit: white at ρ = 1, pale inside the zone, strong outside.

    Args:
        limit: End of the scale, as a power of two.
        zone: Edges of the zone, where the colours jump; ``None`` for a scale without a jump.
    """
    from bokeh.palettes import RdBu11, interp_palette

    colours = interp_palette(RdBu11, 2 * SHADES + 1)
    powers = (np.arange(SHADES) + 0.5) / SHADES * 2 * limit - limit
    depth = np.abs(powers) / limit
    if zone is not None:
        edge = np.where(powers > 0, math.log2(zone[1]), -math.log2(zone[0]))
        inside = np.abs(powers) < edge
        beyond = (np.abs(powers) - edge) / np.maximum(limit - edge, 1e-9)
        depth = np.where(inside, PALE * np.abs(powers) / np.maximum(edge, 1e-9), STRONG + (1 - STRONG) * beyond)
    places = SHADES + np.sign(powers) * np.clip(depth, 0, 1) * SHADES
    return tuple(colours[round(float(place))] for place in places)

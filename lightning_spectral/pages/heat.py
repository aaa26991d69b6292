"""The chart of the ratio over depth and time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_spectral.display.figure import Floats, power_of_two
from lightning_spectral.display.heatmap import LIMIT, SOFTEST, step_edges
from lightning_spectral.pages.canvas import canvas, colour_bar, counting, hover, rounded
from lightning_spectral.pages.words import clear_name
from lightning_spectral.runs.history import History

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

__all__ = ["cells", "heat_chart", "zone_palette"]

SHADES = 128
PALE, STRONG = 0.3, 0.5  # share of the palette used just inside, and just outside, an edge of the safe zone


def heat_chart(history: History, x_range: Range1d, zone: tuple[float, float] | None) -> figure:
    """Draw ρ of every block (upwards) at every measured step (to the right)."""
    ratios = history.values("ratio")
    names = {layer.index: clear_name(layer.name) for measurement in history.measurements for layer in measurement}
    return cells("heatmap", ratios, history.steps, names, x_range, zone, "ρ")


def cells(
    name: str,
    ratios: Floats,
    steps: Sequence[int],
    names: Mapping[int, str],
    x_range: Range1d,
    zone: tuple[float, float] | None,
    label: str,
    edge: str = "zone",
) -> figure:
    """Draw ratios of every block (upwards) at every step (to the right), as colours.

    Args:
        name: Name of the chart in the page.
        ratios: Shape ``(blocks, steps)``, NaN for a gap.
        steps: The steps, rising.
        names: Module path of each block, by its index.
        x_range: Range of the x axis.
        zone: Interval of ratios whose colours are pale.
        label: What the ratios are.
        edge: What to call the edges of the interval beside the colours; empty for no name.
    """
    from bokeh.models import FixedTicker, LogColorMapper

    blocks = ratios.shape[0]
    plot = canvas(name, min(max(180 + 12 * blocks, 260), 620), x_range, y_range=(-0.5, blocks - 0.5))
    mapper = LogColorMapper(zone_palette(zone), low=2.0**-LIMIT, high=2.0**LIMIT, nan_color="#a3a8ad")
    pieces = dict(_pieces(ratios, steps, names))
    image = plot.image(image="image", x="x", y="y", dw="dw", dh=1, source=pieces, color_mapper=mapper)
    rows = [("block", "@block @name"), ("step", "@step"), (label, "@image{%.4g}")]
    hover(plot, image, rows, formatters={"@image": "printf"})
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer step", "block"
    plot.yaxis.ticker, plot.grid.grid_line_color = counting(), None
    labels = {2.0**power: power_of_two(power) for power in range(-LIMIT, LIMIT + 1)}
    if zone is not None and edge:
        labels |= {end: f"{labels.get(end, f'{end:g}')} {edge}" for end in zone}
    bar = colour_bar(plot, mapper)
    bar.update(ticker=FixedTicker(ticks=sorted(labels)), major_label_overrides=labels)
    return plot


def _pieces(ratios: Floats, steps: Sequence[int], names: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    """Cut the cells into images of one row each, so that each has one block, and columns of one width."""
    edges = step_edges(steps)
    cuts = np.flatnonzero(np.abs(np.diff(np.diff(edges))) > 1e-9) + 1
    columns = np.split(np.arange(len(steps)), cuts)
    at = np.asarray(steps, dtype=np.int32 if steps[-1] < 2**31 else np.float64)
    pieces = [(block, piece) for block in range(ratios.shape[0]) for piece in columns]
    yield "x", [edges[piece[0]] for _, piece in pieces]
    yield "y", [block - 0.5 for block, _ in pieces]
    yield "dw", [edges[piece[-1] + 1] - edges[piece[0]] for _, piece in pieces]
    yield "image", [rounded(ratios[block : block + 1, piece]) for block, piece in pieces]
    yield "step", [at[None, piece] for _, piece in pieces]
    yield "block", [block for block, _ in pieces]
    yield "name", [names.get(block, "") for block, _ in pieces]


def zone_palette(zone: tuple[float, float] | None) -> tuple[str, ...]:
    """Return the colours of ratios from 2**-LIMIT to 2**LIMIT: white at 1, pale inside the safe zone, strong outside.

    Args:
        zone: Edges of the safe zone, where the colours jump; ``None`` for a scale without a jump.
    """
    from bokeh.palettes import RdBu11, interp_palette

    colours = interp_palette(RdBu11, 2 * SHADES + 1)
    powers = (np.arange(SHADES) + 0.5) / SHADES * 2 * LIMIT - LIMIT
    depth = np.abs(powers) / LIMIT
    if zone is not None:
        edge = np.where(powers > 0, math.log2(zone[1]), -math.log2(zone[0]))
        inside = np.abs(powers) < edge
        beyond = (np.abs(powers) - edge) / np.maximum(LIMIT - edge, 1e-9)
        depth = np.where(inside, PALE * np.abs(powers) / np.maximum(edge, 1e-9), STRONG + (1 - STRONG) * beyond)
    places = SHADES + np.sign(powers) * np.clip(depth, 0, 1) * (1 - 2 * SOFTEST) * SHADES
    return tuple(colours[round(float(place))] for place in places)

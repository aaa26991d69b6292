"""One picture of a whole run: the spectral ratio over depth and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_spectral.display.figure import INK, Floats, new_figure, plain, power_of_two

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

__all__ = ["LIMIT", "heatmap_figure", "step_edges"]

# Red and blue can be told apart under every common colour blindness. The white between them is ρ = 1. The darkest tenth
# at either end is left out: a ratio outside is no fire.
COLOURS = "RdBu_r"
SOFTEST = 0.1
CENTRED: Any = {"rotation": "vertical", "ha": "center", "va": "center"}
LIMIT = 4
"""Power of two at which the colours end: from 1/16 to 16 in every run, so that two runs can be compared by colour."""


def heatmap_figure(
    values: Floats, steps: Sequence[int], linearization: str, zone: tuple[float, float] | None
) -> Figure:
    """Draw ln ρ of every block (upwards) at every measured step (to the right).

    Args:
        values: ln ρ, shape ``(blocks, measurements)``, NaN where a block has no ratio.
        steps: Optimizer step of every measurement, rising.
        linearization: The linearization of the measurements.
        zone: The safe zone, ``None`` for a linearization without one.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    blocks = values.shape[0]
    # Enough height for readable rows, up to the height of a page.
    figure = new_figure(min(max(2.6 + 0.22 * blocks, 3.6), 10.0))
    axes = figure.add_subplot()
    edges = step_edges(steps)
    mesh = _paint(axes, values, edges)
    if zone is not None:
        _enclose(axes, values, edges, zone)
    _label(axes, blocks, linearization)
    if len(steps) < 3:
        axes.set_xticks(list(steps))
    _scale(figure, axes, mesh, values, zone)
    return figure


def step_edges(steps: Sequence[int]) -> Floats:
    """Return the borders of the columns. A border lies halfway between two measurements."""
    points = np.asarray(steps, dtype=float)
    if len(points) == 1:
        return np.array([points[0] - 0.5, points[0] + 0.5])
    middle = (points[1:] + points[:-1]) / 2
    return np.concatenate([[2 * points[0] - middle[0]], middle, [2 * points[-1] - middle[-1]]])


def _paint(axes: Axes, values: Floats, edges: Floats) -> ScalarMappable:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    limit = LIMIT * math.log(2)
    colours = ListedColormap(colormaps[COLOURS](np.linspace(SOFTEST, 1 - SOFTEST, 256)))
    axes.patch.set(facecolor="#d9d9d9", hatch="////", edgecolor="#a6a6a6")  # visible where a ratio is missing
    rows = np.arange(values.shape[0] + 1) - 0.5
    return axes.pcolormesh(edges, rows, np.ma.masked_invalid(values), cmap=colours, vmin=-limit, vmax=limit)


def _enclose(axes: Axes, values: Floats, edges: Floats, zone: tuple[float, float]) -> None:
    """Draw a line between every two neighbours on different sides of an edge of the safe zone."""
    from matplotlib.collections import LineCollection

    low, high = np.log(zone)
    side = np.nan_to_num((values >= high).astype(float) - (values <= low), nan=0.0)
    rows = np.arange(values.shape[0] + 1) - 0.5
    lines = [
        [(edges[column + 1], rows[row]), (edges[column + 1], rows[row + 1])]
        for row, column in np.argwhere(np.diff(side, axis=1) != 0)
    ]
    lines += [
        [(edges[column], rows[row + 1]), (edges[column + 1], rows[row + 1])]
        for row, column in np.argwhere(np.diff(side, axis=0) != 0)
    ]
    axes.add_collection(LineCollection(lines, colors=INK, linewidths=1.2, capstyle="projecting"))


def _label(axes: Axes, blocks: int, linearization: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title("Spectral ratio ρ = ‖MLP‖₂ / ‖attention‖₂", loc="left", color=INK, fontsize=12, weight="bold")
    axes.set_title(f"linearization “{linearization}”", loc="right", color="#666666", fontsize=9)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel("block", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(blocks, 16)))
    axes.set_ylim(-0.5, blocks - 0.5)
    plain(axes)


def _scale(figure: Figure, axes: Axes, mesh: ScalarMappable, values: Floats, zone: tuple[float, float] | None) -> None:
    """Add the colour bar with the edges of the safe zone. Colours are even in ln ρ; labels are values of ρ."""
    beyond = np.abs(values[np.isfinite(values)]) > LIMIT * math.log(2)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=24, extend="both" if beyond.any() else "neither")
    powers = range(-LIMIT, LIMIT + 1)
    bar.set_ticks([power * math.log(2) for power in powers], labels=[power_of_two(power) for power in powers])
    bar.set_label("← attention larger      MLP larger →", color=INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=INK, labelsize=9)
    if zone is None:
        return
    for edge in zone:
        bar.ax.axhline(math.log(edge), color=INK, linewidth=1.2)
    middle = sum(map(math.log, zone)) / 2
    bar.ax.text(0.5, middle, "safe zone", transform=bar.ax.get_yaxis_transform(), color=INK, fontsize=7, **CENTRED)

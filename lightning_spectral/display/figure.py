"""Colours, type and size that all figures share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["log_ticks", "new_figure", "plain", "power_of_two"]

Floats = NDArray[np.float64]

INK = "#222222"
# From the Okabe-Ito palette, whose colours can be told apart under every common colour blindness. As in the heatmap,
# blue stands for attention and red for the MLP.
MLP, ATTENTION = "#d55e00", "#0072b2"


def new_figure(height: float) -> Figure:
    """Return a figure outside of pyplot's global state, as wide as a page.

    Args:
        height: In inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = "drawing needs matplotlib: pip install matplotlib"
        raise ModuleNotFoundError(message) from error
    return Figure(figsize=(8.0, height), dpi=150, layout="constrained")


def plain(axes: Axes) -> None:
    """Remove the frame and tone down the ticks of an axes."""
    axes.tick_params(length=3, color="#999999", labelcolor=INK, labelsize=9)
    axes.spines[:].set_visible(False)


def power_of_two(power: int) -> str:
    """Return a power of two as a fraction or a whole number: "1/4", "1", "4"."""
    return str(2**power) if power >= 0 else f"1/{2**-power}"


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return ticks for a logarithmic axis that do not collide: of all round ones that fit, the most.

    Args:
        low: Lower end of the axis, above 0.
        high: Upper end.
        most: How many labels find room on the axis, evenly spread.
    """
    span = math.log(high / low)
    fitting = [ticks for ticks in _round_ticks(low, high) if _gap(ticks) >= span / most]
    return max(fitting, key=len, default=[])


def _round_ticks(low: float, high: float) -> Iterator[list[float]]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for every in range(1, last - first + 2):
        yield _between([10.0**power for power in range(first, last + 1) if power % every == 0], low, high)
    for mantissas in ((1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        yield _between([m * 10.0**power for power in range(first, last + 1) for m in mantissas], low, high)
    # Within a decade or so, even steps.
    for power in range(first - 3, first + 2):
        for step in (1 * 10.0**power, 2 * 10.0**power, 5 * 10.0**power):
            if 2 <= (high - low) / step <= 100:
                multiples = range(math.ceil(low / step), math.floor(high / step) + 1)
                yield _between([round(k * step, 12 - power) for k in multiples], low, high)


def _between(ticks: list[float], low: float, high: float) -> list[float]:
    return [tick for tick in ticks if low <= tick <= high]


def _gap(ticks: list[float]) -> float:
    """Return the smallest distance of neighbours, in nats."""
    return min((math.log(b / a) for a, b in pairwise(ticks)), default=math.inf)

"""Colours, type and size that all figures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["new_figure", "plain", "power_of_two"]

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

"""What the figures have in common: ink, type and size."""

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
# Of the Okabe-Ito palette, which stays apart under every common colour blindness. Blue and red as in the heatmap, whose
# blue blocks are dominated by attention.
MLP, ATTENTION = "#d55e00", "#0072b2"


def new_figure(height: float) -> Figure:
    """Return a figure that belongs to no global state, as wide as a page and as many inches high as asked for.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = "drawing needs matplotlib; type: pip install 'lightning-spectral[plot]'"
        raise ModuleNotFoundError(message) from error
    return Figure(figsize=(8.0, height), dpi=150, layout="constrained")


def plain(axes: Axes) -> None:
    """Take away what is no data."""
    axes.tick_params(length=3, color="#999999", labelcolor=INK, labelsize=9)
    axes.spines[:].set_visible(False)


def power_of_two(power: int) -> str:
    """Return 2 to that power as a reader writes it: "1/4", "1", "4"."""
    return str(2**power) if power >= 0 else f"1/{2**-power}"

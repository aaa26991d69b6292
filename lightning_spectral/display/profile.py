"""One picture of one measurement: norms and ratio over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_spectral.display.figure import ATTENTION, INK, MLP, Floats, log_ticks, new_figure, plain, power_of_two

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["profile_figure"]


def profile_figure(
    blocks: Sequence[int],
    mlp_norms: Sequence[float | None],
    attention_norms: Sequence[float | None],
    ratios: Sequence[float | None],
    *,
    zone: tuple[float, float] | None,
    title: str,
) -> Figure:
    """Draw both norms (above) and the ratio (below) of every block, on logarithmic axes. A missing value is a gap.

    Args:
        blocks: Indices of the blocks.
        mlp_norms: Spectral norms of the MLP branches.
        attention_norms: Spectral norms of the attention branches.
        ratios: Spectral ratios.
        zone: The interval of ratios to shade, ``None`` for none.
        title: Title of the figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(5.4)
    above, below = figure.subplots(2, 1, sharex=True)
    indices = np.array(blocks)
    for label, colour, marker, norms in (("MLP", MLP, "o", mlp_norms), ("attention", ATTENTION, "s", attention_norms)):
        above.plot(indices, _column(norms), color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=label)
    _plain_logarithms(above)
    above.set_ylabel("spectral norm", color=INK)
    above.legend(frameon=False, fontsize=9, ncols=2, loc="upper right", bbox_to_anchor=(1.0, 1.16))
    _ratios(below, indices, _column(ratios), zone)
    for axes in (above, below):
        plain(axes)
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.6)
        axes.set_axisbelow(True)
    above.set_title(title, loc="left", color=INK, weight="bold")
    return figure


def _plain_logarithms(axes: Axes) -> None:
    """Make the y axis logarithmic, with labels such as 20 instead of 2 × 10¹."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_yscale("log")
    ticks = log_ticks(*axes.get_ylim())
    axes.set_yticks(ticks, labels=[f"{tick:.6g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _column(values: Sequence[float | None]) -> Floats:
    """Return an array with NaN for missing values and for 0, which has no place on a logarithmic axis."""
    return np.array([value or math.nan for value in values])


def _ratios(axes: Axes, blocks: Floats, ratios: Floats, zone: tuple[float, float] | None) -> None:
    """Draw bars that start at ρ = 1: upwards in the colour of the MLP, downwards in the colour of attention."""
    from matplotlib.ticker import MaxNLocator

    powers = np.log2(ratios)
    axes.bar(blocks, powers, color=np.where(powers > 0, MLP, ATTENTION), width=0.7)
    reach = max(2, math.ceil(float(np.nanmax(np.abs(powers))))) if np.isfinite(powers).any() else 2
    if zone is not None:
        axes.axhspan(*np.log2(zone), color="#999999", alpha=0.18, linewidth=0, zorder=0)
        axes.text(0.995, np.log2(zone[1]), "safe zone", color="#555555", fontsize=8, ha="right",
                  va="top", transform=axes.get_yaxis_transform())  # fmt: skip
    axes.axhline(0.0, color=INK, linewidth=0.8)
    ticks = range(-reach, reach + 1, max(1, reach // 4))
    axes.set_yticks(list(ticks), labels=[power_of_two(power) for power in ticks])
    axes.set_ylim(-reach, reach)
    axes.set_xlim(min(blocks, default=0) - 0.8, max(blocks, default=0) + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_ylabel("ρ = ‖MLP‖₂ / ‖attention‖₂", color=INK)
    axes.set_xlabel("block", color=INK)

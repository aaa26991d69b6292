"""Robust trends of short noisy series: does it rise or fall, and when does it reach a level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from lightning_spectral.records import Forecast

__all__ = ["Trend", "forecast", "trend"]


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through a series.

    Attributes:
        slope: Median of the slopes between all pairs of points, per unit of the abscissa.
        low: Lower end of the confidence interval of the slope.
        high: Upper end.
        level: Value of the line at the last abscissa.
        at: The last abscissa.
    """

    slope: float
    low: float
    high: float
    level: float
    at: float

    @property
    def falls(self) -> bool:
        """Whether the slope is negative beyond its uncertainty."""
        return self.high < 0

    @property
    def rises(self) -> bool:
        """Whether the slope is positive beyond its uncertainty."""
        return self.low > 0


def trend(x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95) -> Trend | None:
    """Fit a line by the estimator of Theil and Sen, which a fifth of outliers cannot turn round.

    The confidence interval is that of Sen, "Estimates of the regression coefficient based on Kendall's tau" (1968), by
    the normal approximation: it assumes independent deviations from the line. Smooth series have deviations that hang
    together, and their intervals are too narrow; ask for several confirmations before acting on one.

    Args:
        x: Abscissas, increasing.
        y: Values at them.
        confidence: Probability that the interval of the slope holds the true one.

    Returns:
        The trend, ``None`` with fewer than four points.
    """
    n = len(x)
    if n < 4:
        return None
    slopes = sorted((y[j] - y[i]) / (x[j] - x[i]) for i in range(n) for j in range(i + 1, n))
    slope = median(slopes)
    spread = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    lower, upper = round((len(slopes) - spread) / 2) - 1, round((len(slopes) + spread) / 2)
    low, high = slopes[max(lower, 0)], slopes[min(upper, len(slopes) - 1)]
    level = median(value - slope * abscissa for abscissa, value in zip(x, y, strict=True)) + slope * x[-1]
    return Trend(slope, low, high, level, x[-1])


def forecast(line: Trend, target: float) -> Forecast | None:
    """Say when a trend reaches a level.

    Args:
        line: The trend.
        target: The level.

    Returns:
        The forecast, ``None`` where the line does not lead there.
    """
    distance = target - line.level
    if distance == 0:
        return Forecast(line.at, line.at, line.at)
    if distance * line.slope <= 0:
        return None
    steep, flat = (line.low, line.high) if distance < 0 else (line.high, line.low)
    latest = line.at + distance / flat if distance * flat > 0 else math.inf
    return Forecast(line.at + distance / line.slope, line.at + distance / steep, latest)

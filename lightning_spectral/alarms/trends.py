"""Robust trends of short noisy series: whether a series rises or falls, and when it reaches a level."""

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
        high: Upper end of that interval.
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
        """Whether the whole confidence interval of the slope is below 0."""
        return self.high < 0

    @property
    def rises(self) -> bool:
        """Whether the whole confidence interval of the slope is above 0."""
        return self.low > 0


def trend(x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95) -> Trend | None:
    """Fit a line by the Theil-Sen estimator; outliers in up to a fifth of the points do not change its direction.

    The confidence interval is from Sen, "Estimates of the regression coefficient based on Kendall's tau" (1968), in the
    normal approximation. It assumes independent deviations from the line. Smooth series have correlated deviations, so
    that their intervals come out too narrow: ask for several confirmations before acting on one.

    Args:
        x: Abscissas, increasing.
        y: One value per abscissa.
        confidence: Probability that the interval contains the true slope.

    Returns:
        The trend, ``None`` for fewer than 4 points.
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
    """Return when a trend reaches a level.

    Args:
        line: The trend.
        target: The level.

    Returns:
        The forecast, ``None`` if the line does not lead to the level.
    """
    distance = target - line.level
    if distance == 0:
        return Forecast(line.at, line.at, line.at)
    if distance * line.slope <= 0:
        return None
    steep, flat = (line.low, line.high) if distance < 0 else (line.high, line.low)
    latest = line.at + distance / flat if distance * flat > 0 else math.inf
    return Forecast(line.at + distance / line.slope, line.at + distance / steep, latest)

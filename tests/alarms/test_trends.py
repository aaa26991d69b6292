"""Trends against scipy's, and their laws."""

from __future__ import annotations

import math
import random

import pytest
from scipy.stats import theilslopes

from lightning_spectral.alarms.trends import Trend, forecast, trend
from lightning_spectral.records import Forecast


@pytest.mark.parametrize("n", [4, 5, 10, 33])
@pytest.mark.parametrize("seed", range(5))
def test_the_line_is_that_of_scipy(n: int, seed: int):
    source = random.Random(seed)
    x = sorted(source.sample(range(1000), n))
    y = [0.01 * value + source.gauss(0.0, 2.0) for value in x]
    found, wanted = trend(x, y), theilslopes(y, x, method="joint")
    assert found is not None
    assert (found.slope, found.low, found.high) == pytest.approx((wanted[0], wanted[2], wanted[3]))
    assert found.level == pytest.approx(wanted[1] + wanted[0] * x[-1])


def test_a_straight_line_is_found_exactly_and_outliers_do_not_turn_it():
    x = list(range(20))
    y = [3.0 - 0.5 * value for value in x]
    line = trend(x, y)
    assert line is not None
    assert (line.slope, line.low, line.high, line.level) == pytest.approx((-0.5, -0.5, -0.5, 3.0 - 9.5))
    assert line.falls
    y[3], y[11] = 100.0, -100.0
    bent = trend(x, y)
    assert bent is not None
    assert bent.slope == pytest.approx(-0.5, abs=0.02)
    assert bent.falls
    assert not bent.rises


def test_noise_has_a_trend_about_as_often_as_the_confidence_says():
    source = random.Random(0)
    found = [trend(range(20), [source.gauss(0.0, 1.0) for _ in range(20)]) for _ in range(400)]
    called = sum(line is not None and (line.falls or line.rises) for line in found)
    assert called / 400 == pytest.approx(0.05, abs=0.03)


def test_too_few_points_are_no_trend():
    assert trend([0, 1, 2], [0.0, 1.0, 2.0]) is None


def test_a_forecast_says_when_and_how_surely():
    line = Trend(slope=-0.1, low=-0.2, high=-0.05, level=1.0, at=50.0)
    assert forecast(line, 0.5) == Forecast(55.0, 52.5, 60.0)
    assert forecast(line, 2.0) is None
    assert forecast(line, 1.0) == Forecast(50.0, 50.0, 50.0)
    unsure = forecast(Trend(slope=-0.1, low=-0.2, high=0.1, level=1.0, at=50.0), 0.5)
    assert unsure is not None
    assert unsure.latest == math.inf
    assert forecast(Trend(slope=0.1, low=0.05, high=0.2, level=1.0, at=0.0), 2.0) == Forecast(10.0, 5.0, 20.0)

"""Pure statistics of `collapses_report.py`: when a failure shows, when a signal tells of it, and how well.

Runs are the lines that `collapses_signals.condensed` makes. Larger scores are worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from evidence_statistics import Array, bootstrapped, configurations, roc_areas
from numpy.typing import NDArray

Run = Mapping[str, Any]
WINDOW, STALLED = 50, 0.99  # steps in a mean of losses; what the mean has to come to, of the mean before
COLLAPSED = 0.01  # of a token residual or of a spread over samples
LARGE_LOGIT = 100.0
MARGIN = 1.1
RULES, SEEDS, CASES = "for rules", "held-out seeds", "held-out cases"


def loss_shows(losses: Sequence[float]) -> int | None:
    """Return the step at which the loss shows a failure, ``None`` if it never does.

    It is the first step k ≥ 100 at which the mean of the last 50 losses is not below 0.99 of the mean of the 50 losses
    before, or the first step whose loss is not finite.
    """
    for step in range(1, len(losses) + 1):
        if not math.isfinite(losses[step - 1]):
            return step
        if step >= 2 * WINDOW:
            before, now = losses[step - 2 * WINDOW : step - WINDOW], losses[step - WINDOW : step]
            if not fmean(now) < STALLED * fmean(before):
                return step
    return None


def happening(truth: Sequence[Sequence[Any]], way: str | None = None) -> int | None:
    """Return the step of the first look at which a failure is there.

    Args:
        truth: Step, token residual, spread over samples, largest attention logit and whether all is finite.
        way: ``"tokens"``, ``"samples"``, ``"weights"`` (not finite) or ``"logits"``; by default any of the first three.
            The truth does not show other ways.
    """
    for step, residual, spread, logit, finite in truth:
        there = {
            "tokens": residual is not None and residual < COLLAPSED,
            "samples": spread is not None and spread < COLLAPSED,
            "weights": not finite,
            "logits": logit is not None and logit > LARGE_LOGIT,
        }
        if any(there.get(name, False) for name in ((way,) if way else ("tokens", "samples", "weights"))):
            return int(step)
    return None


def score(
    steps: Sequence[int], values: Sequence[float | None], until: float, *, low: bool, latest: bool = False
) -> float:
    """Return the worst or the latest value up to a step, larger where worse; NaN where there is none."""
    found = [
        -value if low else value
        for step, value in zip(steps, values, strict=True)
        if step <= until and value is not None
    ]
    if not found:
        return math.nan
    return found[-1] if latest else max(found)


def threshold(extremes: Sequence[float], *, low: bool) -> float | None:
    """Return the most extreme value with a margin of 10 %, ``None`` without a value."""
    if not extremes:
        return None
    return min(extremes) / MARGIN if low else max(extremes) * MARGIN


def told(steps: Sequence[int], values: Sequence[float | None], limit: float, *, low: bool) -> int | None:
    """Return the first step with a value beyond a threshold."""
    for step, value in zip(steps, values, strict=True):
        if value is not None and (value < limit if low else value > limit):
            return step
    return None


def areas(
    scores: Array, label: NDArray[np.bool_], clusters: NDArray[np.int64], draws: int
) -> tuple[Array, Array, Array]:
    """Return the area under the ROC curve of every column and the ends of its interval, which resamples clusters.

    Runs without a score are left out, column by column. A column without a run of each class is NaN.
    """
    value, low, high = np.full((3, scores.shape[1]), math.nan)
    here = ~np.isnan(scores)
    masks: dict[bytes, list[int]] = {}
    for column in range(scores.shape[1]):
        masks.setdefault(here[:, column].tobytes(), []).append(column)
    for columns in masks.values():
        rows = here[:, columns[0]]
        if len(set(label[rows])) == 2:
            part, of = scores[rows][:, columns], label[rows]
            found = bootstrapped(_area_of_drawn(of, part), clusters[rows], draws)
            value[columns], low[columns], high[columns] = found[:3]
    return value, low, high


def areas_within(
    scores: Array, label: NDArray[np.bool_], clusters: NDArray[np.int64], draws: int
) -> tuple[Array, Array, Array]:
    """Return the same as ``areas`` of pairs of runs that have their cluster in common."""
    wins, pairs = np.zeros((2, len(np.unique(clusters)), scores.shape[1]))
    for place, cluster in enumerate(np.unique(clusters)):
        bad, good = (scores[(clusters == cluster) & (label == side)] for side in (True, False))
        difference = bad[:, None] - good[None]
        wins[place] = np.nansum(0.5 * (1 + np.sign(difference)), axis=(0, 1))
        pairs[place] = (~np.isnan(difference)).sum(axis=(0, 1))

    def of(drawn: NDArray[np.int64]) -> Array:
        with np.errstate(invalid="ignore"):
            return np.asarray(wins[drawn].sum(axis=0) / pairs[drawn].sum(axis=0))

    return bootstrapped(of, np.arange(len(wins)), draws)[:3]


def _area_of_drawn(label: NDArray[np.bool_], scores: Array) -> Callable[[NDArray[np.int64]], Array]:
    return lambda drawn: roc_areas(label[drawn], scores[drawn])


def median_of(values: Sequence[float], runs: Sequence[Run], draws: int) -> tuple[float, float, float]:
    """Return the median of a value per run, and the ends of its interval, which resamples cases."""
    if not values:
        return math.nan, math.nan, math.nan
    numbers = np.array(values, dtype=float)
    found = bootstrapped(
        lambda drawn: np.asarray(np.median(numbers[drawn])), configurations(runs, ("case",)), max(draws, 2)
    )
    return float(found[0]), float(found[1]), float(found[2])


@dataclass(frozen=True, slots=True)
class Split:
    """Which runs rules and thresholds may be chosen by. All others are held out."""

    cases: frozenset[str]
    seeds: frozenset[int]

    def part(self, run: Run) -> str:
        """Return the part that a run belongs to: for rules, held-out seeds of their cases, or held-out cases."""
        if run["case"] not in self.cases:
            return CASES
        return RULES if run["seed"] in self.seeds else SEEDS


def label_of(run: Run) -> str:
    """Return ``"fails"``, ``"healthy"``, ``"control"`` for a sick run that only its loss tells of, or ``"left out"``.

    A sick twin that did not fail is left out, and a healthy twin that did not learn. A healthy twin that learns is
    healthy, whatever its tokens do: a pooled classifier may make them alike.
    """
    if run["twin"] == "healthy":
        return "left out" if {"loss", "weights", "still"} & set(run["verdict"].split()) else "healthy"
    if not run["verdict"]:
        return "left out"
    return "control" if run["fails_by"] == "loss" else "fails"


def event_step(run: Run, names: Sequence[str]) -> int | None:
    """Return the step of the first event of some rules."""
    return min((step for name, _, step, _ in run["events"] if name in names), default=None)

"""Blocks outside the safe zone at the end of a run: since when, by which branch, and whether they still move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from lightning_spectral.alarms.rules import told_side
from lightning_spectral.display.figure import Floats
from lightning_spectral.pages.words import clear_name, many
from lightning_spectral.records.comparison import moved_by
from lightning_spectral.records.text import numbered
from lightning_spectral.runs.history import History

__all__ = ["Stay", "branch_that_moved", "returned", "stays"]

STEADY = math.log(1.1)  # a ratio that stays this close to its last value is steady
LEAST = 3  # measurements that it takes to call a ratio steady


@dataclass(frozen=True, slots=True)
class Stay:
    """A block that is outside the safe zone at the last measurement.

    Attributes:
        index: Index of the block.
        name: Its module path, safe to show.
        side: The side of the safe zone.
        ratio: ρ at the end.
        excess: Distance to the edge of the safe zone, in ln ρ.
        since: Step at which the stay began; ``None`` for a block that was outside from the first measurement on.
        first: Step of the first measurement of the block.
        mlp_growth: Norm of the MLP at the end over the norm at the first measurement.
        attention_growth: The same for the attention.
        steady: Steps for which the ratio has been steady; ``None`` while it moves, or with too few measurements.
        recent: Factor by which the ratio has changed over the last measurements, and over how many steps; ``None`` with
            too few measurements.
    """

    index: int
    name: str
    side: Literal["above", "below"]
    ratio: float
    excess: float
    since: int | None
    first: int
    mlp_growth: float
    attention_growth: float
    steady: int | None
    recent: tuple[float, int] | None

    @property
    def when(self) -> str:
        """Since when, in words."""
        return "from the start" if self.since is None else f"since step {self.since:,}"

    @property
    def moves(self) -> bool:
        """Whether the ratio still moves at the end."""
        return self.steady is None and self.recent is not None

    @property
    def course(self) -> str:
        """Where the ratio goes, in words."""
        if self.steady is not None:
            return f"steady for {many(self.steady, 'step')}"
        if self.recent is None:
            return "too short to say whether it moves"
        factor, steps = self.recent
        return f"still {'rising' if factor > 1 else 'falling'} (×{factor:.3g} in the last {many(steps, 'step')})"

    def __str__(self) -> str:
        """Return one sentence."""
        head = f"Block {numbered(self)}: {self.side} {self.when}, {self.course}, ρ = {self.ratio:.4g}"
        if self.mlp_growth == self.attention_growth == 1.0:
            return f"{head}."
        return f"{head}; its MLP {_grown(self.mlp_growth)}, its attention {_grown(self.attention_growth)}."


def stays(history: History, zone: tuple[float, float]) -> tuple[Stay, ...]:
    """Return the blocks that are outside the safe zone at the end, the farthest first."""
    ratios, steps = history.values("log_ratio"), np.asarray(history.steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        norms = [np.log(history.values(name)) for name in ("mlp_norm", "attention_norm")]
    found = []
    for index, name in {layer.index: clear_name(layer.name) for layer in history.measurements[-1]}.items():
        series = ratios[index]
        if not np.isfinite(series[-1]) or math.log(zone[0]) < series[-1] < math.log(zone[1]):
            continue
        seen = np.flatnonzero(np.isfinite(series))
        mlp, attention = (_exp(float(norm[index, seen[-1]] - norm[index, seen[0]])) for norm in norms)
        found.append(_stay(index, name, series[seen], steps[seen], zone, (mlp, attention)))
    return tuple(sorted(found, key=lambda stay: -stay.excess))


def _stay(
    index: int, name: str, series: Floats, steps: Floats, zone: tuple[float, float], growth: tuple[float, float]
) -> Stay:
    low, high = math.log(zone[0]), math.log(zone[1])
    above = bool(series[-1] >= high)
    sides = list(accumulate(series, lambda side, value: told_side(side, _exp(value), zone), initial=0))[1:]
    others = [place for place, side in enumerate(sides) if side != sides[-1]]
    begin = others[-1] + 1 if others else 0
    last = float(series[-1])
    moved = np.flatnonzero(np.abs(series - last) > STEADY)
    calm = int(moved[-1]) + 1 if moved.size else 0
    past = max(len(series) - 1 - LEAST, 0)
    return Stay(
        index,
        name,
        "above" if above else "below",
        _exp(last),
        last - high if above else low - last,
        None if begin == 0 else int(steps[begin]),
        int(steps[0]),
        *growth,
        int(steps[-1] - steps[calm]) if len(series) - calm >= LEAST else None,
        (_exp(last - float(series[past])), int(steps[-1] - steps[past])) if len(series) > LEAST else None,
    )


def _exp(value: float) -> float:
    """Return e to a power, between the smallest and the largest float: a damaged file may say anything."""
    return math.exp(min(max(value, -700.0), 700.0))


def branch_that_moved(stay: Stay) -> Literal["MLP", "attention", "both", "neither"]:
    """Return the branch that has moved the ratio outwards since the first measurement.

    ln ρ has changed by ln(growth of the MLP) - ln(growth of the attention).
    """
    sign = 1 if stay.side == "above" else -1
    parts = sign * math.log(stay.mlp_growth), -sign * math.log(stay.attention_growth)
    return moved_by(*parts) if max(parts) >= STEADY else "neither"


def _grown(factor: float) -> str:
    if abs(math.log(factor)) < math.log(1.05):
        return "stayed"
    return f"grew ×{factor:.2g}" if factor > 1 else f"shrank to ×{factor:.2g}"


def returned(history: History, zone: tuple[float, float]) -> Iterator[tuple[int, int]]:
    """Yield the blocks that were outside once and are inside at the end, and the step since which they are inside."""
    ratios, steps = history.values("log_ratio"), history.steps
    low, high = np.log(zone)
    for layer in history.measurements[-1]:
        series = ratios[layer.index]
        outside = np.flatnonzero((series <= low) | (series >= high))
        inside = np.flatnonzero((series > low) & (series < high))
        if outside.size and inside.size and inside[-1] > outside[-1]:
            yield layer.index, steps[int(inside[inside > outside[-1]][0])]

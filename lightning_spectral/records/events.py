"""The events of a run, and the forecast that an event may carry. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Event", "Forecast"]

Level = Literal["info", "warning", "alarm"]


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a trend reaches a level.

    Attributes:
        at: Abscissa at which the line reaches the level.
        earliest: Abscissa at which the steepest line of the confidence interval reaches the level.
        latest: Abscissa at which the flattest line reaches the level; infinite where the flattest line never does.
    """

    at: float
    earliest: float
    latest: float


@dataclass(frozen=True, slots=True)
class Event:
    """One announcement of a run. The same news is announced once.

    Attributes:
        level: ``"info"``, ``"warning"`` or ``"alarm"``.
        step: Optimizer step of the measurement that led to the event.
        since: Optimizer step at which the announced state began.
        blocks: Indices of the blocks that the event is about.
        message: What happened, with numbers, and what to try.
        forecast: When the token residual behind the last block reaches collapse; ``None`` where no trend leads there.
    """

    level: Level
    step: int
    since: int
    blocks: tuple[int, ...]
    message: str
    forecast: Forecast | None = None

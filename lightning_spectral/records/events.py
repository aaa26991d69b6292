"""The events of a run, and the forecast that an event may carry. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Event", "Forecast", "Level"]

Level = Literal["note", "warning", "failure"]


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
        level: ``"failure"``: the run has failed (something is not finite, all tokens or all samples are one, nothing
            moves). ``"warning"``: a signal that came before failures in this project's benchmark. ``"note"``: news
            that is neither.
        step: Optimizer step of the measurement that led to the event.
        since: Optimizer step at which the announced state began.
        blocks: Indices of the blocks that the event is about.
        message: What happened, with numbers, and what to try.
        forecast: When the token residual behind the last block reaches collapse; ``None`` where no trend leads there.
        name: Name of the rule, such as ``"tokens_collapsed"``; it never changes.
        branch: ``"mlp"`` or ``"attention"``, where the event is about one of them.
        values: The numbers in the message, by name. The documentation of the monitor has their units.
        advice: What to try, the first thing first, as names that never change.
    """

    level: Level
    step: int
    since: int
    blocks: tuple[int, ...]
    message: str
    forecast: Forecast | None = None
    name: str = ""
    branch: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

"""Loss and learning rate of a run, read from the files that Lightning's loggers leave in its folder.

``metrics.csv`` (CSVLogger) comes first; else the event files of TensorBoard, which tensorboard's own reader reads.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "Logged", "read_logged"]

Floats = NDArray[np.float64]

LOSS = re.compile(r"loss|(^|[/_.])(nll|ce|perplexity|ppl)($|[/_.])", re.IGNORECASE)
RATE = re.compile(r"(^|[/_.])(lr|learning[_-]?rate)($|[/_.-])", re.IGNORECASE)
MOST_CURVES = 6  # of one kind: more of them in one chart cannot be told apart
MOST_POINTS = 2000  # of one curve: a screen has no more columns
_STEP = "step"


@dataclass(frozen=True, slots=True)
class Curve:
    """One logged quantity over the run.

    Attributes:
        name: The name under which the user logged it.
        steps: Optimizer steps, rising; shape ``(points,)``.
        values: Shape ``(points,)``; NaN and infinities as they were logged.
    """

    name: str
    steps: Floats
    values: Floats

    @property
    def broke_at(self) -> int | None:
        """Step of the first value of the last stretch that is not finite; ``None`` for a curve that ends finite."""
        finite = np.flatnonzero(np.isfinite(self.values))
        after = 0 if finite.size == 0 else int(finite[-1]) + 1
        return int(self.steps[after]) if after < len(self.steps) else None

    def thinned(self) -> Curve:
        """Return the smallest and the largest value of each of many stretches, so that no spike is lost."""
        if len(self.steps) <= MOST_POINTS:
            return self
        kept: list[int] = []
        for piece in np.array_split(np.arange(len(self.steps)), MOST_POINTS // 2):
            finite = piece[np.isfinite(self.values[piece])]
            ends = (
                (finite[np.argmin(self.values[finite])], finite[np.argmax(self.values[finite])])
                if finite.size
                else (piece[0],)
            )
            kept += sorted({int(place) for place in ends})
        return Curve(self.name, self.steps[kept], self.values[kept])


@dataclass(frozen=True, slots=True)
class Logged:
    """What the loggers of a run have left in its folder.

    Attributes:
        losses: The curves whose name says that they are losses.
        rates: The curves whose name says that they are learning rates.
        missing: Why there are none although there may be a file, as a sentence; ``None`` otherwise.
    """

    losses: tuple[Curve, ...] = ()
    rates: tuple[Curve, ...] = ()
    missing: str | None = None


NOTHING = Logged()


def read_logged(journal: Path, measured: Sequence[int]) -> Logged:
    """Read the losses and learning rates that lie beside the file of a run.

    A logger counts batches with a step of an optimizer, the monitor counts optimizer steps. The two differ if a batch
    has several steps, as with several optimizers. The monitor's own keys among the logged ones then tell which index
    belongs to which step.

    Args:
        journal: The file of the run. Its name without suffix is the prefix of the monitor's keys.
        measured: Optimizer steps of the measurements.
    """
    found, missing = _tables(journal.parent)
    own = [steps for name, (steps, _) in found.items() if name.startswith(journal.stem)]
    logged = np.unique(np.concatenate(own)) if own else np.zeros(0)
    curves = [
        Curve(name, _as_counted(steps, logged, measured), values)
        for name, (steps, values) in sorted(found.items())
        if not name.startswith(journal.stem)
    ]
    losses, rates = (
        tuple(curve for curve in curves if pattern.search(curve.name))[:MOST_CURVES] for pattern in (LOSS, RATE)
    )
    return Logged(losses, rates, None if losses or rates else missing)


def _as_counted(steps: Floats, logged: Floats, measured: Sequence[int]) -> Floats:
    """Turn indices of a logger into optimizer steps, by the measurements that both have."""
    if len(logged) != len(measured) or len(measured) < 2 or np.array_equal(logged, measured):
        return steps
    beyond = np.maximum(steps - logged[-1], 0.0)
    places: Floats = np.interp(steps, logged, np.asarray(measured, dtype=float)) + beyond
    return places


def _tables(folder: Path) -> tuple[Mapping[str, tuple[Floats, Floats]], str | None]:
    """Return steps and values by name, and why there may be more."""
    table = folder / "metrics.csv"
    if table.is_file():
        found = _from_csv(table)
        if any(LOSS.search(name) for name in found):
            return found, None
    if not any(folder.glob("events.out.tfevents.*")):
        return {}, None
    try:
        return _from_events(folder), None
    except ModuleNotFoundError:
        return {}, (
            "The loss lies in event files of TensorBoard, which only the package tensorboard can read: "
            "pip install tensorboard"
        )


def _from_csv(path: Path) -> Mapping[str, tuple[Floats, Floats]]:
    """Read the columns of ``metrics.csv``. What is no number is left out: the run may be writing the last row."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            step = _number(row.get(_STEP))
            if step is None or not math.isfinite(step):
                continue
            for name, text in row.items():
                if name and name != _STEP and (value := _number(text)) is not None:
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    return {name: _in_order(*pair) for name, pair in columns.items()}


def _from_events(folder: Path) -> Mapping[str, tuple[Floats, Floats]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few = {"images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1}
    events = EventAccumulator(str(folder), size_guidance=few | {"scalars": 0})  # 0: all of them
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        found[name] = _in_order([point.step for point in points], [point.value for point in points])
    return found


def _in_order(steps: Sequence[float], values: Sequence[float]) -> tuple[Floats, Floats]:
    """Sort by step. Of two values at one step, the later one counts: a run that resumes logs steps anew."""
    by_step = dict(zip(steps, values, strict=True))
    order = sorted(by_step)
    return np.array(order, dtype=float), np.array([by_step[step] for step in order], dtype=float)


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) else None
    except ValueError:
        return None

"""What was measured, when, by what and at what cost: the facts of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from statistics import median
from typing import Any

from lightning_spectral.pages.words import clear, many
from lightning_spectral.runs.history import History

__all__ = ["facts_of"]


def facts_of(history: History) -> tuple[tuple[str, str], ...]:
    """Return names and values. What the file does not say, as of an early release, is left out."""
    return tuple(_facts(history))


def _facts(history: History) -> Iterator[tuple[str, str]]:
    first, last = history.measurements[0], history.measurements[-1]
    model = history.header.get("model")
    blocks = many(len(last.layers), "block")
    if isinstance(model, dict):
        size = _count(model.get("parameters"))
        known = [clear(str(model.get("name"))), *([f"{size} parameters"] if size else []), blocks]
        yield "model", ", ".join(known)
    else:
        yield "model", blocks
    steps = f"step {last.step:,}" if first is last else f"steps {first.step:,} to {last.step:,}"
    yield "measured", f"{many(len(history.measurements), 'time')}, {steps}, linearization “{clear(last.linearization)}”"
    if history.times:
        began, ended = min(history.times.values()), max(history.times.values())
        yield "date", _dates(began, ended)
        if ended > began:
            yield "duration", _duration(ended - began)
    yield "cost of measuring", _cost(history)
    versions = history.header.get("versions")
    if isinstance(versions, dict) and versions:
        yield "versions", _versions(versions)


def _cost(history: History) -> str:
    seconds = [measurement.seconds for measurement in history.measurements]
    spent = f"{_duration(sum(seconds))}, {_duration(median(seconds))} a measurement"
    ended = max(history.times.values(), default=0.0) - min(history.times.values(), default=0.0)
    # The clock starts when the first measurement is written.
    return f"{spent} ({100 * sum(seconds[1:]) / ended:.2g} % of the duration)" if ended > 1 else spent


def _dates(began: float, ended: float) -> str:
    first, last = (datetime.fromtimestamp(moment, UTC) for moment in (began, ended))
    until = "" if ended - began < 60 else f" to {last:{'%H:%M' if first.date() == last.date() else '%Y-%m-%d %H:%M'}}"
    return f"{first:%Y-%m-%d %H:%M}{until} UTC"


def _duration(seconds: float) -> str:
    """Return a duration as a person says it: "32 ms", "4.1 s", "12 min", "3 h 20 min", "2 days 4 h"."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{many(hours // 24, 'day')} {hours % 24} h"


def _count(value: Any) -> str | None:
    """Return a large number in three digits: "3.01 M"."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**15:
        return None
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{clear(str(name), 40)} {clear(str(value), 40)}" for name, value in list(versions.items())[:10])

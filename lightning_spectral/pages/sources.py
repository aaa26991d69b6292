"""The files of runs: found in folders, and read."""

from __future__ import annotations

from pathlib import Path

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.pages.words import clear, damaged_lines
from lightning_spectral.runs.entries import entries
from lightning_spectral.runs.history import History
from lightning_spectral.runs.predecessor import is_set_aside

__all__ = ["NothingMeasuredError", "find_run", "read_measured"]

FILE = "spectral.jsonl"
LISTED = 10  # runs named in an error


class NothingMeasuredError(ConfigurationError):
    """A run has no measurement yet."""


def read_measured(source: Path) -> History:
    """Read a run that has at least one measurement.

    Raises:
        NothingMeasuredError: It has none.
        ConfigurationError, OSError: As for :meth:`History.read`.
    """
    history = History.read(source)
    if not history.measurements:
        why = damaged_lines(history) if history.damaged else "nothing was measured yet"
        raise NothingMeasuredError(f"{clear(str(source), 300)}: {why}")
    return history


def find_run(place: Path) -> Path:
    """Return the file of the one run at a path or below.

    Raises:
        ConfigurationError: There is no run, or more than one.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise ConfigurationError(f"{clear(str(place), 300)}: no such file or folder")
    if (place / FILE).is_file():
        return place / FILE
    # The prefix of the monitor is the name of the file, so the name may be another one.
    runs = sorted(path for path in place.rglob("*.jsonl") if path.is_file() and _is_run(path))
    found = [path for path in runs if not is_set_aside(path)] or runs
    if not found:
        raise ConfigurationError(f"{clear(str(place), 300)}: no {FILE} in this folder or below")
    if len(found) > 1:
        listed = "; ".join(clear(str(path), 300) for path in found[:LISTED])
        more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise ConfigurationError(
            f"{clear(str(place), 300)}: found {len(found)} runs, expected one; name one of them: {listed}{more}"
        )
    return found[0]


def _is_run(path: Path) -> bool:
    try:
        return bool(next(entries(path)).header)
    except (ConfigurationError, OSError):
        return False

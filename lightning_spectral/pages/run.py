"""The page of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.pages.captions import ACTIONS, EVENTS, LINES, ZONE
from lightning_spectral.pages.curves import QUANTITIES, run_charts
from lightning_spectral.pages.findings import summary_of
from lightning_spectral.pages.page import Section, check_installed, write_page
from lightning_spectral.pages.stays import stays
from lightning_spectral.pages.tables import (
    action_table,
    block_table,
    event_table,
    norms_table,
    series_table,
    settings,
)
from lightning_spectral.pages.timeline import timeline
from lightning_spectral.pages.words import clear, damaged_lines, zone_of
from lightning_spectral.runs.entries import entries
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logged import read_logged
from lightning_spectral.runs.predecessor import is_set_aside

if TYPE_CHECKING:
    from bokeh.plotting import figure

__all__ = ["NothingMeasured", "find_run", "read_measured", "report", "write_run_page"]

FILE = "spectral.jsonl"
LISTED = 10  # runs named in an error


class NothingMeasured(ConfigurationError):
    """A run has no measurement yet."""


def report(run_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write a finished or unfinished run as one HTML page that needs no network.

    Args:
        run_dir: The file of a run (``spectral.jsonl``), its folder, or a folder above it.
        output: Path of the page; beside the file of the run by default.

    Returns:
        Path of the page.

    Raises:
        ConfigurationError: There is no run, or more than one, or no measurement can be read.
        ModuleNotFoundError: The extra ``report`` is not installed.
        OSError: A file cannot be read or written.

    Example:
        >>> report("runs/gpt/version_0").name
        'spectral.html'
    """
    check_installed()
    source = find_run(Path(run_dir))
    page = source.with_suffix(".html") if output is None else Path(output)
    write_run_page(source, page)
    return page


def write_run_page(source: Path, page: Path, *, reload: float | None = None) -> None:
    """Write the page of one run.

    Args:
        source: The file of the run.
        page: The page.
        reload: Seconds after which the page loads itself again, ``None`` for never.

    Raises:
        NothingMeasured: There is no measurement yet.
        ConfigurationError, OSError: As for :func:`report`.
    """
    history = read_measured(source)
    logged = read_logged(source, history.steps)
    charts = run_charts(history, logged)
    summary, sections = summary_of(history, logged), _sections(history, charts)
    write_page(page, "Spectral report", clear(str(source), 300), summary, sections, charts, reload=reload)


def read_measured(source: Path) -> History:
    """Read a run that has at least one measurement.

    Raises:
        NothingMeasured: It has none.
        ConfigurationError, OSError: As for :meth:`History.read`.
    """
    history = History.read(source)
    if not history.measurements:
        why = damaged_lines(history) if history.damaged else "nothing was measured yet"
        raise NothingMeasured(f"{clear(str(source), 300)}: {why}")
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


def _sections(history: History, charts: Mapping[str, figure]) -> Sequence[Section]:
    """Return the sections of the page that have content."""
    last = history.measurements[-1]
    zone = zone_of(last)
    table = norms_table(last, () if zone is None else stays(history, zone))
    told = (settings(history.header), *block_table(history.header))
    return [
        *_drawn(history, charts),
        Section("Blocks at the end", "The last measurement.", tables=(table,), unfolded=True),
        Section("Settings of the run", "The settings, and the blocks that were found.", tables=told, unfolded=True),
    ]


def _drawn(history: History, charts: Mapping[str, figure]) -> Iterator[Section]:
    zone = zone_of(history.measurements[-1])
    for title, caption, names in LINES:
        shown = tuple(name for name in names if name in charts)
        if not shown:
            continue
        quantity = "ratio" if "heatmap" in shown else shown[0]
        numbers = {name: QUANTITIES[name][0] for name in (quantity, *shown[1:]) if name in QUANTITIES}
        tables = () if "ratio" in shown or not numbers else (series_table(history, numbers),)
        yield Section(title, caption + (ZONE.format(*zone) if zone and quantity == "ratio" else ""), shown, tables)
    if "events" in charts:
        yield Section("Failures, warnings and notes", EVENTS, ("events",), (event_table(timeline(history)),))
    if "actions" in charts:
        yield Section("What the controller did", ACTIONS, ("actions",), (action_table(history),))

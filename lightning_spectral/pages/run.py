"""The page of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_spectral.pages.captions import ACTIONS, EVENTS, LINES, ZONE
from lightning_spectral.pages.curves import QUANTITIES, run_charts
from lightning_spectral.pages.findings import summary_of
from lightning_spectral.pages.page import Section, write_page
from lightning_spectral.pages.sources import read_measured
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
from lightning_spectral.pages.words import clear, zone_of
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logged import read_logged

if TYPE_CHECKING:
    from bokeh.plotting import figure

__all__ = ["write_run_page"]


def write_run_page(source: Path, page: Path, *, reload: float | None = None) -> None:
    """Write the page of one run.

    Args:
        source: The file of the run.
        page: The page.
        reload: Seconds after which the page loads itself again, ``None`` for never.

    Raises:
        NothingMeasuredError: There is no measurement yet.
        ConfigurationError, OSError: As for :func:`report`.
    """
    history = read_measured(source)
    logged = read_logged(source, history.steps)
    charts = run_charts(history, logged)
    summary, sections = summary_of(history, logged), _sections(history, charts)
    write_page(page, "Spectral report", clear(str(source), 300), summary, sections, charts, reload=reload)


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

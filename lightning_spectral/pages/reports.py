"""Reports: the page of one run, or of several laid over each other, once or again and again while they go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.pages.overlay import write_overlay
from lightning_spectral.pages.page import check_installed
from lightning_spectral.pages.run import write_run_page
from lightning_spectral.pages.sources import NothingMeasuredError, find_run

__all__ = ["report", "watch_report"]

A_DAY = 86_400  # seconds

Runs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def report(run_dir: Runs, output: str | os.PathLike[str] | None = None) -> Path:
    """Write one HTML page, which needs no network, of a finished or unfinished run, or of several to compare.

    Args:
        run_dir: The file of a run (``spectral.jsonl``), its folder, or a folder above it. Of several in a list, the
            page shows them over each other, and the differences of the others from the first.
        output: Path of the page; beside the file of the (first) run by default.

    Returns:
        Path of the page.

    Raises:
        ConfigurationError: There is no run, or more than one in a folder, or no measurement can be read, or the runs
            cannot be compared.
        ModuleNotFoundError: The extra ``report`` is not installed.
        OSError: A file cannot be read or written.

    Example:
        >>> report("runs/gpt/version_0").name
        'spectral.html'
    """
    check_installed()
    sources = _sources(run_dir)
    page = _page(sources, output)
    _write(sources, page)
    return page


def watch_report(
    run_dir: Runs,
    output: str | os.PathLike[str] | None = None,
    *,
    every: float = 10.0,
    tell: Callable[[str], object] = print,
) -> Path:
    """Write the page again whenever the run goes on, until the user interrupts (Ctrl-C). The page loads itself again.

    The last page, which is written at the interrupt, no longer does.

    Args:
        run_dir: As for :func:`report`.
        output: As for :func:`report`.
        every: Seconds between two looks at the run, and between two loads of the page; a day at most.
        tell: Is told once where the page is, and once that the run has not been measured yet.

    Returns:
        Path of the page.

    Raises:
        ConfigurationError, ModuleNotFoundError, OSError: As for :func:`report`, but a run may be without a measurement.
    """
    if not 0 < every <= A_DAY:
        raise ConfigurationError(f"{every:g} s between two looks at a run: expected more than 0 and at most {A_DAY:,}")
    check_installed()
    sources = _sources(run_dir)
    page = _page(sources, output)
    seen: object = None
    told: set[str] = set()
    try:
        while True:
            if (now := _stamps(sources)) != seen:
                seen = now
                text = _rewritten(sources, page, every)
                if text not in told:
                    told.add(text)
                    tell(text)
            time.sleep(every)
    except KeyboardInterrupt:
        _write(sources, page)
    return page


def _rewritten(sources: Sequence[Path], page: Path, every: float) -> str:
    """Write a page that loads itself again, and return what to tell."""
    try:
        _write(sources, page, reload=every)
    except NothingMeasuredError as error:
        return f"{error}; waiting"
    return f"{page}, written again while the run goes; Ctrl-C ends it"


def _sources(run_dir: Runs) -> tuple[Path, ...]:
    places = [run_dir] if isinstance(run_dir, str | os.PathLike) else list(run_dir)
    return tuple(find_run(Path(place)) for place in places)


def _page(sources: Sequence[Path], output: str | os.PathLike[str] | None) -> Path:
    if output is not None:
        return Path(output)
    first = sources[0]
    return first.with_suffix(".html") if len(sources) == 1 else first.with_name(f"{first.stem}-comparison.html")


def _write(sources: Sequence[Path], page: Path, *, reload: float | None = None) -> None:
    if len(sources) == 1:
        write_run_page(sources[0], page, reload=reload)
    else:
        write_overlay(sources, page, reload=reload)


def _stamps(sources: Sequence[Path]) -> list[tuple[float, int]]:
    """Return when the files of the runs, and what loggers leave beside them, were written last, and their sizes."""
    beside = [path for source in sources for path in (source, source.with_name("metrics.csv"))]
    beside += [path for source in sources for path in source.parent.glob("events.out.tfevents.*")]
    found = [path.stat() for path in beside if path.exists()]
    return [(stat.st_mtime, stat.st_size) for stat in found]

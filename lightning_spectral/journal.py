"""The file of a run: ``spectral.jsonl``, one JSON object a line.

The first line describes the run, each further line is one measurement as :meth:`Measurement.to_dict` gives it, one
event (a block leaves the zone, a warning, an alarm) or one action of the controller. A line is written in one piece and
flushed, so a crash costs at most the line being written; a torn last line is ignored when the file is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Measurement, ResidualBlock

__all__ = ["Journal", "described", "entries", "read_actions", "read_events", "read_journal"]

FORMAT = "lightning_spectral"
"""Key that only the first line has; its value is the version of the format."""
VERSION = 1


class Journal:
    """Appends measurements to a file, or keeps them in memory where there is no place for a file."""

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, resume_step: int | None = None) -> None:
        """Begin a file, or go on with the file of the run that is resumed.

        Args:
            path: The file. ``None`` keeps everything in memory.
            header: Plain values that describe the run, its ``"linearization"`` among them.
            resume_step: Optimizer step from which a run goes on: what the file has of later steps is dropped, since it
                will be measured again. ``None`` begins a new file.
        """
        self.path = path
        self._lines: list[str] = [_line({FORMAT: VERSION, **header})]
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and path.exists():
            self._take_over(path, header["linearization"], resume_step)
        _replace(path, self._lines)
        self._lines = []

    def _take_over(self, path: Path, linearization: str, resume_step: int) -> None:
        header, *entries = _whole(path)
        if header["linearization"] == linearization:
            self._lines += [_line(entry) for entry in entries if entry["step"] <= resume_step]
        else:  # two linearizations are never mixed in one series, and nothing measured is thrown away
            path.rename(path.with_stem(f"{path.stem}-{header['linearization']}"))

    def append(self, measurement: Measurement, consequences: Sequence[Mapping[str, Any]] = ()) -> None:
        """Add one measurement, and what followed from it: plain values, each with a ``"step"``.

        Events have a ``"level"``, actions an ``"action"``.
        """
        line = "".join(map(_line, (measurement.to_dict(), *consequences)))
        if self.path is None:
            self._lines.append(line)
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def records(self) -> list[dict[str, Any]]:
        """Return every measurement of the run so far, those before a resume included."""
        if self.path is None:
            return _measurements(json.loads(line) for line in self._lines[1:])
        return read_journal(self.path)[1]


def read_journal(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the file of a run.

    Args:
        path: A ``spectral.jsonl``.

    Returns:
        The description of the run, and its measurements in the order in which they were taken.

    Raises:
        ConfigurationError: The file is not one of ours.
    """
    header, *entries = _whole(path)
    return header, _measurements(entries)


def read_actions(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read what the controller did in a run.

    Args:
        path: A ``spectral.jsonl``.

    Returns:
        The actions in the order in which they were taken, each with its step, its block, the ratio before, the changes
        of the logarithms of both scales and the reason.

    Raises:
        ConfigurationError: The file is not one of ours.
    """
    return [entry for entry in _whole(path)[1:] if "action" in entry]


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read what was announced in a run.

    Args:
        path: A ``spectral.jsonl``.

    Returns:
        The events in order, each with its level (``"info"``, ``"warning"`` or ``"alarm"``), its step, the step since
        which it has been so, its blocks, its message, and where a trend leads there, the forecast step of collapse with
        its earliest and latest.

    Raises:
        ConfigurationError: The file is not one of ours.
    """
    return [entry for entry in _whole(path)[1:] if "level" in entry]


def _measurements(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if "layers" in entry]


def entries(path: str | os.PathLike[str]) -> Iterator[dict[str, Any] | None]:
    """Yield what the lines of a run's file hold, the header first.

    A line that cannot be read was torn by a crash, or is being written: it and what may follow it are one ``None``.

    Raises:
        ConfigurationError: The file is not one of ours, or was written in a later format.
    """
    # Only \n ends a line: names may hold what Python takes for the end of one.
    with Path(path).open(encoding="utf-8", errors="replace", newline="\n") as file:
        header = _entry(file.readline())
        if header is None or FORMAT not in header:
            raise ConfigurationError(f"{os.fspath(path)!r} does not begin with the header of a spectral journal")
        if header[FORMAT] != VERSION:
            raise ConfigurationError(
                f"{os.fspath(path)!r} is of format {str(header[FORMAT])[:20]!r}, this release reads format {VERSION}"
            )
        yield header
        for line in file:
            entry = _entry(line)
            yield entry
            if entry is None:
                return


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _whole(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return every entry but a torn one."""
    return [entry for entry in entries(path) if entry is not None]


def described(block: ResidualBlock) -> dict[str, Any]:
    """Return what the first line of a journal tells of a block."""
    attention, mlp = block.attention, block.mlp
    return {
        "index": block.index,
        "name": block.name,
        "attention": None if attention is None else attention.site,
        "mlp": None if mlp is None else mlp.site,
        "verified": block.verified,
    }


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _replace(path: Path, lines: list[str]) -> None:
    """Write a whole file so that a crash leaves either the old or the new one."""
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(lines), encoding="utf-8")
    draft.replace(path)

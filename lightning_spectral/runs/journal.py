"""The file of a run: ``spectral.jsonl``, one JSON object a line.

The first line describes the run, each further line is one measurement as :meth:`Measurement.to_dict` gives it, one
event (a block leaves the zone, a warning, an alarm) or one action of the controller. What is added is written in one
piece and is on the disk afterwards, so a crash costs at most the lines being written.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_spectral.records import Measurement, ResidualBlock
from lightning_spectral.runs.durable import append, replace
from lightning_spectral.runs.entries import FORMAT, VERSION, Line, entries
from lightning_spectral.runs.predecessor import News, Predecessor, Superseded, aside_names, take_over

__all__ = ["Journal", "described"]

MOST_KEPT = 2**26
"""Bytes of lines in memory, beyond which the oldest are lost."""


class Journal:
    """Appends measurements to a file, or keeps them in memory where there is no place for a file.

    Nothing that happens to the file is raised: it is told (:meth:`take_news`). Lines that cannot be written are kept,
    and written when that works again.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, resume_step: int | None = None) -> None:
        """Begin a file, or go on with the file of the run that is resumed.

        A file that is there and does not go on is renamed, never overwritten.

        Args:
            path: The file. ``None`` keeps everything in memory.
            header: Plain values that describe the run, its ``"linearization"`` among them. A file that names another
                ``"run"`` does not go on.
            resume_step: Optimizer step from which a run goes on. What the file has of later steps goes to a file beside
                it, until it has been measured again. ``None`` begins a new file.
        """
        self.path = self._wanted = path
        # No other file begins with this line, not even that of another process with the same run.
        self._head = _line({FORMAT: VERSION, **header, "file": uuid.uuid4().hex})
        self._header, self._resume_step = header, resume_step
        self._predecessor: Predecessor | None = None
        self._superseded: Superseded | None = None
        self._begun = False
        self._unwritten: deque[bytes] = deque()
        self._size = self._lost = 0  # bytes in them; lines that were not kept
        self._news: list[News] = []
        self._fails, self._told = False, set[str]()
        self._flush()

    def append(self, measurement: Measurement, consequences: Sequence[Mapping[str, Any]] = ()) -> None:
        """Add one measurement, and what followed from it: plain values, each with a ``"step"``.

        Events have a ``"level"``, actions an ``"action"``.
        """
        entry = measurement.to_dict()
        for line in map(_line, (entry, *consequences)):
            self._unwritten.append(line)
            self._size += len(line)
        while self._size > MOST_KEPT:
            self._size -= len(self._unwritten.popleft())
            self._lost += 1
        self._flush()
        if self._superseded is not None:
            self._superseded.see(entry)
            if not self._fails:
                self._superseded.tidy()

    def close(self) -> None:
        """Try a last time to write what could not be written, also where its folder is gone."""
        if self.path is None:
            return
        if self._unwritten:
            with suppress(OSError, ValueError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
        self._flush()
        if missing := self._lost + len(self._unwritten):
            self._tell_once("missing", f"{missing} lines were never written to {self.path}", grave=True)

    def take_news(self) -> list[News]:
        """Return what is to be told, once."""
        news, self._news = self._news, []
        return news

    def lines(self) -> Iterator[Line]:
        """Yield the lines of the run so far, the header first, those before a resume included.

        Raises:
            ConfigurationError, OSError: As :func:`~lightning_spectral.runs.entries.entries` does.
        """
        begun = self.path is not None and self._begun
        number = 1
        for line in entries(self.path) if self.path is not None and begun else [Line.of(number, self._head)]:
            yield line
            number = line.number
        for behind, raw in enumerate(self._unwritten, start=1):
            yield Line.of(number + behind, raw)

    def _flush(self) -> None:
        """Write what is not written yet, all of it or nothing."""
        if self.path is None:
            return
        try:
            if not self._begun:
                self._begin(self.path)
            self._write(self.path, b"".join(self._unwritten))
        except (OSError, ValueError) as error:
            self._fails = True
            what = f"writing {self.path} failed ({type(error).__name__}: {error})"
            later = "training goes on, and lines are kept until they can be written"
            self._tell_once("fails", f"{what}; {later}", grave=True)
            return
        self._unwritten.clear()
        self._size = 0
        if self._fails:
            self._fails = False
            self._tell_once("works", f"{self.path} is written again, with the lines that were kept")

    def _begin(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._predecessor is None:  # once: it renames what it finds
            self._predecessor = take_over(path, self._header, self._resume_step)
            self._news += self._predecessor.news
            self._superseded = self._predecessor.superseded
        source = self._predecessor.source
        try:
            replace(path, self._head + self._predecessor.kept, new=source != path)
        except FileExistsError:  # another process was quicker
            self._predecessor = None
            raise
        if source is not None and source != path:
            source.unlink(missing_ok=True)
        self._begun = True

    def _write(self, path: Path, data: bytes) -> None:
        """Add to the file of this process, wherever another one may have moved it; begin anew where it is gone."""
        for place in chain([path], sorted(path.parent.glob(f"*{path.suffix}"))):
            try:
                append(place, data, head=self._head)
            except FileNotFoundError:
                continue
            except OSError:
                if place == path:
                    raise
                continue
            if place != path:
                self.path = place
                self._news.append(News(f"another run has taken the name {path}; this one goes on in {place}"))
            return
        if data:
            self._begin_anew(path, self._wanted or path, self._head + data)

    def _begin_anew(self, before: Path, wanted: Path, data: bytes) -> None:
        wanted.parent.mkdir(exist_ok=True)  # and none above it: what is not there may be a disk that comes back
        for place in map(wanted.with_name, chain([wanted.name], aside_names(wanted, "other"))):
            try:
                replace(place, data, new=True)
            except FileExistsError:
                continue
            self.path = place
            self._news.append(News(f"{before} is gone; this run goes on in a new file, {place}", grave=True))
            return

    def _tell_once(self, what: str, text: str, *, grave: bool = False) -> None:
        if what not in self._told:
            self._told.add(what)
            self._news.append(News(text, grave=grave))


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


def _line(entry: Mapping[str, Any]) -> bytes:
    """Return one line of JSON, which knows no infinity."""
    try:
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_finite(entry), ensure_ascii=False, allow_nan=False, default=_plain)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate becomes its escape in JSON


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Return the number that a scalar of another library holds, and the text of anything else."""
    return _finite(value.item()) if hasattr(value, "item") else str(value)

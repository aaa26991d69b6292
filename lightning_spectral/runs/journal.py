"""The file of a run: ``spectral.jsonl``, one JSON object a line.

The first line describes the run. Each further line is one measurement (:meth:`Measurement.to_dict`), one event (a block
leaves the safe zone, a warning, a failure) or one action of the controller. Lines are written in one piece and synced
to the disk, so that a crash costs at most the lines that are being written.
"""

from __future__ import annotations

import json
import math
import platform
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_spectral.records import Measurement, ResidualBlock
from lightning_spectral.runs.durable import append, replace
from lightning_spectral.runs.entries import FORMAT, VERSION, Line, entries
from lightning_spectral.runs.predecessor import News, Predecessor, Superseded, aside_names, take_over
from lightning_spectral.weights.names import plain_name

__all__ = ["Journal", "described", "described_model"]

_PACKAGES = ("lightning-spectral", "torch", "lightning", "pytorch-lightning", "transformers")

MOST_KEPT = 2**26
"""Bytes of unwritten lines that are kept in memory. Beyond this, the oldest lines are dropped."""


class Journal:
    """Appends measurements to a file, or keeps them in memory if there is no path.

    A failure of the file raises nothing: :meth:`take_news` reports it. Lines that cannot be written are kept in memory
    and written as soon as writing works again.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, resume_step: int | None = None) -> None:
        """Begin a new file, or continue the file of the run that is resumed.

        An existing file that is not continued is renamed, never overwritten.

        Args:
            path: The file. ``None`` keeps everything in memory.
            header: Plain values that describe the run, ``"linearization"`` among them. A file with another ``"run"`` is
                not continued.
            resume_step: Optimizer step at which the run resumes. Lines of later steps move to a second file, which is
                removed once these steps have been measured again with the same result. ``None`` begins a new file.
        """
        self.path = self._wanted = path
        # Unique among all files, so that two processes of one run do not take each other's file for their own.
        self._head = _line({FORMAT: VERSION, **header, "versions": _versions(), "file": uuid.uuid4().hex})
        self._header, self._resume_step = header, resume_step
        self._predecessor: Predecessor | None = None
        self._superseded: Superseded | None = None
        self._begun = False
        self._unwritten: deque[bytes] = deque()
        self._size = self._lost = 0  # bytes in the unwritten lines; number of dropped lines
        self._news: list[News] = []
        self._fails, self._told = False, set[str]()
        self._flush()

    def append(self, measurement: Measurement, consequences: Sequence[Mapping[str, Any]] = ()) -> None:
        """Add one measurement and its consequences.

        Args:
            measurement: The measurement.
            consequences: Events and actions as plain values, each with a ``"step"``. Events have a ``"level"``, actions
                an ``"action"``.
        """
        entry = measurement.to_dict()
        for line in map(_line, (entry | {"time": round(time.time(), 3)}, *consequences)):
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
        """Try one last time to write the unwritten lines. A missing folder is created."""
        if self.path is None:
            return
        if self._unwritten:
            with suppress(OSError, ValueError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
        self._flush()
        if missing := self._lost + len(self._unwritten):
            self._tell_once("missing", f"{missing} lines were never written to {self.path}", grave=True)

    def take_news(self) -> list[News]:
        """Return the news since the last call."""
        news, self._news = self._news, []
        return news

    def lines(self) -> Iterator[Line]:
        """Yield the lines of the run so far, the header first. Lines from before a resume are included.

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
        """Write all unwritten lines, or none of them."""
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
        if self._predecessor is None:  # once, because it renames the files that it finds
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
        """Append to the file of this process, even after another process renamed it. If it is gone, begin a new one."""
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
        wanted.parent.mkdir(exist_ok=True)  # no parents: a missing parent may be a disk that will be mounted again
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
    """Return the description of a block for the first line of a journal."""
    attention, mlp = block.attention, block.mlp
    return {
        "index": block.index,
        "name": plain_name(block.name),
        "attention": None if attention is None else plain_name(attention.site),
        "mlp": None if mlp is None else plain_name(mlp.site),
        "verified": block.verified,
    }


def described_model(model: nn.Module) -> dict[str, Any]:
    """Return the description of a model for the first line of a journal.

    The number of parameters counts each shared one once. It is ``None`` for a lazy model, and for one that FSDP1 has
    flattened: there each process sees its share only.
    """
    parameters = list(model.parameters())
    known = not any(is_lazy(item) or getattr(item, "_is_flat_param", False) for item in parameters)
    return {"name": type(model).__name__, "parameters": sum(item.numel() for item in parameters) if known else None}


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a run depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry as one line of JSON. JSON has no NaN and no infinity; they become ``null``."""
    try:
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_finite(entry), ensure_ascii=False, allow_nan=False, default=_plain)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes an escape sequence


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Return a scalar of another library as a number, and anything else as text."""
    return _finite(value.item()) if hasattr(value, "item") else str(value)

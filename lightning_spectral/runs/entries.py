"""The lines of a run's file as they are read: a bad one hides itself, and no other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_spectral.errors import ConfigurationError

__all__ = ["Line", "entries", "first_entry"]

FORMAT = "lightning_spectral"
"""Key that only the first line has; its value is the version of the format."""
VERSION = 1
LONGEST = 2**24
"""Bytes of a line beyond which it is not parsed. A model of 4,096 blocks has a quarter of that."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file.

    Attributes:
        number: The first is 1.
        raw: Its bytes, with the line's end.
        entry: What it says, ``None`` where that cannot be read.
    """

    number: int
    raw: bytes
    entry: dict[str, Any] | None

    @classmethod
    def of(cls, number: int, raw: bytes) -> Line:
        """Read a line."""
        return cls(number, raw, _entry(raw))

    @property
    def header(self) -> dict[str, Any]:
        """What it says of the run, empty unless it is the header of a file."""
        return self.entry if self.entry is not None and FORMAT in self.entry else {}

    @property
    def torn(self) -> bool:
        """Whether it breaks off: it is being written, or a crash has ended it."""
        return self.entry is None and not self.raw.endswith(b"\n")


def entries(path: str | os.PathLike[str]) -> Iterator[Line]:
    """Yield the lines of a run's file, the header first.

    Raises:
        ConfigurationError: The file is not one of ours, or was written in a later format.
        OSError: It cannot be read.
    """
    place, ours = os.fspath(path), False
    with Path(path).open("rb") as file:  # only \n ends a line: names may hold what Python takes for the end of one
        for number, raw in enumerate(file, start=1):
            line = Line.of(number, raw)
            if number == 1:
                _check_version(line.entry, place)
            # A damaged header hides the header: what is behind it may still be measurements.
            ours = ours or (line.entry is not None and ("layers" in line.entry or FORMAT in line.entry))
            if raw.strip():
                yield line
    if not ours:
        raise ConfigurationError(f"{place!r} does not begin with the header of a spectral journal")


def first_entry(path: Path) -> dict[str, Any] | None:
    """Return what the first line of a file says, ``None`` where that cannot be read."""
    with path.open("rb") as file:
        return _entry(file.readline(LONGEST + 1))


def _check_version(header: dict[str, Any] | None, place: str) -> None:
    version = VERSION if header is None else header.get(FORMAT, VERSION)
    if version != VERSION:
        raise ConfigurationError(f"{place!r} is of format {str(version)[:20]!r}, this release reads format {VERSION}")


def _entry(raw: bytes) -> dict[str, Any] | None:
    """Return what a line says. A power cut may leave NUL bytes around it, and an editor a mark in front of it."""
    if len(raw) > LONGEST:
        return None
    try:
        entry = json.loads(raw.strip(b"\0").removeprefix(b"\xef\xbb\xbf").decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None

"""The lines of a run's file, read one by one: a damaged line does not affect the others."""

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
"""Key of the first line alone. Its value is the version of the format."""
VERSION = 1
LONGEST = 2**24
"""A longer line, in bytes, is not parsed. The line of a model with 4,096 blocks has a quarter of this."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file.

    Attributes:
        number: Number of the line; the first line is 1.
        raw: The bytes of the line, line end included.
        entry: The JSON object of the line, ``None`` if the line is damaged.
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
        """The entry, if this line is the header of a file; else empty."""
        return self.entry if self.entry is not None and FORMAT in self.entry else {}

    @property
    def torn(self) -> bool:
        """Whether the line is incomplete: it is being written, or a crash cut it off."""
        return self.entry is None and not self.raw.endswith(b"\n")


def entries(path: str | os.PathLike[str]) -> Iterator[Line]:
    """Yield the lines of a run's file, the header first.

    Raises:
        ConfigurationError: The file is no journal of this package, or was written in a later format.
        OSError: The file cannot be read.
    """
    place, ours = os.fspath(path), False
    # In bytes, only \n ends a line. In text, characters inside of a name may count as the end of a line.
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = Line.of(number, raw)
            if number == 1:
                _check_version(line.entry, place)
            # With a damaged header the file still counts as a journal if measurements follow.
            ours = ours or (line.entry is not None and ("layers" in line.entry or FORMAT in line.entry))
            if raw.strip():
                yield line
    if not ours:
        raise ConfigurationError(f"{place!r} does not begin with the header of a spectral journal")


def first_entry(path: Path) -> dict[str, Any] | None:
    """Return the entry of the first line of a file, ``None`` if the line is damaged."""
    with path.open("rb") as file:
        return _entry(file.readline(LONGEST + 1))


def _check_version(header: dict[str, Any] | None, place: str) -> None:
    version = VERSION if header is None else header.get(FORMAT, VERSION)
    if version != VERSION:
        raise ConfigurationError(f"{place!r} is of format {str(version)[:20]!r}, this release reads format {VERSION}")


def _entry(raw: bytes) -> dict[str, Any] | None:
    """Return the entry of a line. NUL bytes of a power cut and the byte order mark of an editor are ignored."""
    if len(raw) > LONGEST:
        return None
    try:
        entry = json.loads(raw.strip(b"\0").removeprefix(b"\xef\xbb\xbf").decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None

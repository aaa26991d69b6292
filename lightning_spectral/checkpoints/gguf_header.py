"""The header of a GGUF file that nobody trusts. Every announced size is checked against the size of the file."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Any

from lightning_spectral.checkpoints.untrusted import printable

__all__ = ["MAGIC", "Stored", "read_header"]

MAGIC = b"GGUF"
_VERSIONS, _MAX_DIMENSIONS, _MAX_COUNT = (2, 3), 4, 2**24
# Number of a type of metadata in the format -> code of the type in `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the file.

    Attributes:
        name: Name of the tensor.
        shape: Shape of the tensor.
        kind: Number of its type in the format.
        start: Position of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(slots=True)
class _Cursor:
    """A position in the header."""

    content: mmap.mmap
    at: int

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.at += self._fitting(length)
        return self.content[self.at - length : self.at].decode("utf-8", "backslashreplace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"its metadata has a value of type {kind}")
        inner, count = self.number("I"), self._fitting(self.number("Q"))
        if inner == _ARRAY:
            raise ValueError("its metadata has lists of lists")
        return [self.value(inner) for _ in range(count)]

    def _fitting(self, count: int) -> int:
        if count > min(len(self.content) - self.at, _MAX_COUNT):
            raise ValueError(f"it announces {count} entries, more than it can have")
        return count


def read_header(content: mmap.mmap) -> tuple[dict[str, Any], list[Stored]]:
    """Return the metadata of a file, and the positions of its tensors.

    Args:
        content: The file.

    Raises:
        ValueError: The version is not supported, or the file announces more than it holds.
    """
    cursor = _Cursor(content, len(MAGIC))
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, expected {' or '.join(map(str, _VERSIONS))}")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    facts: dict[str, Any] = {}
    for _ in range(entries):
        name = cursor.text()
        facts[name] = cursor.value(cursor.number("I"))
    found = []
    for _ in range(tensors):
        name, dimensions = cursor.text(), cursor.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{printable(name, 60)} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]  # the format lists the last dimension first
        found.append(Stored(name, shape, cursor.number("I"), cursor.number("Q")))
    unit = facts.get("general.alignment", 32)
    begin = -(-cursor.at // unit) * unit
    return facts, [Stored(item.name, item.shape, item.kind, begin + item.start) for item in found]

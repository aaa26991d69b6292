"""Text for a terminal and for a notebook: tables, and how a block is called."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Named", "Table", "Tabular", "numbered", "writable"]


class Named(Protocol):
    """What has the index and the module path of a block."""

    @property
    def index(self) -> int:
        """The index of the block."""

    @property
    def name(self) -> str:
        """The module path of the block."""


def numbered(block: Named) -> str:
    """Return ``"3 (blocks.3)"``; the number alone for a block that is the whole model and has no name."""
    return f"{block.index} ({block.name})" if block.name else str(block.index)


@dataclass(frozen=True, slots=True)
class Table:
    """A table that is ready to be read.

    Attributes:
        title: The line above it.
        columns: The name of each column behind its alignment and least width, as in ``">10mlp"`` and ``"<block"``.
        rows: The cells of each row.
        notes: The lines below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return it as text, a line per row."""
        names = [column.lstrip("<>^0123456789") for column in self.columns]
        least = [
            int(column[1 : len(column) - len(name)] or 0) for column, name in zip(self.columns, names, strict=True)
        ]
        cells = zip(names, *self.rows, strict=True)
        widths = [max(width, *map(len, column)) for width, column in zip(least, cells, strict=True)]
        aligned = [f"{column[0]}{width}" for column, width in zip(self.columns, widths, strict=True)]
        rows = [
            "  ".join(format(cell, width) for cell, width in zip(row, aligned, strict=True)).rstrip()
            for row in (names, *self.rows)
        ]
        return "\n".join([self.title, *rows, *self.notes])

    def html(self) -> str:
        """Return it as HTML without any style of its own."""
        names = "".join(f"<th>{html.escape(column.lstrip('<>^0123456789'))}</th>" for column in self.columns)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table><caption>{html.escape(self.title)}</caption><tr>{names}</tr>{rows}</table>{notes}"


class Tabular:
    """What is looked at more often than it is evaluated: it prints as a table, in a terminal and in a notebook."""

    __slots__ = ()

    def _table(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the table as text."""
        return self._table().text()

    def __repr__(self) -> str:
        """Return the table as text."""
        return str(self)

    def _repr_html_(self) -> str:
        """Return the table as HTML."""
        return self._table().html()


def writable(text: str, stream: Any, otherwise: str | None = None) -> str:
    """Return a text that a stream can write.

    Args:
        text: The text.
        stream: The stream. One without an encoding, such as ``None``, writes UTF-8.
        otherwise: What to write if it does not know some letter; by default a question mark for each of them.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    known = text.encode(encoding, "replace").decode(encoding)
    return known if known == text or otherwise is None else otherwise

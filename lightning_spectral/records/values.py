"""Checked readers of plain values, for files that nobody trusts: the journal of a run, the blocks in a checkpoint.

A reader takes a value from JSON or from ``torch.load``, checks its type and its size, and returns it. Every reader
raises ``ValueError`` for anything else. The message quotes at most 50 characters of the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

__all__ = ["listed", "module_path", "number", "of_type", "one_of", "real", "remark", "text", "whole"]

T = TypeVar("T")

# No real model comes near these limits. They bound the time and the memory that a hostile file can take.
MAX_NAME, MAX_REMARK, MAX_ITEMS, MAX_WHOLE = 512, 4096, 2**20, 2**24
_MAX_NUMBER = 2.0**424  # far below the largest float (2**1024), so that squares and sums stay finite
_MAX_QUOTED = 50


def of_type(value: object, kind: type[T]) -> T:
    """Return a value of a type."""
    if not isinstance(value, kind):
        raise ValueError(f"found {_quoted(value)}, expected a {kind.__name__}")
    return value


def listed(value: object) -> list[Any]:
    """Return a list of at most 2**20 items. A tuple counts as a list: JSON has no tuples."""
    if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
        raise ValueError(f"found {_quoted(value)}, expected a list of at most {MAX_ITEMS} items")
    return list(value)


def one_of(value: object, known: Iterable[str]) -> Any:
    """Return a text that is one of the known texts."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"found {_quoted(value)}, expected one of {', '.join(sorted(known))}")
    return value


def text(value: object) -> str:
    """Return a text of any length."""
    if not isinstance(value, str):
        raise ValueError(f"found {_quoted(value)}, expected text")
    return value


def module_path(value: object) -> str:
    """Return the path of a module or parameter, such as ``"layers.0.mlp"``.

    A part with two leading underscores is refused: it would lead into Python instead of into the model.
    """
    if not isinstance(value, str) or len(value) > MAX_NAME or not value.isprintable():
        raise ValueError(f"found {_quoted(value)}, expected {MAX_NAME} printable characters at most")
    if any(part.startswith("__") for part in value.split(".")):
        raise ValueError(f"found {_quoted(value)}, expected a path in a model")
    return value


def remark(value: object) -> str:
    """Return a sentence for a reader. A character that cannot be printed becomes a space."""
    if not isinstance(value, str) or len(value) > MAX_REMARK:
        raise ValueError(f"found {_quoted(value)}, expected {MAX_REMARK} characters at most")
    return "".join(item if item.isprintable() else " " for item in value)


def whole(value: object, least: int = -MAX_WHOLE, most: int = MAX_WHOLE) -> int:
    """Return a whole number in an interval. ``True`` is not 1 here."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"found {_quoted(value)}, expected a whole number from {least} to {most}")
    return value


def number(value: object, least: float = -_MAX_NUMBER) -> float:
    """Return a finite number of at most 2**424 as a float."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= _MAX_NUMBER:
        raise ValueError(f"found {_quoted(value)}, expected a number{f' of at least {least:g}' if least == 0 else ''}")
    return float(value)


def real(value: object) -> float:
    """Return any float, infinities included, or a number that :func:`whole` accepts."""
    return value if isinstance(value, float) else whole(value)


def _quoted(value: object) -> str:
    """Quote the beginning of a short value; of a container, name the type: its text may be as long as the file."""
    if value is None or isinstance(value, str | int | float):
        return repr(value[:_MAX_QUOTED] if isinstance(value, str) else value)[: _MAX_QUOTED + 2]
    return f"a {type(value).__name__}"

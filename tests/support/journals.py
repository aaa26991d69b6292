"""The file of a run as plain JSON, read without the package: a slow obvious twin of :class:`History`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["read_actions", "read_events", "read_journal"]


def read_journal(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the measurements."""
    lines = _lines(path)
    return lines[0], [line for line in lines if "layers" in line]


def read_actions(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return what the controller did."""
    return [line for line in _lines(path) if "action" in line]


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return what was announced."""
    return [line for line in _lines(path) if "level" in line]


def _lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]

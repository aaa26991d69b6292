"""Tables and the figure of docs/evidence.md from the results of `evidence_steering.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["write"]


def write(entries: list[dict[str, Any]], out: Path, page: Path | None) -> None:
    """Write the tables into the page."""

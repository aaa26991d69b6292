"""Runs without a picture: half of the time of a tiny run goes into it."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs end as on a machine without matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

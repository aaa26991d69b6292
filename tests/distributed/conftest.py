"""The matrix of strategies, precisions and modes as a table at the end of ``make test-distributed``."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one line per cell: passed, failed, or refused with its message."""
    if "SPECTRAL_MATRIX" not in os.environ:
        return
    lines = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            cell = re.search(r"(?:run_in_one|every_process)\[([\w ]+)-(\S+, \w+, \w+)\]", report.nodeid)
            if cell and report.when == "call":
                message = dict(report.user_properties).get("refused")
                result = outcome if message is None else f"refused: {message}"
                lines.append("  ".join((f"{cell[1]:<26}", *(f"{part:<10}" for part in cell[2].split(", ")), result)))
    terminalreporter.section("strategy × precision × watch or steer × fit or resume")
    terminalreporter.write_line("\n".join(lines))


@pytest.fixture
def refused(record_property: Any) -> Any:
    """Note in the table with which message a cell is refused."""
    return lambda message: record_property("refused", message)

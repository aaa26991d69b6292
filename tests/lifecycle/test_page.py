"""What docs/compatibility.md says is shown by tests that exist, and every test of this folder is in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def names_in(path: Path) -> set[str]:
    names = [
        node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    return {f"{path.relative_to(ROOT).as_posix()}::{name}" for name in names if name.startswith("test_")}


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(tests/\S+?\.py::\w+)`", PAGE))
    assert len(named) > 50
    known = set().union(*(names_in(ROOT / name) for name in {name.partition("::")[0] for name in named}))
    assert not named - known


def test_every_test_of_the_lifecycle_is_named():
    here = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    shown = {name for path in here for name in names_in(path) if f"`{name}`" not in PAGE}
    assert shown == {"tests/lifecycle/test_cli.py::test_the_help_is_the_documentation"}

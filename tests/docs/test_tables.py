"""The tables that are made from code and tests are committed, and as they would be made now."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import tables
import topics

from lightning_spectral import SpectralMonitor


def test_the_committed_tables_are_up_to_date():
    """``make tables`` makes them anew."""
    stale = [path.name for path, text in tables.pages() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"the tables of {stale} are stale: make tables"


def test_the_page_on_the_monitor_shows_every_argument_with_its_default():
    page = (Path(tables.__file__).parent / "monitor.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^SpectralMonitor\(\n.*?^\)", page, re.MULTILINE | re.DOTALL)
    call = ast.parse(shown).body[0].value
    defaults = {name: item.default for name, item in inspect.signature(SpectralMonitor).parameters.items()}
    assert {item.arg: ast.literal_eval(item.value) for item in call.keywords} == defaults


def test_a_page_without_a_place_for_its_table_is_told():
    text = "before\n<!-- begin: one -->\nold\n<!-- end: one -->\nafter\n"
    assert topics.between(text, "one", "new\n") == ("before\n<!-- begin: one -->\n\nnew\n\n<!-- end: one -->\nafter\n")
    with pytest.raises(
        ValueError, match=r"no place for the table 'two': expected <!-- begin: two --> and .* each once"
    ):
        topics.between(text, "two", "new")

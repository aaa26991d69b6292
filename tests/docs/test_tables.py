"""The tables that are made from code and tests are committed, and as they would be made now."""

from __future__ import annotations

import pytest
import tables
import topics


def test_the_committed_tables_are_up_to_date():
    """``make tables`` makes them anew."""
    stale = [path.name for path, text in tables.pages() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"the tables of {stale} are stale: make tables"


def test_a_page_without_a_place_for_its_table_is_told():
    text = "before\n<!-- begin: one -->\nold\n<!-- end: one -->\nafter\n"
    assert topics.between(text, "one", "new\n") == ("before\n<!-- begin: one -->\n\nnew\n\n<!-- end: one -->\nafter\n")
    with pytest.raises(
        ValueError, match=r"no place for the table 'two': expected <!-- begin: two --> and .* each once"
    ):
        topics.between(text, "two", "new")

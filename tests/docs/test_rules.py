"""The documentation of the rules has the messages that the code makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from rule_examples import examples

from lightning_spectral.alarms.advice import WORDS
from lightning_spectral.alarms.rules import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_page_shows_the_message_of_every_rule_under_its_link(rule):
    event = examples()[rule.name]
    section = PAGE.partition(f"### {rule.name}\n")[2].partition("\n###")[0]
    assert f"> {event.message}" in section.splitlines()
    assert event.message.endswith(f" More: docs/monitor.md#{rule.name}")
    assert f"In this order: {'; '.join(WORDS[name] for name in event.advice)}." in section.splitlines()
    assert event.level == rule.level


def test_the_page_lists_every_piece_of_advice():
    listed = next(line for line in PAGE.splitlines() if line.startswith("| `advice` |"))
    assert all(f"`{name}`" in listed for name in WORDS)

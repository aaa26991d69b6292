"""What the tests of discovery share."""

from __future__ import annotations

import pytest
from found import Search, search


@pytest.fixture(scope="module", autouse=True)
def grouped(process_group: None) -> None:
    """Some members of the zoo are sharded."""


@pytest.fixture(scope="session")
def found() -> Search:
    """Searches a member of the zoo. Tests that change a model build their own."""
    return search

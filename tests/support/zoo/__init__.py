"""A zoo of tiny models whose residual branches are known, for the discovery tests to run over."""

from __future__ import annotations

import functools

from . import (
    adapters,
    arrangements,
    experts,
    fused,
    hugging_face,
    language,
    plain,
    refused,
    sequences,
    streams,
    survey,
    torch_layers,
    unseen,
    vision,
    wrappers,
)
from .example import Example, ExpectedBlock

__all__ = ["Example", "ExpectedBlock", "example", "examples", "survey"]


@functools.cache
def _by_name() -> dict[str, Example]:
    origins = (
        plain,
        torch_layers,
        fused,
        experts,
        arrangements,
        adapters,
        wrappers,
        refused,
        unseen,
        streams,
        vision,
        language,
        sequences,
    )
    members = [*hugging_face.surveyed(), *(member for origin in origins for member in origin.members())]
    names = [member.name for member in members]
    assert len(names) == len(set(names)), "two examples share a name"
    return dict(zip(names, members, strict=True))


def examples() -> list[Example]:
    """Every member of the zoo."""
    return list(_by_name().values())


def example(name: str) -> Example:
    """The member of that name."""
    return _by_name()[name]

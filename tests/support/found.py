"""What discovery says about one member of the zoo, which is searched once in a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from zoo import Example, example

from lightning_spectral import ResidualBlock, find_blocks
from lightning_spectral.errors import BlocksNotFoundError


@dataclass(frozen=True)
class Found:
    """Blocks, or why there are none."""

    member: Example
    model: nn.Module
    blocks: tuple[ResidualBlock, ...]
    refusal: BlocksNotFoundError | None = None


Search = Callable[[str], Found]


@functools.cache
def search(name: str) -> Found:
    """Find the blocks of a member of the zoo. Whoever changes a model builds another one."""
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    try:
        return Found(member, model, find_blocks(model, batch=args or kwargs))
    except BlocksNotFoundError as error:
        return Found(member, model, (), error)


def built(name: str) -> tuple[nn.Module, tuple[ResidualBlock, ...]]:
    """A fresh copy of a member of the zoo; the blocks were found on another one."""
    found = search(name)
    if found.refusal is not None:
        raise found.refusal
    return found.member.build(), found.blocks

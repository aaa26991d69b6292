"""What discovery says about one member of the zoo."""

from __future__ import annotations

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


def search(name: str) -> Found:
    """Find the blocks of a member of the zoo."""
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    try:
        return Found(member, model, find_blocks(model, batch=args or kwargs))
    except BlocksNotFoundError as error:
        return Found(member, model, (), error)

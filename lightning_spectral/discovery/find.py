"""``find_blocks``: from a model to its residual blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_spectral.discovery.blocks import blocks_of
from lightning_spectral.discovery.inputs import guesses
from lightning_spectral.discovery.tape import Tape, record
from lightning_spectral.errors import BlocksNotFoundError, ExampleInputError
from lightning_spectral.records import ResidualBlock

__all__ = ["find_blocks"]


def find_blocks(
    model: nn.Module, *example_inputs: Any, hints: Mapping[str, Any] | None = None, **example_kwargs: Any
) -> tuple[ResidualBlock, ...]:
    """Find every residual block of a model, its branches, their sites and their factors."""
    tape, tried = _recorded(model, example_inputs, example_kwargs)
    blocks = blocks_of(tape, model)
    if not blocks:
        raise BlocksNotFoundError("no residual blocks; " + "; ".join(tried))
    return tuple(blocks)


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tape, list[str]]:
    if args or kwargs:
        return record(model, lambda: model(*args, **kwargs), (args, kwargs)), []
    tried = []
    for description, make in guesses(model):
        try:
            given, named = make()
            return record(model, lambda given=given, named=named: model(*given, **named), (given, named)), tried
        except Exception as error:
            tried.append(f"{description}: {type(error).__name__}: {error}")
    raise ExampleInputError("; ".join(tried))

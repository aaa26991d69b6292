"""Check the model, the blocks and the hints that a public function gets. Each error says what to type instead."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import ResidualBlock

__all__ = ["check_blocks", "check_hints", "check_model"]


def check_model(model: object, function: str) -> None:
    """Check that a model is a module.

    Args:
        model: The argument.
        function: Name of the public function that got it.

    Raises:
        ConfigurationError: The argument is no module.
    """
    if isinstance(model, nn.Module):
        return
    remedy = f"{function}(model)"
    if isinstance(model, str | PathLike):
        remedy = f"audit({str(model)!r}) measures a checkpoint file"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        remedy = f"make one first, {function}({model.__name__}(...))"
    elif isinstance(model, Mapping):
        remedy = "a state dict has no structure; measure(state_dict, blocks) measures one"
    raise ConfigurationError(f"{function} got a {_kind(model)}, expected a torch.nn.Module: {remedy}")


def check_blocks(blocks: object, call: str) -> None:
    """Check that an argument is ``None`` or iterates over blocks.

    Args:
        blocks: The argument.
        call: A correct call, for the message.

    Raises:
        ConfigurationError: The argument is something else.
    """
    if blocks is None or (
        not isinstance(blocks, str | Mapping | nn.Module | Tensor)
        and hasattr(blocks, "__iter__")
        and all(isinstance(block, ResidualBlock) for block in blocks)
    ):
        return
    remedy = call
    if isinstance(blocks, Tensor | Mapping | tuple):
        remedy += "; an example input is named, batch=..."
    raise ConfigurationError(f"blocks is a {_kind(blocks)}, expected what find_blocks returns: {remedy}")


def check_hints(hints: object) -> None:
    """Check that hints are ``None`` or a mapping.

    Raises:
        ConfigurationError: The hints are something else, such as the path of a module.
    """
    if hints is None or isinstance(hints, Mapping):
        return
    path = hints if isinstance(hints, str) else "layers.*"
    raise ConfigurationError(
        f"hints={_shown(hints)}: expected a dict from the paths of blocks to their branches, such as "
        f"{{{path!r}: {{'attention': 'attn', 'mlp': 'mlp'}}}}, whose paths are relative to the block"
    )


def _kind(value: object) -> str:
    """Return the name of a class, or of the class of a value, for a message."""
    return f"class ({value.__name__})" if isinstance(value, type) else type(value).__name__


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""The tensors among the arguments and results of an operation, and the tensors that it writes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

__all__ = ["map_leaves", "tensors_in", "written_tensors"]


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """Apply a function to every leaf of nested lists, tuples and dicts."""
    # Arguments of an operation are lists, tuples and dicts only; torch's general tree_map takes four times as long.
    if type(structure) in (list, tuple):
        return type(structure)([map_leaves(function, item) for item in structure])
    if type(structure) is dict:
        return {key: map_leaves(function, item) for key, item in structure.items()}
    return function(structure)


def tensors_in(structure: Any) -> list[Tensor]:
    """Return the tensors in the arguments or the result of an operation."""
    if isinstance(structure, Tensor):
        return [structure]
    if isinstance(structure, dict):
        structure = structure.values()
    elif not isinstance(structure, list | tuple):
        return []
    return [tensor for item in structure for tensor in tensors_in(item)]


def written_tensors(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to, by its schema."""
    tensors: list[Tensor] = []
    if getattr(function, "_schema", None) is None:
        return tensors  # a higher-order operator
    for position, name in _write_positions(function):
        tensors += tensors_in(args[position] if position < len(args) else kwargs.get(name))
    return tensors


@cache
def _write_positions(function: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of each argument that an operation writes to; an impossible position if keyword-only."""
    return tuple(
        (len(function._schema.arguments) if argument.kwarg_only else position, argument.name)
        for position, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )

"""Dotted paths of modules and parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

__all__ = ["common_parts", "resolve"]


def resolve(model: nn.Module, path: str) -> object:
    """Return the attribute at a dotted path (parameters, buffers and parametrized weights alike)."""
    value: object = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def common_parts(paths: Iterable[str]) -> list[str]:
    """Return the components that all paths begin with."""
    split = [path.split(".") if path else [] for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common

"""Dotted paths of modules and parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

__all__ = ["common_parts", "is_compiled", "resolve"]


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


def is_compiled(model: nn.Module, path: str) -> bool:
    """Whether the module at a path, or one around it, is compiled: hooks that come later are ignored there."""
    names = path.split(".") if path else []
    around = [resolve(model, ".".join(names[:depth])) if depth else model for depth in range(len(names) + 1)]
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds, and what is compiled has imported it
    wrappers = () if dynamo is None else (dynamo.OptimizedModule,)
    return any(isinstance(item, wrappers) or getattr(item, "_compiled_call_impl", None) is not None for item in around)

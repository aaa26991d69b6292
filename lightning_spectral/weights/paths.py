"""Modules and parameters of a model by their dotted paths."""

from __future__ import annotations

import sys

from torch import nn

from lightning_spectral.passes.listen import compiled_call

__all__ = ["compiled_entries", "compiled_modules", "is_compiled", "module_at", "resolve"]


def resolve(model: nn.Module, path: str) -> object:
    """Return the attribute at a dotted path (parameters, buffers and parametrized weights alike)."""
    value: object = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path, the model itself at the empty one; ``None`` where there is no module."""
    try:
        found = resolve(model, path) if path else model
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def compiled_entries(model: nn.Module) -> list[nn.Module]:
    """Return every module that was compiled: it runs compiled code when it is called."""
    wrappers = _wrappers()
    return [item for item in model.modules() if isinstance(item, wrappers) or compiled_call(item) is not None]


def compiled_modules(model: nn.Module) -> set[nn.Module]:
    """Return every module that is compiled or lies inside one that is: to listen there may compile code anew."""
    return {inner for entry in compiled_entries(model) for inner in entry.modules()}


def is_compiled(model: nn.Module, path: str) -> bool:
    """Whether the module at a path, or one around it, is compiled: hooks that come later are ignored there."""
    names, wrappers = path.split(".") if path else [], _wrappers()
    around = [module_at(model, ".".join(names[:depth])) for depth in range(len(names) + 1)]
    return any(isinstance(item, wrappers) or compiled_call(item) is not None for item in around if item is not None)


def _wrappers() -> tuple[type, ...]:
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds, and what is compiled has imported it
    return () if dynamo is None else (dynamo.OptimizedModule,)

"""Dotted paths of modules and parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from lightning_spectral.passes.listen import compiled_call

__all__ = [
    "absolute_path",
    "common_parts",
    "compiled_entries",
    "compiled_modules",
    "is_compiled",
    "module_at",
    "relative_path",
    "resolve",
]


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


def relative_path(site: str, parameter: str) -> str:
    """Return the path of a parameter as seen from a site: one dot for the site, one more for each level above it.

    ``relative_path("layers.0.dropout", "layers.0.linear.weight")`` is ``"..linear.weight"``. Unlike the path from the
    model, it holds for the keys of a state dict that was taken from a module around the model or inside it.
    """
    here, there = site.split(".") if site else [], parameter.split(".")
    common = 0
    while common < min(len(here), len(there) - 1) and here[common] == there[common]:
        common += 1
    return "." * (len(here) - common + 1) + ".".join(there[common:])


def absolute_path(site: str, relative: str) -> str:
    """Return the path that :func:`relative_path` made relative.

    The site may lie deeper than it did then, inside a wrapper; it must not lie higher than the path climbs.
    """
    levels = len(relative) - len(relative.lstrip(".")) - 1
    parts = site.split(".") if site else []
    return ".".join([*parts[: len(parts) - levels], relative.lstrip(".")])


def common_parts(paths: Iterable[str]) -> list[str]:
    """Return the components that all paths begin with."""
    split = [path.split(".") if path else [] for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common


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

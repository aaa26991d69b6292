"""Names of modules, weights and residual scales: in a model, inside wrappers, and in a state dict."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from lightning_spectral.records import Blocks, ResidualBlock

__all__ = [
    "CHILD",
    "absolute_path",
    "common_parts",
    "parameters_of",
    "plain_name",
    "relative_path",
    "scale_key",
    "scale_keys",
    "site_of",
    "stored_names",
    "unwrapped",
    "weight_of",
]

CHILD = "residual_scale"
"""Name of the child module of a site that holds its scale."""

_KEY = re.compile(rf"(?:.*\.|)(?:{CHILD}|parametrizations\.\w+\.\d+)\.log_scale")
_ON_WEIGHT = re.compile(r"(.*\.|)parametrizations\.(\w+)\.\d+\.log_scale")
_ORIGINAL = re.compile(r"(.*\.|)parametrizations\.(\w+)\.original")
# What wrappers put into the names of the modules that they wrap.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def relative_path(site: str, parameter: str) -> str:
    """Return the path of a parameter as seen from a site: one dot for the site, one more for each level above it.

    ``relative_path("layers.0.dropout", "layers.0.linear.weight")`` is ``"..linear.weight"``. Unlike the path from the
    model, it holds for the keys of a state dict that was taken from a module around the model or inside it.
    """
    here, there = site.split(".") if site else [], parameter.split(".")
    common = len(common_parts([site, parameter.rpartition(".")[0]]))
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


def plain_name(path: str) -> str:
    """Return the path of a module or a weight without what wrappers put into it.

    Args:
        path: The path, which may be that of the wrapper itself.
    """
    return _WRAPPERS.sub("", f"{path}.").removesuffix(".")


def unwrapped(blocks: Sequence[ResidualBlock]) -> Blocks:
    """Return the blocks of a compiled or wrapped model under the names of the plain model."""
    return Blocks(map(_plain, blocks), getattr(blocks, "notes", ()))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return plain_name(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _plain(getattr(value, field.name)) for field in fields(value)})
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def parameters_of(blocks: Iterable[ResidualBlock]) -> dict[str, tuple[int, ...] | None]:
    """Return the attribute paths of all factors of some blocks, in order, each with its shape where that is known."""
    factors = (factor for block in blocks for branch in block.branches for factor in branch.factors)
    return {factor.parameter: factor.shape for factor in factors if factor.parameter is not None}


def stored_names(path: str, names: Collection[str]) -> tuple[str, str | None] | None:
    """Return under which names a weight and the residual scale on it are stored, ``None`` where it is not.

    Args:
        path: Attribute path of the weight.
        names: The names of a state dict.
    """
    owner, dot, name = path.rpartition(".")
    inner = f"{owner}{dot}parametrizations.{name}"
    if path in names:
        return path, None
    # A scale on a weight is its only parametrization; what else may stand there is not understood.
    if f"{inner}.original" in names and f"{inner}.0.log_scale" in names and f"{inner}.1.log_scale" not in names:
        return f"{inner}.original", f"{inner}.0.log_scale"
    return None


def weight_of(key: str) -> str | None:
    """Return the attribute path of the weight whose original a key of a state dict holds, ``None`` for other keys."""
    found = _ORIGINAL.fullmatch(key)
    return None if found is None else found[1] + found[2]


def scale_key(site: str) -> str:
    """Return the key in a state dict of the residual scale of a site that is a module."""
    return f"{site}.{CHILD}.log_scale" if site else f"{CHILD}.log_scale"


def scale_keys(keys: Iterable[str]) -> list[str]:
    """Return those keys of a state dict that hold a residual scale."""
    return [key for key in keys if _KEY.fullmatch(key)]


def site_of(key: str) -> str:
    """Return the site of a residual scale by its key in a state dict."""
    return _ON_WEIGHT.sub(r"param:\1\2", key).removesuffix("log_scale").rstrip(".").removesuffix(CHILD).rstrip(".")

"""Residual scales that are attached to a model: where they are, and what they are to a branch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_spectral.records import Branch, Factor, Path, ResidualBlock
from lightning_spectral.weights.paths import module_at

__all__ = [
    "CHILD",
    "common_scale",
    "log_scale_path",
    "log_scale_tensor",
    "scale_keys",
    "scale_module",
    "site_of",
    "unwrapped_key",
    "with_scales",
]

CHILD = "residual_scale"
"""Name of the child module of a site that holds its scale."""

_KEY = re.compile(rf"(?:.*\.|)(?:{CHILD}|parametrizations\.\w+\.\d+)\.log_scale")
_ON_WEIGHT = re.compile(r"(.*\.|)parametrizations\.(\w+)\.\d+\.log_scale")
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def scale_keys(keys: Iterable[str]) -> list[str]:
    """Return those keys of a state dict that hold a residual scale."""
    return [key for key in keys if _KEY.fullmatch(key)]


def site_of(key: str) -> str:
    """Return the site of a residual scale by its key in a state dict."""
    return _ON_WEIGHT.sub(r"param:\1\2", key).removesuffix("log_scale").rstrip(".").removesuffix(CHILD).rstrip(".")


def unwrapped_key(key: str) -> str:
    """Return a key of a state dict without the names that wrappers of modules put into it."""
    return _WRAPPERS.sub("", key)


def log_scale_path(model: nn.Module, branch: Branch) -> str | None:
    """Return the attribute path of the logarithm of a branch's scale, ``None`` where none is attached.

    A scale is a child of the module that carries the branch; where a weight alone carries it (``param:`` sites), it is
    a parametrization of that weight.
    """
    if branch.site.startswith("param:"):
        owner, _, name = branch.site.removeprefix("param:").rpartition(".")
        module = module_at(model, owner)
        listed = getattr(getattr(module, "parametrizations", None), name, ())
        found = [place for place, item in enumerate(listed) if hasattr(item, "log_scale")]
        return _join(owner, f"parametrizations.{name}.{found[0]}.log_scale") if found else None
    child = getattr(module_at(model, branch.site), CHILD, None)
    return _join(branch.site, f"{CHILD}.log_scale") if hasattr(child, "log_scale") else None


def scale_module(model: nn.Module, branch: Branch | None) -> nn.Module | None:
    """Return the module that holds the scale of a branch, as ``log_scale`` of shape (1,); ``None`` where there is none.

    Keep the module, which is cheap to read again and again, and not its parameter, which sharding may replace.
    """
    path = None if branch is None else log_scale_path(model, branch)
    return None if path is None else module_at(model, path.rpartition(".")[0])


def log_scale_tensor(model: nn.Module, branch: Branch | None) -> Tensor | None:
    """Return the parameter of shape (1,) that holds the logarithm of a branch's scale, if it has one."""
    module = scale_module(model, branch)
    return None if module is None else getattr(module, "log_scale")  # noqa: B009  # a Module knows no such attribute


def common_scale(scales: Sequence[float]) -> float:
    """Return the residual scale of branches that are added up: the geometric mean, 1 without any."""
    return float(math.prod(scales) ** (1 / len(scales))) if scales else 1.0


def with_scales(model: nn.Module, blocks: Iterable[ResidualBlock]) -> tuple[ResidualBlock, ...]:
    """Add the scales that are attached to the model to the factors of its blocks, where they are not yet.

    Blocks that were found before the scales were attached are measured with them in this way: a ratio measured without
    the scales that a controller moves would never answer to it.
    """
    return tuple(
        replace(block, branches=tuple(_with_scale(model, branch) for branch in block.branches)) for block in blocks
    )


def _with_scale(model: nn.Module, branch: Branch) -> Branch:
    path = log_scale_path(model, branch)
    if path is None or branch.site.startswith("param:"):  # a parametrized weight is read with its scale
        return branch
    factor = Factor("scale", path, (("exp",),))
    paths = (
        chain
        if any(known.parameter == path for known in chain.factors)
        else Path((factor, *chain.factors), chain.expert)
        for chain in branch.paths
    )
    return replace(branch, paths=tuple(paths))


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name

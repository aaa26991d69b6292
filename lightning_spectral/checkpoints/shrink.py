"""Narrow copies of wide architectures, with the same blocks, and the way back from narrow blocks to wide ones.

The blocks of a model are names and layouts. A model with every width divided by d has the same ones, up to numbers:

    width 4096    qkv weight (12288, 4096)    layout: narrow(0, 8192, 4096)      d = 32
    width  128    qkv weight   (384,  128)    layout: narrow(0,  256,  128)      every number divided by 32
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.records import Factor, Path, ResidualBlock
from lightning_spectral.records.layout import arranged, is_arithmetic

__all__ = ["NotScaledError", "narrower", "rescaled"]

Shapes = Mapping[str, tuple[int, ...]]

# Entries of a config that are widths. A width that they miss shows as a wrong shape, and then the result is refused.
_WIDTH = re.compile(
    r"(.*_)?(dim|dims|size|sizes|rank|width|channels|d_model|d_ff|d_kv|d_inner|n_embd|n_inner|dim_ff|d_embed|n_embed)"
)
_NO_WIDTH = re.compile(r"vocab|image|patch|window|chunk|kernel|batch|block|position|state|scale|conv|cache|topk|num_")
_INNER = re.compile(r"intermediate|inner|ffn|d_ff")  # the widest part of a model
_VOCABULARY = 101
# Views whose arguments do not depend on a width.
_ALIKE = {"flatten", "movedim", "permute", "select", "squeeze", "t", "transpose", "unsqueeze"}


class NotScaledError(Exception):
    """The blocks of the wide model do not follow from the blocks of the narrow model."""


def narrower(config: Mapping[Any, Any], divisor: int, inner: int) -> dict[str, Any]:
    """Return a config with every width divided, and a small vocabulary.

    Args:
        config: The complete entries of a config.
        divisor: Divisor of the widths. A width that it does not divide becomes some other small number.
        inner: New number of hidden channels in an MLP.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(key, str):  # the number of a label or layer
            result[key] = value
            continue
        nested = isinstance(value, dict)
        result[key] = narrower(value, divisor, inner) if nested else _narrower(key, value, divisor, inner)
    return result


def _narrower(key: str, value: Any, divisor: int, inner: int) -> Any:
    if key.endswith("_token_id") and value is not None:
        return value if isinstance(value, int) and value < _VOCABULARY else 1
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if key == "vocab_size":
        return min(value, _VOCABULARY)
    if not _WIDTH.fullmatch(key) or _NO_WIDTH.search(key):
        return value
    if _INNER.search(key):
        return inner  # layouts depend on it only by halves, as in fused gate and up projections
    return value // divisor if value % divisor == 0 else max(8, value // divisor // 8 * 8)


def rescaled(block: ResidualBlock, narrow: Shapes, wide: Shapes, divisor: int) -> ResidualBlock:
    """Return the block of the wide model for a block of the narrow model.

    Args:
        block: A block of the narrow model.
        narrow: Shapes of the parameters of the narrow model.
        wide: Shapes of the parameters of the wide model.
        divisor: Divisor of the widths.

    Raises:
        NotScaledError: A layout of the narrow model has no equivalent in the wide model.
    """
    known: dict[Factor, Factor] = {}

    def scaled(path: Path) -> Path:
        for factor in path.factors:
            if factor not in known:
                known[factor] = _factor(factor, narrow, wide, divisor)
        return replace(path, factors=tuple(known[factor] for factor in path.factors))

    branches = (replace(branch, paths=tuple(map(scaled, branch.paths))) for branch in block.branches)
    return replace(block, branches=tuple(branches))


def _factor(factor: Factor, narrow: Shapes, wide: Shapes, divisor: int) -> Factor:
    if factor.adapters:
        raise NotScaledError("a matrix has adapters")
    if factor.parameter is None:
        return factor if factor.size is None else replace(factor, size=factor.size * divisor)
    if factor.parameter not in narrow or factor.parameter not in wide:
        raise NotScaledError(f"{factor.parameter} is no parameter")
    small = torch.empty(narrow[factor.parameter], device="meta")
    large = torch.empty(wide[factor.parameter], device="meta")
    if small.ndim != large.ndim:
        raise NotScaledError(f"{factor.parameter} has another number of dimensions")
    layout: list[tuple[Any, ...]] = []
    for step in factor.layout:
        new = _step(step, small, large)
        if not is_arithmetic(step):
            small, large = arranged(small, (step,)), arranged(large, (new,))
        layout.append(new)
    rows = factor.rows
    if rows is not None:
        counts = (small.shape[0], large.shape[0]) if factor.size is None else (small.numel(), large.numel())
        rows = tuple(_run(run, *counts) for run in rows)
    size = None if factor.size is None else _share(factor.size, small.numel(), large.numel())
    return replace(factor, layout=tuple(layout), rows=rows, size=size, shape=wide[factor.parameter])


def _step(step: tuple[Any, ...], small: Tensor, large: Tensor) -> tuple[Any, ...]:
    if step[0] == "narrow":
        _, dim, start, length = step
        counts = small.shape[dim], large.shape[dim]
        return ("narrow", dim, _share(start, *counts), _share(length, *counts))
    if step[0] == "select" and small.shape[step[1]] != large.shape[step[1]]:
        raise NotScaledError("it selects from a dimension whose size changed")
    if step[0] in _ALIKE or is_arithmetic(step):
        return step
    raise NotScaledError(f"it is rearranged by {step[0]!r}")


def _share(number: int, small: int, large: int) -> int:
    """Return the position in a dimension of size ``large`` for a position in one of size ``small``."""
    if number * large % small:
        raise NotScaledError(f"{number} of {small} is no whole number of {large}")
    return number * large // small


def _run(run: range, small: int, large: int) -> range:
    if run.step == 1:
        return range(_share(run.start, small, large), _share(run.stop, small, large))
    # Interleaved rows: every step-th row of the whole dimension.
    if run.start >= run.step or len(run) * run.step != small or large % run.step:
        raise NotScaledError("rows are interleaved in an unknown way")
    return range(run.start, large, run.step)

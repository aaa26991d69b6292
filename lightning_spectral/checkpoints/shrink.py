"""From a wide architecture to a narrow one whose blocks are the same, and back."""

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

# Entries of a config that say how wide something is. What they miss shows in the shapes, and then nothing is narrowed.
_WIDTH = re.compile(
    r"(.*_)?(dim|dims|size|sizes|rank|width|channels|d_model|d_ff|d_kv|d_inner|n_embd|n_inner|dim_ff|d_embed|n_embed)"
)
_NO_WIDTH = re.compile(r"vocab|image|patch|window|chunk|kernel|batch|block|position|state|scale|conv|cache|topk|num_")
_INNER = re.compile(r"intermediate|inner|ffn|d_ff")  # most numbers of a model are here
_VOCABULARY = 101
# Views that are the same whatever the widths are.
_ALIKE = {"flatten", "movedim", "permute", "select", "squeeze", "t", "transpose", "unsqueeze"}


class NotScaledError(Exception):
    """The blocks of the narrow model do not say what those of the wide one are."""


def narrower(config: Mapping[Any, Any], divisor: int, inner: int) -> dict[str, Any]:
    """Return a config with every width divided, and few tokens.

    Args:
        config: The complete entries of a config.
        divisor: What widths are divided by. One that is no multiple of it becomes another small number.
        inner: Hidden channels of an MLP.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(key, str):  # a number, of a label or a layer
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
        return inner  # no layout depends on it but by halves
    return value // divisor if value % divisor == 0 else max(8, value // divisor // 8 * 8)


def rescaled(block: ResidualBlock, narrow: Shapes, wide: Shapes, divisor: int) -> ResidualBlock:
    """Return a block of the narrow model as that of the wide one.

    Args:
        block: A block of the narrow model.
        narrow: Shapes of the parameters of the narrow model.
        wide: Those of the wide one.
        divisor: What widths were divided by.

    Raises:
        NotScaledError: Some layout has no equivalent.
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
    """Return the place in the large thing that is where ``number`` is in the small one."""
    if number * large % small:
        raise NotScaledError(f"{number} of {small} is no whole number of {large}")
    return number * large // small


def _run(run: range, small: int, large: int) -> range:
    if run.step == 1:
        return range(_share(run.start, small, large), _share(run.stop, small, large))
    # Interleaved rows, of which every step-th is taken all over.
    if run.start >= run.step or len(run) * run.step != small or large % run.step:
        raise NotScaledError("rows are interleaved in an unknown way")
    return range(run.start, large, run.step)

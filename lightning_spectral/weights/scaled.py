"""Residual scales that are attached to a model: where they are, and what they are to a branch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_spectral.records import Branch, Factor, Path, ResidualBlock
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.paths import module_at
from lightning_spectral.weights.protocol import Weights

__all__ = ["common_scale", "log_scale_tensor", "scale_module", "with_scales"]


def scale_module(model: nn.Module, branch: Branch | None) -> nn.Module | None:
    """Return the module that holds the scale of a branch, as ``log_scale`` of shape (1,); ``None`` where there is none.

    Keep the module, which is cheap to read again and again, and not its parameter, which sharding may replace.
    """
    path = None if branch is None else ModelWeights(model).log_scale(branch)
    return None if path is None else module_at(model, path.rpartition(".")[0])


def log_scale_tensor(model: nn.Module, branch: Branch | None) -> Tensor | None:
    """Return the parameter of shape (1,) that holds the logarithm of a branch's scale, if it has one."""
    module = scale_module(model, branch)
    return None if module is None else getattr(module, "log_scale")  # noqa: B009  # a Module knows no such attribute


def common_scale(scales: Sequence[float]) -> float:
    """Return the residual scale of branches that are added up: the geometric mean, 1 without any."""
    return float(math.prod(scales) ** (1 / len(scales))) if scales else 1.0


def with_scales(weights: Weights, blocks: Iterable[ResidualBlock]) -> tuple[ResidualBlock, ...]:
    """Add the residual scales of a model to the factors of its blocks, where they are not yet.

    Blocks that were found before the scales were attached are measured with them in this way: a ratio measured without
    the scales that a controller moves would never answer to it.
    """
    return tuple(
        replace(block, branches=tuple(_with_scale(weights, branch) for branch in block.branches)) for block in blocks
    )


def _with_scale(weights: Weights, branch: Branch) -> Branch:
    path = weights.log_scale(branch)
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

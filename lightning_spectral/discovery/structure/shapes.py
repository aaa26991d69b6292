"""Add the shapes of parameters to factors. A weight of another size can then be refused when it is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_spectral.records import Factor, Path, ResidualBlock
from lightning_spectral.weights.paths import module_at

__all__ = ["with_shapes"]


def with_shapes(model: nn.Module, blocks: Iterable[ResidualBlock]) -> tuple[ResidualBlock, ...]:
    """Return blocks whose factors hold the shapes of their parameters.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks.
    """
    known: dict[Factor, Factor] = {}

    def shaped(factor: Factor) -> Factor:
        if factor not in known:
            shape = None if factor.parameter is None else _shape(model, factor.parameter)
            adapters = tuple(tuple(map(shaped, chain)) for chain in factor.adapters)
            known[factor] = replace(factor, shape=shape, adapters=adapters)
        return known[factor]

    def path(item: Path) -> Path:
        return replace(item, factors=tuple(map(shaped, item.factors)))

    return tuple(
        replace(block, branches=tuple(replace(item, paths=tuple(map(path, item.paths))) for item in block.branches))
        for block in blocks
    )


def _shape(model: nn.Module, parameter: str) -> tuple[int, ...] | None:
    owner, _, name = parameter.rpartition(".")
    module = module_at(model, owner)
    if module is None:
        return None
    inner: Any = getattr(module, "parametrizations", None)
    # Reading a parametrized weight would compute it; its stored original has the same shape.
    parametrized = isinstance(inner, nn.ModuleDict) and name in inner
    value = getattr(inner[name], "original", None) if parametrized else getattr(module, name, None)
    return tuple(value.shape) if isinstance(value, Tensor) and not is_lazy(value) else None

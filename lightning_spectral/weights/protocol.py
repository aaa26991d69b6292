"""Where a parameter comes from: what measuring asks for, whoever has the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.flattened import FlatShard
from lightning_spectral.linalg.sharding.sharded import agreed, in_one_piece
from lightning_spectral.records import Branch, Path

__all__ = ["Weights", "gathered"]

_SMALL = ("scale", "pre_norm", "inner_norm", "post_norm")


class Weights(Protocol):
    """The weights of a model, by attribute path, as they are at the moment they are asked for."""

    @property
    def mesh(self) -> DeviceMesh | None:
        """The largest mesh over which weights are cut, ``None`` where every process has all of them."""

    def read(self, path: str) -> AbstractContextManager[Tensor | FlatShard]:
        """Fetch a weight: the tensor, or what this process holds of it if it was flattened and cut.

        Raises:
            AttributeError: There is none.
            ConfigurationError: It has no numbers that could be read.
        """

    def log_scale(self, branch: Branch) -> str | None:
        """Return the path of the logarithm of a branch's residual scale, ``None`` where it has none."""


def gathered(weights: Weights, paths: Iterable[Path]) -> Weights:
    """Gather the norm gains and multipliers of some paths where weights are sharded: two collectives for all of them.

    What every process has for itself beside a sharded matrix has to be the same in all of them, or sums would mix them:
    the first process decides.

    Args:
        weights: The weights, of the same model on all processes, which have to call this together.
        paths: The paths.
    """
    mesh = weights.mesh
    if mesh is None:
        return weights
    found: dict[str, Tensor | FlatShard] = {}
    for factor in (part for path in paths for whole in path.factors for part in whole.flat()):
        if factor.role in _SMALL and factor.parameter is not None and factor.parameter not in found:
            # An unreadable parameter is skipped here; the caller that needs it gets the error.
            with suppress(ConfigurationError, AttributeError), torch.no_grad(), weights.read(factor.parameter) as small:
                found[factor.parameter] = small
    together = agreed(in_one_piece(list(found.values())), [mesh] * len(found))
    return _Gathered(weights, dict(zip(found, together, strict=True)))


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Weights, of which the small ones are in one piece."""

    weights: Weights
    small: Mapping[str, Tensor]

    @property
    def mesh(self) -> DeviceMesh | None:
        return self.weights.mesh

    def read(self, path: str) -> AbstractContextManager[Tensor | FlatShard]:
        small = self.small.get(path)
        return self.weights.read(path) if small is None else nullcontext(small)

    def log_scale(self, branch: Branch) -> str | None:
        return self.weights.log_scale(branch)

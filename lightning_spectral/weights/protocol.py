"""Where a parameter comes from: what measuring asks of a live model and of a state dict alike."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_spectral.linalg.sharding.flattened import FlatShard
from lightning_spectral.records import Branch, Path

__all__ = ["Weights"]


class Weights(Protocol):
    """The weights of a model, by attribute path, as they are at the moment they are asked for."""

    def gathered(self, paths: Iterable[Path]) -> tuple[Weights, DeviceMesh | None]:
        """Gather the norm gains and multipliers of some paths where weights are cut. All processes call it together.

        Returns:
            The weights, and the largest mesh over which some are cut, ``None`` where every process has all of them.
        """

    def read(self, path: str) -> AbstractContextManager[Tensor | FlatShard]:
        """Fetch a weight: the tensor, or what this process holds of it if it was flattened and cut.

        Raises:
            AttributeError: There is none.
            ConfigurationError: It has no numbers that could be read.
        """

    def log_scale(self, branch: Branch) -> str | None:
        """Return the path of the logarithm of a branch's residual scale, ``None`` where it has none."""

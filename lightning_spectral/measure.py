"""Model, linearization and solver in, :class:`Measurement` out. No Trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_spectral.records import Linearization, Measurement, ResidualBlock

__all__ = ["Meter", "measure"]


class Meter:
    """Measures one model again and again, each time starting from the singular subspaces of the last time."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[ResidualBlock],
        *,
        linearization: Linearization = "circuit",
        solver: Any = None,
        safe_zone: tuple[float, float] = (0.5, 2.0),
    ) -> None: ...

    def measure(self, step: int = 0) -> Measurement:
        """Measure every block now."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the warm start as plain values and tensors."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the warm start of an earlier run; a state that does not fit is dropped."""
        raise NotImplementedError


def measure(
    model: nn.Module,
    blocks: Sequence[ResidualBlock] | None = None,
    *,
    linearization: Linearization = "circuit",
    solver: Any = None,
    batch: Any = None,
) -> Measurement:
    """Measure every block of a model once."""
    raise NotImplementedError

"""What all metrics of this package have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_spectral._checks import number

__all__ = ["StreamedMetric"]


class StreamedMetric(Metric):
    """A metric whose states are sums, and that can be plotted.

    Sums are kept in float64, also in a module that was moved to bfloat16. On a device without float64 (MPS), call
    ``set_dtype(torch.float32)`` before moving there.
    """

    higher_is_better = None
    full_state_update = False

    # What is not measurable is counted here, and left out of everything else.
    unmeasured: Tensor

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add_count(self, name: str) -> None:
        self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def _add_massive(self, massive: float | None) -> None:
        """Take up the option, as a state too: its value never changes, and all processes have the same.

        A ``MetricCollection`` computes only one of two metrics whose states are the same after the first batch. Two
        that differ in this option would be, until the first massive activation comes. It has to be the first state:
        torchmetrics 1.6 compares no other.
        """
        self.massive = None if massive is None else number("massive", massive, 1.0, math.inf, above=True)
        multiple = torch.tensor(self.massive or 0.0, dtype=torch.float64)
        self.add_state("massive_multiple", multiple, dist_reduce_fx="max")

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value, or several over the steps.

        Args:
            val: One result of ``forward`` or ``compute`` or a list of them; the result of ``compute`` by default.
            ax: Matplotlib axes to draw into; those of a new figure by default.

        Returns:
            Figure (``None`` if axes were given) and axes.
        """
        return self._plot(val, ax)

"""The base class of all metrics in this package."""

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

    Sums stay in float64 even if the module around the metric is moved to bfloat16. For a device without float64 (MPS),
    call ``set_dtype(torch.float32)`` before you move the metric there.
    """

    higher_is_better = None
    full_state_update = False

    # Number of tokens, sequences or blocks that could not be measured. No other state contains them.
    unmeasured: Tensor

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add_count(self, name: str) -> None:
        self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def _add_massive(self, massive: float | None) -> None:
        """Store the option ``massive``, and make it a state.

        A ``MetricCollection`` merges two metrics whose states are equal after the first batch. Two metrics that differ
        only in this option have equal sums until the first massive activation comes. With the option as a state they
        differ from the start. It must be the first state, because torchmetrics 1.6 compares only the first.
        """
        self.massive = None if massive is None else number("massive", massive, 1.0, math.inf, above=True)
        multiple = torch.tensor(self.massive or 0.0, dtype=torch.float64)
        self.add_state("massive_multiple", multiple, dist_reduce_fx="max")

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value, or several over the steps.

        Args:
            val: One result of ``forward`` or ``compute``, or a list of results; the result of ``compute`` by default.
            ax: Matplotlib axes to draw into; the axes of a new figure by default.

        Returns:
            Figure (``None`` if axes were given) and axes.
        """
        return self._plot(val, ax)

"""The spectral ratio over the measurements of a run."""

from __future__ import annotations

from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_spectral._checks import choice
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.measuring.meter import measure
from lightning_spectral.metrics.streamed import StreamedMetric
from lightning_spectral.records import Linearization, Measurement

__all__ = ["SpectralRatio", "Statistic"]

Statistic = Literal["min", "median", "max"]


class SpectralRatio(StreamedMetric):
    """The smallest, median or largest spectral ratio ρ over the blocks; over several updates the geometric mean of it.

    The whole is the set of all updates, in all processes. Replicas of one model measure the same in every process;
    since the value is a sum divided by a number of measurements, both added up over processes, it is then that of one
    process. States: the sums of ln ρ of the three statistics, the number of measurements, and the number of blocks that
    had no ratio, which counts a block once in each update of each process.

    Args:
        statistic: Over the blocks of one measurement: ``"min"``, ``"median"`` or ``"max"``, in ln ρ.
        linearization: The rule that turns branches into linear operators, see :func:`lightning_spectral.measure`.
        **kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    is_differentiable = False
    plot_lower_bound = 0.0

    measurements: Tensor

    def __init__(
        self, statistic: Statistic = "median", *, linearization: Linearization = "circuit", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.statistic: Statistic = choice("statistic", statistic, get_args(Statistic))
        self.linearization: Linearization = choice("linearization", linearization, get_args(Linearization))
        # All statistics in one state, and linearizations in different ones: a collection merges what is equal at first.
        self._sums = f"{linearization}_log_ratios"
        self._add_sum(self._sums, len(get_args(Statistic)))
        self._add_count("measurements")
        self._add_count("unmeasured")

    def update(self, model: nn.Module | Measurement) -> None:
        """Add one measurement.

        Args:
            model: A model, which is measured now, its blocks found anew; or what :func:`lightning_spectral.measure`
                returned, for blocks, solvers and example inputs of your own.

        Raises:
            ConfigurationError: The measurement was made by another linearization.
            BlocksNotFoundError: The model has no residual block.
            ExampleInputError: The model could not be run on any example input.
        """
        measurement = model if isinstance(model, Measurement) else measure(model, linearization=self.linearization)
        if measurement.linearization != self.linearization:
            raise ConfigurationError(
                f"the measurement has linearization={measurement.linearization!r}: expected {self.linearization!r}, "
                f"or a metric of its own, SpectralRatio(linearization={measurement.linearization!r})"
            )
        logs = [layer.log_ratio for layer in measurement if layer.log_ratio is not None]
        self.unmeasured = self.unmeasured + len(measurement.layers) - len(logs)
        if logs:
            sums: Tensor = getattr(self, self._sums)
            values = torch.tensor([min(logs), median(logs), max(logs)], dtype=torch.float64, device=sums.device)
            setattr(self, self._sums, sums + values.to(sums))
            self.measurements = self.measurements + 1

    def compute(self) -> Tensor:
        """Return the ratio as a scalar; NaN without a measurable block."""
        sums: Tensor = getattr(self, self._sums)
        return (sums[get_args(Statistic).index(self.statistic)] / self.measurements).exp()

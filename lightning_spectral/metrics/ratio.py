"""A metric of the spectral ratio over the measurements of a run."""

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
    """The smallest, median or largest spectral ratio ρ over the blocks. Several updates give its geometric mean.

    All updates of all processes have the same weight. Replicas of one model measure the same value in every process, so
    the mean over processes is this value. States: the sums of ln ρ for the three statistics, the number of
    measurements, and the number of blocks without a ratio, which counts a block once per update and process.

    Args:
        statistic: Over the blocks of one measurement: ``"min"``, ``"median"`` or ``"max"``, in ln ρ.
        linearization: The rule that turns branches into linear operators, see :func:`lightning_spectral.measure`.
        **kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: An argument cannot be used.

    Example:
        >>> metric = SpectralRatio()
        >>> metric.update(model)
        >>> round(metric.compute().item(), 1)
        0.9
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
        # A collection merges metrics with equal states. So all statistics share one state, which is shared work, but
        # each linearization has a state of its own.
        self._sums = f"{linearization}_log_ratios"
        self._add_sum(self._sums, len(get_args(Statistic)))
        self._add_count("measurements")
        self._add_count("unmeasured")

    def update(self, model: nn.Module | Measurement) -> None:
        """Add one measurement.

        Args:
            model: A model, whose blocks are found and measured now; or a result of :func:`lightning_spectral.measure`,
                if you want to choose blocks, solver or example input.

        Raises:
            ConfigurationError: The measurement has another linearization.
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
        """Return the ratio as a scalar; NaN if no block had a ratio."""
        sums: Tensor = getattr(self, self._sums)
        return (sums[get_args(Statistic).index(self.statistic)] / self.measurements).exp()

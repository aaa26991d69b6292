"""Metrics that are ranks of the matrix of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral._checks import choice, flag, steps
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.metrics.streamed import StreamedMetric
from lightning_spectral.tokens import Power, moment_shares, select, shares_effective_rank

__all__ = ["EffectiveRank", "StableRank"]

# The second moment is rounded once per batch, and so is the square of the mean that is subtracted from it. For n
# batches, the difference has an error of about √n · ε times the energy before the subtraction.
_ROUNDINGS = 1000


class StableRank(StreamedMetric):
    """The stable rank ‖X‖_F²/σ₁² of the matrix X whose rows are all tokens of all sequences, batches and processes.

    States: the second moment XᵀX (width × width), the sum of the tokens, their number, and the number of tokens left
    out because they are not finite. :class:`EffectiveRank` has the same states, and a ``MetricCollection`` keeps them
    once.

    Args:
        width: Width of the tokens.
        centred: Subtract the mean of all tokens. Deviations from the mean that are a million times smaller than the
            mean are lost in the rounding of float64.
        massive: Leave out, in each sequence, massive activations above this multiple of the median; see
            :func:`lightning_spectral.tokens.massive_activations`.
        **kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: An argument cannot be used.

    Example:
        >>> metric = StableRank(width=4)
        >>> metric.update(torch.eye(4)[None])
        >>> round(metric.compute().item(), 6)
        4.0
    """

    is_differentiable = True
    plot_lower_bound = 1.0

    moment: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, width: int, *, centred: bool = False, massive: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = steps("width", width)
        self.centred = flag("centred", centred)
        self._add_massive(massive)
        self._add_sum("moment", width, width)
        self._add_sum("total", width)
        self._add_count("count")
        self._add_count("unmeasured")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: ``(..., tokens, width)``, of any real dtype.
            mask: ``(..., tokens)``, true or non-zero where a token counts.

        Raises:
            ConfigurationError: The shapes do not fit.
        """
        if x.shape[-1:] != (self.width,):
            raise ConfigurationError(f"x has the shape {tuple(x.shape)}: expected (..., tokens, {self.width})")
        X, valid = select(x, mask, massive=self.massive)
        X, valid = X.reshape(-1, self.width), valid.reshape(-1)
        finite = X.isfinite().all(-1)
        X = torch.where((valid & finite)[:, None], X, 0.0)
        with torch.autocast(X.device.type, enabled=False):
            self.moment = self.moment + X.mT @ X
        self.total = self.total + X.sum(0)
        self.count = self.count + (valid & finite).sum()
        self.unmeasured = self.unmeasured + (valid & ~finite).sum()

    def _shares(self) -> Tensor:
        """Return the shares of energy σᵢ²/Σσ², ``(width,)``."""
        if not self.centred:
            return moment_shares(self.moment, size=self.width)
        mean = torch.outer(self.total, self.total) / self.count.clamp(min=1)
        total = self.moment.detach().trace()
        return moment_shares(self.moment - mean, size=max(self.width, _ROUNDINGS), total=total)

    def compute(self) -> Tensor:
        """Return the rank, from 1 to the width, as a scalar; NaN if there were no tokens."""
        return 1 / self._shares()[0]


class EffectiveRank(StableRank):
    """The effective rank exp(−Σ p ln p) of the matrix of all tokens, with the states of :class:`StableRank`.

    Args:
        width: Width of the tokens.
        power: 1 for p ∝ σ (Roy and Vetterli, EUSIPCO 2007), 2 for p ∝ σ² ('The 1:1 Rule'). Never compare
            values with different powers.
        centred: Subtract the mean of all tokens. Deviations from the mean that are a million times smaller than the
            mean are lost in the rounding of float64.
        massive: Leave out, in each sequence, massive activations above this multiple of the median; see
            :func:`lightning_spectral.tokens.massive_activations`.
        **kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: An argument cannot be used.

    Example:
        >>> metric = EffectiveRank(width=4)
        >>> metric.update(torch.eye(4)[None])
        >>> round(metric.compute().item(), 6)
        4.0
    """

    def __init__(
        self, width: int, *, power: Power = 1, centred: bool = False, massive: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(width, centred=centred, massive=massive, **kwargs)
        self.power: Power = choice("power", power, (1, 2))

    def compute(self) -> Tensor:
        """Return the rank, from 1 to the width, as a scalar; NaN if there were no tokens."""
        return shares_effective_rank(self._shares(), power=self.power)

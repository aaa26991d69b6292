"""Metrics that are means over all sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_spectral.metrics.streamed import StreamedMetric
from lightning_spectral.tokens import token_residual, token_similarity

__all__ = ["TokenResidual", "TokenSimilarity"]


class _SequenceMean(StreamedMetric):
    """The mean of one value per sequence. Subclasses name the value, and the state that holds the sum."""

    is_differentiable = True
    plot_upper_bound = 1.0

    # Two metrics need two names, because a collection merges metrics with equal states: both are 0 after zeros.
    _sum: ClassVar[str]
    _value: ClassVar[Callable[..., Tensor]]

    sequences: Tensor

    def __init__(self, *, massive: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_massive(massive)
        self._add_sum(self._sum)
        self._add_count("sequences")
        self._add_count("unmeasured")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add sequences.

        Args:
            x: ``(..., tokens, width)``, of any real dtype; one sequence for each leading index.
            mask: ``(..., tokens)``, true or non-zero where a token counts.

        Raises:
            ConfigurationError: The shapes do not fit.
        """
        values = self._value(x, mask, massive=self.massive)
        measured = ~values.isnan()
        setattr(self, self._sum, getattr(self, self._sum) + torch.where(measured, values, 0.0).sum())
        self.sequences = self.sequences + measured.sum()
        self.unmeasured = self.unmeasured + (~measured).sum()

    def compute(self) -> Tensor:
        """Return the mean as a scalar; NaN if no sequence was measurable."""
        mean: Tensor = getattr(self, self._sum) / self.sequences
        return mean


class TokenResidual(_SequenceMean):
    """The mean of ‖X − 1x̄ᵀ‖_F / ‖X‖_F over all sequences: 0 if the tokens of each sequence are one vector.

    Every sequence of every batch and process has the same weight, whatever its length. States: the sum of the
    residuals, the number of sequences, and the number of sequences left out because they are zero, empty or not finite.

    Args:
        massive: Leave out, in each sequence, massive activations above this multiple of the median; see
            :func:`lightning_spectral.tokens.massive_activations`.
        **kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: An argument cannot be used.

    Example:
        >>> metric = TokenResidual()
        >>> metric.update(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))  # sequences, tokens, width
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    _sum = "residual_sum"
    _value = staticmethod(token_residual)


class TokenSimilarity(_SequenceMean):
    """The mean cosine over all pairs of tokens, averaged over sequences: 1 if all tokens of each have one direction.

    Every sequence of every batch and process has the same weight, whatever its length. States: the sum of the cosines,
    the number of sequences, and the number of sequences left out because fewer than two of their tokens have a
    direction, or because they are not finite.

    Args:
        massive: Leave out, in each sequence, massive activations above this multiple of the median; see
            :func:`lightning_spectral.tokens.massive_activations`.
        **kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: An argument cannot be used.

    Example:
        >>> metric = TokenSimilarity()
        >>> metric.update(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    plot_lower_bound = -1.0
    _sum = "similarity_sum"
    _value = staticmethod(token_similarity)

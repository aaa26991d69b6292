"""Metrics of torchmetrics over the definitions of :mod:`lightning_spectral.tokens` and over :func:`measure`.

Every state that accumulates is a sum, over batches and over processes: the value over a stream is the value over the
whole, however it was cut. Each class says what its whole is. What is not measurable (a token or a sequence with a value
that is not finite, a sequence of zeros) is left out and counted in the state ``unmeasured``, without a warning; a value
over nothing is NaN. In none of them is higher better: each says what the model is, not how good it is.

.. code-block:: python

    metrics = MetricCollection({"residual": TokenResidual(), "rank": EffectiveRank(768, centred=True)})
    metrics.update(hidden_states, mask=attention_mask)
    metrics.compute()
"""

from lightning_spectral.metrics.per_sequence import TokenResidual, TokenSimilarity
from lightning_spectral.metrics.ratio import SpectralRatio
from lightning_spectral.metrics.whole_stream import EffectiveRank, StableRank

__all__ = ["EffectiveRank", "SpectralRatio", "StableRank", "TokenResidual", "TokenSimilarity"]

"""Metrics of torchmetrics over the definitions of :mod:`lightning_spectral.tokens` and over :func:`measure`.

Every accumulating state is a sum over batches and processes. So the value does not depend on how the data is split into
batches and processes. Tokens and sequences that cannot be measured (values that are not finite, sequences of zeros) are
left out without a warning, and the state ``unmeasured`` counts them. A value over no data is NaN. The metrics describe
a model and do not rate it, so ``higher_is_better`` is ``None``.

.. code-block:: python

    metrics = MetricCollection({"residual": TokenResidual(), "rank": EffectiveRank(768, centred=True)})
    metrics.update(hidden_states, mask=attention_mask)
    metrics.compute()
"""

from lightning_spectral.metrics.per_sequence import TokenResidual, TokenSimilarity
from lightning_spectral.metrics.ratio import SpectralRatio
from lightning_spectral.metrics.whole_stream import EffectiveRank, StableRank

__all__ = ["EffectiveRank", "SpectralRatio", "StableRank", "TokenResidual", "TokenSimilarity"]

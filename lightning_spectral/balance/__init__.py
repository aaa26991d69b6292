"""Balance without a controller: once at initialization, or as a penalty in the loss."""

from lightning_spectral.balance.initialization import balance_init_
from lightning_spectral.balance.penalty import balance_penalty

__all__ = ["balance_init_", "balance_penalty"]

"""Pure definitions on tensors of token representations, ``(..., tokens, width)``. Knows no model."""

from lightning_spectral.tokens.collapse import sample_residual, token_residual, token_similarity
from lightning_spectral.tokens.ranks import (
    Power,
    effective_rank,
    participation_ratio,
    rank_one_residual,
    rankme,
    shares_effective_rank,
    stable_rank,
)
from lightning_spectral.tokens.selection import massive_activations, select
from lightning_spectral.tokens.spectrum import moment_shares, spectral_shares

__all__ = [
    "Power",
    "effective_rank",
    "massive_activations",
    "moment_shares",
    "participation_ratio",
    "rank_one_residual",
    "rankme",
    "sample_residual",
    "select",
    "shares_effective_rank",
    "spectral_shares",
    "stable_rank",
    "token_residual",
    "token_similarity",
]

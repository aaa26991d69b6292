"""Ranks that count softly. For every X: stable ≤ participation ratio ≤ effective rank of σ² ≤ rank.

The order is that of the Rényi entropies of infinite, second, first and zeroth order of the shares σᵢ²/Σσ². All ranks
are invariant to the scale of X, to the order of its tokens and to rotations of its width. Uncentred ranks near one are
normal in healthy language models, whose activations have a large mean and a few massive values: look at ``centred``
and at ``massive`` before calling anything a collapse.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_spectral._checks import choice
from lightning_spectral.tokens.spectrum import gram, spectral_shares

__all__ = [
    "Power",
    "effective_rank",
    "participation_ratio",
    "rank_one_residual",
    "rankme",
    "shares_effective_rank",
    "stable_rank",
]

Power = Literal[1, 2]


def effective_rank(
    X: Tensor, mask: Tensor | None = None, *, power: Power, centred: bool = False, massive: float | None = None
) -> Tensor:
    """Return exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ^power / Σσ^power.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts; the same as dropping the others.
        power: 1 for the definition of Roy and Vetterli, "The effective rank: a measure of effective dimensionality"
            (EUSIPCO 2007), on singular values; 2 for that of 'The 1:1 Rule', on their squares. The second is smaller
            or equal; never compare across the two.
        centred: Subtract the mean token first.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)``, from 1 to min(tokens, width); NaN where X is not measurable (see :func:`spectral_shares`).

    Raises:
        ConfigurationError: The power is neither 1 nor 2, or the shapes do not fit.
    """
    return shares_effective_rank(spectral_shares(X, mask, centred=centred, massive=massive), power=power)


def shares_effective_rank(shares: Tensor, *, power: Power) -> Tensor:
    """Return the effective rank from shares of energy.

    Args:
        shares: ``(..., k)``, σᵢ²/Σσ², as :func:`spectral_shares` returns them.
        power: 1 for p ∝ σ, 2 for p ∝ σ².

    Returns:
        ``(...)``, NaN where the shares are.

    Raises:
        ConfigurationError: The power is neither 1 nor 2.
    """
    choice("power", power, (1, 2))
    p = shares if power == 2 else _normalized_roots(shares)
    return _entropy(p).exp()


def _entropy(p: Tensor) -> Tensor:
    """Return −Σ p ln p with 0 ln 0 = 0, whose gradient at 0 is taken for 0."""
    p = torch.where(p == 0, 1.0, p)
    return -(p * p.log()).sum(-1)


def _normalized_roots(shares: Tensor) -> Tensor:
    """Return σᵢ/Σσ."""
    present = shares != 0
    sigma = torch.where(present, torch.where(present, shares, 1.0).sqrt(), 0.0)
    return sigma / sigma.sum(-1, keepdim=True)


def stable_rank(
    X: Tensor, mask: Tensor | None = None, *, centred: bool = False, massive: float | None = None
) -> Tensor:
    """Return ‖X‖_F² / σ₁².

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts; the same as dropping the others.
        centred: Subtract the mean token first.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)``, from 1 to min(tokens, width); NaN where X is not measurable (see :func:`spectral_shares`).
    """
    return 1 / spectral_shares(X, mask, centred=centred, massive=massive)[..., 0]


def participation_ratio(
    X: Tensor, mask: Tensor | None = None, *, centred: bool = False, massive: float | None = None
) -> Tensor:
    """Return (Σλ)² / Σλ², λ = σ², without eigenvalues: it is (tr G)² / ‖G‖_F² for the Gram matrix G.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts; the same as dropping the others.
        centred: Subtract the mean token first.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)``, from 1 to min(tokens, width); NaN where X is not measurable (see :func:`spectral_shares`).
    """
    G, measurable = gram(X, mask, centred=centred, massive=massive)
    squares = torch.where(measurable, G.square().sum((-2, -1)), 1.0)
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(measurable, trace.square() / squares, math.nan)


def rankme(X: Tensor, mask: Tensor | None = None, *, epsilon: float = 1e-7) -> Tensor:
    """Return RankMe: exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ + ε, over min(tokens, width) singular values.

    Garrido, Balestriero, Najman and LeCun, "RankMe" (arXiv:2210.02885). It is the effective rank with ``power=1`` but
    for ε, and is meant for many more rows than columns: embeddings of 25 600 samples in the paper.

    Args:
        X: ``(..., tokens, width)``, of any real dtype; the rows are the samples.
        mask: ``(..., tokens)``, true or non-zero where a row counts; the same as dropping the others.
        epsilon: ε.

    Returns:
        ``(...)``; NaN where X is not measurable (see :func:`spectral_shares`).
    """
    p = _normalized_roots(spectral_shares(X, mask)) + epsilon
    if mask is not None:
        # ε counts once for each singular value that exists: a dropped row would have none.
        exists = torch.arange(p.shape[-1], device=p.device) < mask.bool().sum(-1, keepdim=True).to(p.device)
        p = torch.where(exists | p.isnan(), p, 0.0)
    return _entropy(p).exp()


def rank_one_residual(
    X: Tensor, mask: Tensor | None = None, *, centred: bool = False, massive: float | None = None
) -> Tensor:
    """Return √(1 − σ₁²/Σσ²), the relative distance of X from the nearest matrix of rank one.

    It is at most the token residual, which is the distance from the nearest matrix with equal rows.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts; the same as dropping the others.
        centred: Subtract the mean token first.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)``, from 0 to below 1; NaN where X is not measurable (see :func:`spectral_shares`).
    """
    rest = spectral_shares(X, mask, centred=centred, massive=massive)[..., 1:]
    # vector_norm, unlike the root of a sum, has a gradient at zero.
    present = rest != 0
    residual: Tensor = torch.linalg.vector_norm(
        torch.where(present, torch.where(present, rest, 1.0).sqrt(), 0.0), dim=-1
    )
    return residual

"""Soft ranks. For every X: stable rank ≤ participation ratio ≤ effective rank of σ² ≤ rank.

Each is exp H_α, where H_α is the Rényi entropy of order α of the shares pᵢ = σᵢ²/Σσ², and H_α falls with α:

    α    rank                     formula                 σ² = (8, 1, 1)
    0    rank                     number of pᵢ > 0        3
    1    effective rank (σ²)      exp(−Σ p ln p)          1.89
    2    participation ratio      1 / Σ p²                1.52
    ∞    stable rank              1 / max p               1.25

All ranks are invariant to the scale of X, to the order of its tokens and to rotations of its width. Healthy language
models have uncentred ranks near 1, because their activations have a large mean and a few massive values. Look at
``centred`` and at ``massive`` before you call a low rank a collapse.
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
        power: 1 for singular values, as Roy and Vetterli define it, "The effective rank: a measure of effective
            dimensionality" (EUSIPCO 2007); 2 for their squares, as in 'The 1:1 Rule'. The rank with 2 is at most the
            rank with 1. Never compare one with the other.
        centred: Subtract the mean token first.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)``, from 1 to min(tokens, width); NaN where X is not measurable (see :func:`spectral_shares`).

    Raises:
        ConfigurationError: The power is neither 1 nor 2, or the shapes do not fit.

    Example:
        >>> round(effective_rank(torch.eye(4), power=2).item(), 1)
        4.0
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

    Example:
        >>> shares_effective_rank(torch.tensor([0.5, 0.5]), power=2)
        tensor(2.)
    """
    # Shares are σ²/Σσ² already, so power 2 takes them as they are, and power 1 needs the roots, normalized again.
    choice("power", power, (1, 2))
    p = shares if power == 2 else _normalized_roots(shares)
    return _entropy(p).exp()


def _entropy(p: Tensor) -> Tensor:
    """Return −Σ p ln p with 0 ln 0 = 0."""
    # The derivative ln p + 1 is infinite at 0. Replacing 0 by 1 keeps the value (1 ln 1 = 0) and makes the gradient 0.
    p = torch.where(p == 0, 1.0, p)
    return -(p * p.log()).sum(-1)


def _normalized_roots(shares: Tensor) -> Tensor:
    """Return σᵢ/Σσ."""
    # The derivative of √p is infinite at 0, and infinity times the 0 of an outer `where` is NaN. So the zeros are
    # replaced twice: inside of the root, which makes its derivative finite, and outside, which restores the value.
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

    Example:
        >>> round(stable_rank(torch.eye(4)).item(), 1)
        4.0
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

    Example:
        >>> round(participation_ratio(torch.eye(4)).item(), 1)
        4.0
    """
    # With λ the eigenvalues of G: Σλ = tr G and Σλ² = ‖G‖_F². So no eigenvalue routine is needed, which on CUDA would
    # wait for the device.
    G, measurable = gram(X, mask, centred=centred, massive=massive)
    squares = torch.where(measurable, G.square().sum((-2, -1)), 1.0)
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(measurable, trace.square() / squares, math.nan)


def rankme(X: Tensor, mask: Tensor | None = None, *, epsilon: float = 1e-7) -> Tensor:
    """Return RankMe: exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ + ε, over min(tokens, width) singular values.

    Source: Garrido, Balestriero, Najman and LeCun, "RankMe" (arXiv:2210.02885). It differs from the effective rank with
    ``power=1`` only by ε. It is meant for many more rows than columns; the paper uses embeddings of 25 600 samples.

    Args:
        X: ``(..., tokens, width)``, of any real dtype; the rows are the samples.
        mask: ``(..., tokens)``, true or non-zero where a row counts; the same as dropping the others.
        epsilon: ε.

    Returns:
        ``(...)``; NaN where X is not measurable (see :func:`spectral_shares`).

    Example:
        >>> round(rankme(torch.eye(4)).item(), 1)
        4.0
    """
    p = _normalized_roots(spectral_shares(X, mask)) + epsilon
    if mask is not None:
        # ε is added once per singular value, and a matrix without the dropped rows has only as many as kept rows.
        exists = torch.arange(p.shape[-1], device=p.device) < mask.bool().sum(-1, keepdim=True).to(p.device)
        p = torch.where(exists | p.isnan(), p, 0.0)
    return _entropy(p).exp()


def rank_one_residual(
    X: Tensor, mask: Tensor | None = None, *, centred: bool = False, massive: float | None = None
) -> Tensor:
    """Return √(1 − σ₁²/Σσ²), the relative distance of X from the nearest matrix of rank one.

    It is at most the token residual, the distance from the nearest matrix with equal rows, because a matrix with equal
    rows has rank one.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts; the same as dropping the others.
        centred: Subtract the mean token first.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)``, from 0 to below 1; NaN where X is not measurable (see :func:`spectral_shares`).

    Example:
        >>> round(rank_one_residual(torch.ones(3, 4)).item(), 1)
        0.0
    """
    rest = spectral_shares(X, mask, centred=centred, massive=massive)[..., 1:]
    # By vector_norm, whose gradient at 0 is 0; √(Σp) would give NaN. The two `where` are as in _normalized_roots.
    present = rest != 0
    residual: Tensor = torch.linalg.vector_norm(
        torch.where(present, torch.where(present, rest, 1.0).sqrt(), 0.0), dim=-1
    )
    return residual

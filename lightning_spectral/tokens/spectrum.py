"""The shares of energy σᵢ²/Σσ² of matrices, computed from the smaller Gram matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_spectral.tokens.selection import centred_tokens, select, unit_scaled

__all__ = ["gram", "moment_shares", "spectral_shares"]


def spectral_shares(
    X: Tensor, mask: Tensor | None = None, *, centred: bool = False, massive: float | None = None
) -> Tensor:
    """Return the shares of energy σᵢ²/Σσ² of X in descending order.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts; the same as dropping the others.
        centred: Subtract the mean token first.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(..., min(tokens, width))``; each spectrum sums to 1. A share is 0 if σ² is below the rounding error of the
        Gram matrix, max(tokens, width) · ε · σ₁². All shares are NaN if X is zero (no token counts, or nothing is left
        after centring) or has a value that is not finite. On CUDA only the eigenvalue routine of torch waits for the
        device.

    Example:
        >>> spectral_shares(torch.diag(torch.tensor([2.0, 1.0])))
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    G, measurable = gram(X, mask, centred=centred, massive=massive)
    return torch.where(measurable[..., None], moment_shares(G, size=max(X.shape[-2:])), math.nan)


def gram(
    X: Tensor, mask: Tensor | None = None, *, centred: bool = False, massive: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the smaller of XXᵀ and XᵀX of the scaled X, and whether X is measurable.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts.
        centred: Subtract the mean token first.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(..., k, k)`` with k = min(tokens, width), and ``(...)``, boolean.
    """
    X, valid = select(X, mask, massive=massive)
    X, measurable = unit_scaled(X)
    if centred:
        X, remains = unit_scaled(centred_tokens(X, valid))
        measurable = measurable & remains
    with torch.autocast(X.device.type, enabled=False):
        return (X @ X.mT if X.shape[-2] < X.shape[-1] else X.mT @ X), measurable


def moment_shares(G: Tensor, *, size: int, total: Tensor | None = None) -> Tensor:
    """Return the eigenvalues of a second moment as shares of their sum.

    Args:
        G: ``(..., k, k)``, symmetric and positive semidefinite up to rounding, without overflow.
        size: Eigenvalues below size · ε · ``total`` are rounding errors and become 0.
        total: ``(...)``, the energy that the rounding errors are relative to: for a G centred by subtraction,
            the trace before it. By default the largest eigenvalue.

    Returns:
        ``(..., k)`` in descending order, NaN if G is zero or not finite.

    Example:
        >>> moment_shares(torch.diag(torch.tensor([4.0, 1.0])), size=2)
        tensor([0.8000, 0.2000])
    """
    scale = G.detach().diagonal(dim1=-2, dim2=-1).amax(-1)
    finite = G.detach().isfinite().all(-1).all(-1)
    measurable = finite & (scale > 0)
    scale = torch.where(measurable, scale, 1.0)
    # One NaN would make the eigenvalue routine raise for the whole batch.
    eigenvalues = torch.linalg.eigvalsh(torch.where(measurable[..., None, None], G, 0.0) / scale[..., None, None])
    eigenvalues = eigenvalues.flip(-1)
    largest = eigenvalues.detach()[..., :1] if total is None else (total / scale)[..., None]
    eigenvalues = torch.where(eigenvalues > size * torch.finfo(G.dtype).eps * largest, eigenvalues, 0.0)
    energy = eigenvalues.sum(-1, keepdim=True)
    measurable = measurable[..., None] & (energy.detach() > 0)
    return torch.where(measurable, eigenvalues, math.nan) / torch.where(measurable, energy, 1.0)

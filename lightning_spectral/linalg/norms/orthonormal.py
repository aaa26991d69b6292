"""Orthonormal rows by the Cholesky factor of their Gram matrix: a few products instead of a Householder factorization.

For rows W with W Wᵀ = L Lᵀ, the rows of Q = L⁻¹W are orthonormal, and W = L Q. In finite precision Q misses by about
u · κ(W)², where u is the rounding error of the Gram matrix. The Gram matrix is computed in float64, so rows of float32
may be nearly dependent. A second pass takes the rest of the error out: κ(Q) is small by then. This is CholeskyQR2 of
Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, "Roundoff error analysis of the CholeskyQR2 algorithm" (ETNA 44, 2015).

Batched Householder factorizations wait for the host on accelerators, and are one LAPACK call per matrix on CPUs. Here
nothing waits for the host: a factorization that fails leaves NaN in its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.linalg.operators import sum_dtype

__all__ = ["factored", "orthonormalized", "wide"]


def wide(rows: Tensor) -> Tensor:
    """Convert to float64, or to float32 on the Apple GPU, which has nothing wider."""
    return rows.to(sum_dtype(rows.device))


def factored(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize rows W = L Q in one pass.

    Args:
        rows: ``(batch, b, n)``, linearly independent up to the rounding errors of float32.

    Returns:
        Q ``(batch, b, n)``, nearly orthonormal rows, and L ``(batch, b, b)``, lower triangular, in the dtype of the
        rows. NaN or infinite where the rows are not finite.
    """
    W = wide(rows)
    gram = W @ W.mT
    # Of the order of the rounding error of the Gram matrix, so that dependent rows do not stop the factorization.
    shift = gram.diagonal(dim1=1, dim2=2).sum(1) * torch.finfo(gram.dtype).eps
    gram.diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
    L = torch.linalg.cholesky_ex(gram).L
    return torch.linalg.solve_triangular(L, W, upper=False).to(rows.dtype), L.to(rows.dtype)


def orthonormalized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize rows W = L Q in two passes, so that Q is orthonormal to rounding; see :func:`factored`."""
    Q, L = factored(rows)
    Q, L2 = factored(Q)
    return Q, L @ L2

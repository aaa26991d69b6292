"""An upper bound of the spectral norm that holds with a known probability: the certificate of a Krylov subspace.

A Rayleigh value bounds σ₁ from below. A certain upper bound needs a factorization; a probable one needs a Gaussian test
matrix X. X is almost never nearly orthogonal to the dominant right singular vector v₁, whichever vector that is. So it
is improbable that σ₁ is far above everything that the Krylov subspace of X has seen, and the probability is known.

Let Q = [Q₁ … Q_q] be the block Krylov basis of AᵀA from the block S = [V X] = Q₁R (V arbitrary), T = QᵀAᵀAQ with
eigenpairs (θᵢ, sᵢ), and B the last coupling block, AᵀAQ = QT + Q_{q+1}BE_qᵀ. R_X has the columns of R that belong to X,
and E₁ selects the first block. Let t = σ₁² > θ₁, c = Qᵀv₁ and w = Q_{q+1}ᵀv₁. Multiplying AᵀAv₁ = tv₁ by Qᵀ gives
(t − T)c = E_qBᵀw, hence

    Xᵀv₁ = R_XᵀE₁ᵀc = M(t)w,    M(t) = Σᵢ (R_XᵀE₁ᵀsᵢ)(BE_qᵀsᵢ)ᵀ / (t − θᵢ),    so ‖Xᵀv₁‖ ≤ ‖M(t)‖₂.

The last step holds because ‖w‖ ≤ 1: Q_{q+1} has orthonormal columns. Xᵀv₁ is a vector of s standard normal numbers,
whatever v₁ is. So ‖Xᵀv₁‖ ≥ δ, except with the probability that a χ² variable with s degrees of freedom falls below δ².
That excludes every t with ‖M(t)‖₂ < δ:

    ‖M(t)‖₂ │╲
            │  ╲                     M has poles at the θᵢ and falls with t above the largest one, θ₁.
          δ │────╲──────
            │      ╲______           The crossing is the upper bound of σ₁².
            └──┬──┬──────── t
              θ₁  bound

For one column this is the bound of Hochstenbach, "Probabilistic upper bounds for the matrix two-norm", J. Sci. Comput.
57 (2013). A block of 8 columns needs far fewer steps, because 8 normal numbers are rarely all small at once.

The same argument carries a bound over a change A → A + E that does not depend on X. With u, v the dominant singular
vectors of E, ‖EX‖₂ ≥ ‖uᵀEX‖ = ‖E‖₂‖vᵀX‖ ≥ ‖E‖₂δ, so σ₁ has grown by ‖EX‖₂/δ at most. For an unstructured change, such
as an optimizer's, that is about 1.2 ‖E‖_F.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

__all__ = ["grams", "normal_quantile", "spectral_norms", "upper_bound"]

_COARSE = 4.0 ** torch.arange(-7, 5, dtype=torch.float64, device="cpu")  # relative excess of t over θ₁: 6e-5 … 256
_FINE = 4.0 ** torch.linspace(-1, 0, 17, dtype=torch.float64, device="cpu")[1:]


@cache
def normal_quantile(size: int, failure_probability: float) -> float:
    """Return δ such that a standard normal vector is shorter than δ with the given probability.

    Args:
        size: Entries of the vector.
        failure_probability: Between 0 and 1.
    """
    low, high = 0.0, float(size + 40)
    half = torch.tensor(size / 2, dtype=torch.float64, device="cpu")
    for _ in range(200):
        middle = (low + high) / 2
        below = torch.special.gammainc(half, half.new_tensor(middle / 2)) < failure_probability
        low, high = (middle, high) if below else (low, middle)
    return math.sqrt(low)


def upper_bound(theta: Tensor, start: Tensor, coupling: Tensor, delta: float) -> Tensor:
    """Return an upper bound of σ₁² that fails with the probability of a normal vector shorter than ``delta``.

    Args:
        theta: ``(batch, k)``, Ritz values θ ascending, the last one positive.
        start: ``(batch, s, k)``, the columns R_XᵀE₁ᵀsᵢ.
        coupling: ``(batch, b, k)``, the columns BE_qᵀsᵢ.
        delta: Quantile of the length of an s-dimensional normal vector.

    Returns:
        ``(batch,)``; infinite where no t up to the last point of the grid is excluded.
    """
    excess = _first_excluded(theta, start, coupling, delta, _COARSE.expand(len(theta), -1))
    # The coarse points are a factor of 4 apart; the crossing lies in the last interval.
    excess = _first_excluded(theta, start, coupling, delta, excess.unsqueeze(1) * _FINE)
    return theta[:, -1] * (1 + excess)


def _first_excluded(theta: Tensor, start: Tensor, coupling: Tensor, delta: float, excess: Tensor) -> Tensor:
    """Return, per operator, the smallest excess from which on every given point is excluded, ``(batch,)``.

    ‖M(t)‖₂ need not fall monotonically, since terms of different signs add up. So the last point that is not excluded
    counts, not the first that is.
    """
    t = theta[:, -1:] * (1 + excess)  # (batch, points)
    weights = 1 / (t.unsqueeze(2) - theta.unsqueeze(1)).clamp_min(torch.finfo(t.dtype).tiny)  # (batch, points, k)
    weighted = start.unsqueeze(1) * weights.unsqueeze(2)  # (batch, points, s, k)
    M = (weighted.flatten(1, 2) @ coupling.mT).reshape(*weighted.shape[:3], -1)  # (batch, points, s, b)
    # ‖M‖₂ ≤ (Σ σᵢ⁸)^(1/8) = ‖(MMᵀ)²‖_F^(1/4): the Schatten-8 norm exceeds the spectral norm at most 8^(1/8) = 1.3 times
    # for 8 rows, and takes two products instead of an SVD. The error is on the safe side.
    scale = M.abs().amax((2, 3), keepdim=True).clamp_min(torch.finfo(t.dtype).tiny)
    gram = (M / scale) @ (M / scale).mT
    norm = torch.linalg.matrix_norm(gram @ gram).pow(0.25) * scale[..., 0, 0]
    allowed = (norm >= delta) | norm.isnan()
    last_allowed = (allowed * torch.arange(1, excess.shape[1] + 1, device=excess.device)).amax(
        1
    )  # 0 where all points are excluded
    padded = torch.cat([excess, torch.full_like(excess[:, :1], math.inf)], dim=1)
    return padded.gather(1, last_allowed.unsqueeze(1)).squeeze(1)


def grams(rows: Tensor) -> Tensor:
    """Return what :func:`spectral_norms` needs of matrices of few rows: ``(batch, s, m) -> (batch, s + 1, s)``."""
    scale = rows.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows / scale
    return torch.cat([rows @ rows.mT, scale.expand(-1, 1, rows.shape[1])], dim=1)


def spectral_norms(grams: Tensor) -> Tensor:
    """Return the spectral norms of matrices by their scaled Gram matrices, infinite where these are not finite.

    Args:
        grams: ``(batch, s + 1, s)``, on the CPU in float64.
    """
    finite = grams.isfinite().all(2).all(1)
    largest = torch.linalg.eigvalsh(torch.where(finite[:, None, None], grams[:, :-1], 0.0))[:, -1]
    return torch.where(finite, largest.clamp_min(0).sqrt() * grams[:, -1, 0], math.inf)

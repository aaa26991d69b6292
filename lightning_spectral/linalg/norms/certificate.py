"""An upper bound of the spectral norm that holds with a known probability: the certificate of a Krylov subspace.

A Rayleigh value bounds σ₁ from below. From above nothing short of a factorization does, unless chance helps: a Gaussian
test matrix X is almost never nearly orthogonal to the dominant right singular vector v₁, whichever vector that is. So a
σ₁ far above everything the Krylov subspace of X has seen is improbable, and exactly how improbable can be computed.

Let Q = [Q₁ … Q_q] be the block Krylov basis of AᵀA from the block S = [V X] = Q₁R (V arbitrary), T = QᵀAᵀAQ with
eigenpairs (θᵢ, sᵢ), and B the last coupling block, AᵀAQ = QT + Q_{q+1}BE_qᵀ. Let t = σ₁² > θ₁, c = Qᵀv₁ and
w = Q_{q+1}ᵀv₁. Multiplying AᵀAv₁ = tv₁ by Qᵀ gives (t − T)c = E_qBᵀw, hence

    Xᵀv₁ = R_XᵀE₁ᵀc = M(t)w,    M(t) = Σᵢ (R_XᵀE₁ᵀsᵢ)(BE_qᵀsᵢ)ᵀ / (t − θᵢ),    so ‖Xᵀv₁‖ ≤ ‖M(t)‖₂.

Xᵀv₁ is a vector of s standard normal numbers whatever v₁ is, so ‖Xᵀv₁‖ ≥ δ except with the probability that a χ²
variable with s degrees of freedom falls below δ². Every t with ‖M(t)‖₂ < δ is thereby excluded. For one column this is
the bound of Hochstenbach, "Probabilistic upper bounds for the matrix two-norm", J. Sci. Comput. 57 (2013); with a block
it needs far fewer steps, because eight normal numbers are not all small at once.

The same argument carries a bound over a change A → A + E that does not depend on X: with u, v the dominant singular
vectors of E, ‖EX‖₂ ≥ ‖uᵀEX‖ = ‖E‖₂‖vᵀX‖ ≥ ‖E‖₂δ, so σ₁ has grown by ‖EX‖₂/δ at most. For a change without structure,
which is what optimizers make, that is about 1.2 ‖E‖_F.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

__all__ = ["normal_quantile", "spectral_norms", "upper_bound"]

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
    """Return an upper bound of σ₁² that fails with the probability that belongs to ``delta``.

    Args:
        theta: ``(batch, k)``, Ritz values θ ascending, the last one positive.
        start: ``(batch, s, k)``, the columns R_XᵀE₁ᵀsᵢ.
        coupling: ``(batch, b, k)``, the columns BE_qᵀsᵢ.
        delta: Quantile of the length of an s-dimensional normal vector.

    Returns:
        ``(batch,)``; infinite where the subspace excludes nothing.
    """
    excess = _first_excluded(theta, start, coupling, delta, _COARSE.expand(len(theta), -1))
    # The coarse points are a factor of 4 apart; the crossing lies in the last interval.
    excess = _first_excluded(theta, start, coupling, delta, excess.unsqueeze(1) * _FINE)
    return theta[:, -1] * (1 + excess)


def _first_excluded(theta: Tensor, start: Tensor, coupling: Tensor, delta: float, excess: Tensor) -> Tensor:
    """Return, per operator, the smallest excess from which on every given point is excluded, ``(batch,)``."""
    t = theta[:, -1:] * (1 + excess)  # (batch, points)
    weights = 1 / (t.unsqueeze(2) - theta.unsqueeze(1)).clamp_min(torch.finfo(t.dtype).tiny)  # (batch, points, k)
    weighted = start.unsqueeze(1) * weights.unsqueeze(2)  # (batch, points, s, k)
    M = (weighted.flatten(1, 2) @ coupling.mT).reshape(*weighted.shape[:3], -1)  # (batch, points, s, b)
    # Schatten-8 in place of the spectral norm: from above, within 8^(1/8), and two products instead of an SVD.
    scale = M.abs().amax((2, 3), keepdim=True).clamp_min(torch.finfo(t.dtype).tiny)
    gram = (M / scale) @ (M / scale).mT
    norm = torch.linalg.matrix_norm(gram @ gram).pow(0.25) * scale[..., 0, 0]
    allowed = (norm >= delta) | norm.isnan()
    last_allowed = (allowed * torch.arange(1, excess.shape[1] + 1, device=excess.device)).amax(
        1
    )  # 0 where all points are excluded
    padded = torch.cat([excess, torch.full_like(excess[:, :1], math.inf)], dim=1)
    return padded.gather(1, last_allowed.unsqueeze(1)).squeeze(1)


def spectral_norms(rows: Tensor) -> Tensor:
    """Return the spectral norms of matrices of a few rows, ``(batch, s, m) -> (batch,)`` on the CPU, by their Grams."""
    scale = rows.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows / scale
    gram = (rows @ rows.mT).cpu().double()
    largest: Tensor = torch.linalg.eigvalsh(gram)[:, -1]
    return largest.clamp_min(0).sqrt() * scale.flatten().cpu().double()

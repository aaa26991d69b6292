"""Finite-depth Lyapunov exponents: how fast a product of operators stretches its leading directions, per factor.

For P = A_L … A_1 the exponents are λ_k = (1/L) ln σ_k(P). The depth is finite because a network has a finite depth: a
signal or a gradient is stretched by the singular values of P, not by a limit. P is never formed, so nothing overflows.
Orthonormal blocks of vectors are multiplied, and the logarithms of their growth are added up:

    Q_0 ── A_1 ──> A_1 Q_0 = Q_1 R_1 ── A_2 ──> A_2 Q_1 = Q_2 R_2 ── … ──> Q_L
    P Q_0 = Q_L (R_L … R_1),   so   σ_k(P Q_0) = σ_k(R_L … R_1)

The triangles R are small (k × k), and their product is taken in the log domain. Q_0 decides which directions are seen:
for a random Q_0 the result is too small, and each sweep back and forth turns Q_0 toward the directions that P stretches
most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_spectral import _checks
from lightning_spectral.analysis.covariance import GradedProduct
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import LinearOperator

__all__ = ["LinearMap", "LyapunovSpectrum", "angle_exponent", "gradient_exponent", "lyapunov_spectrum"]

# Extra vectors. The last exponent converges with the gap between it and the first exponent that is left out.
_OVERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A linear map as two functions, for a map that is no :class:`LinearOperator`.

    Attributes:
        shape: ``(m, n)``.
        matmat: Multiplies a block of vectors, ``(n, k) -> (m, k)``.
        adjoint: Multiplies by the transpose, ``(m, k) -> (n, k)``.
        dtype: dtype of the blocks that the functions take.
        device: Device of these blocks.
    """

    shape: tuple[int, int]
    matmat: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class LyapunovSpectrum:
    """The leading finite-depth Lyapunov exponents of a product of L factors, in nats per factor.

    Attributes:
        exponents: ``(k,)``, float64, the largest first: (1/L) ln σ_k of the product.
        growth: ``(L, k)``, float64: the contribution of each factor to L times the exponents. Column k belongs to the
            direction that the whole product stretches by σ_k, not to a singular direction of the factor.
        sweeps: Number of sweeps back and forth through all factors.
        change: Largest change of an exponent in the last sweep, ``None`` without a sweep. The exponents grow from sweep
            to sweep and never exceed the true ones.
    """

    exponents: Tensor
    growth: Tensor
    sweeps: int
    change: float | None


def lyapunov_spectrum(
    factors: Sequence[LinearOperator | LinearMap],
    k: int,
    *,
    sweeps: int = 2,
    start: Tensor | None = None,
    seed: int = 0,
) -> LyapunovSpectrum:
    """Return the k leading finite-depth Lyapunov exponents of a product.

    A pass multiplies an orthonormal block by one factor after the other and keeps the R of a QR factorization of each
    result (Benettin et al., 1980; Engelken, Wolf and Abbott, arXiv:2006.02427). One pass alone is the classical method,
    which is right for infinitely many factors and badly biased for a few. A sweep goes back through the transposes and
    forth again, which is one step of subspace iteration on PᵀP. The singular values of R_L … R_1, in the log domain,
    are estimates from below.

    Args:
        factors: A_1, …, A_L in the order of application.
        k: Number of exponents.
        sweeps: Number of sweeps after the first pass; each costs 2 L products by a block. With 0 the result is the one
            of the classical method: the growth of each column of the start, which is neither sorted nor a bound.
        start: ``(n, p)`` with p ≥ k independent columns to start from. The first column keeps its direction. By default
            k + 4 random columns.
        seed: Seed of the random start.

    Returns:
        The exponents and the growth per factor. A direction in the null space of a factor has −inf, or, because of
        rounding, about ln ε.

    Raises:
        ConfigurationError: There is no factor, the shapes of two neighbours do not fit, ``k`` or ``start`` does not fit
            the shapes, or a product is not finite.
    """
    _checks.steps("k", k)
    _checks.steps("sweeps", sweeps, least=0)
    Q = _start(factors, k, start, seed, k if sweeps == 0 else k + _OVERSAMPLING)
    # The first pass turns a random block only partly toward the leading directions of P, hence the bias of the
    # classical method. Going back through the transposes with the result is one power step of PᵀP, whose eigenvectors
    # are these
    # directions: an error in direction k shrinks by (σ_{p+1} / σ_k)² per sweep, with p columns.
    Q, triangles = _passed(factors, Q)
    kept = [triangles]  # of the last two passes: their difference is `change`
    for _ in range(sweeps):
        Q, _ = _passed(factors, Q, back=True)
        Q, triangles = _passed(factors, Q)
        kept = [kept[-1], triangles]
    if sweeps:
        kept = [_aligned(triangles) for triangles in kept]
    growths = [triangles.diagonal(dim1=1, dim2=2)[:, :k].abs().log() for triangles in kept]
    exponents = [growth.mean(0) for growth in growths]
    change = None if sweeps == 0 else _largest_change(exponents[0], exponents[1])
    return LyapunovSpectrum(exponents[-1], growths[-1], sweeps, change)


def _start(
    factors: Sequence[LinearOperator | LinearMap], k: int, start: Tensor | None, seed: int, columns: int
) -> Tensor:
    """Return the orthonormal block to start from."""
    if not factors:
        raise ConfigurationError("factors is empty: expected at least one")
    for number, (first, second) in enumerate(pairwise(factors)):
        if first.shape[0] != second.shape[1]:
            raise ConfigurationError(
                f"factor {number + 1} of shape {tuple(second.shape)} cannot follow one of shape {tuple(first.shape)}"
            )
    n, rank = factors[0].shape[1], min(size for factor in factors for size in factor.shape)
    if k > rank:
        raise ConfigurationError(f"k={k}: expected at most {rank}, the smallest side of a factor")
    if start is None:
        shape = n, min(columns, rank)
        start = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    elif start.ndim != 2 or len(start) != n or not k <= start.shape[1] <= rank:
        raise ConfigurationError(f"start has shape {tuple(start.shape)}: expected ({n}, {k}) to ({n}, {rank})")
    Q: Tensor = torch.linalg.qr(start.detach().cpu().double())[0]
    return Q


def _passed(factors: Sequence[LinearOperator | LinearMap], Q: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
    """Multiply an orthonormal block by one factor after the other; return the last Q and all R, ``(L, p, p)``."""
    triangles: list[Tensor] = []
    for factor in reversed(factors) if back else factors:
        block = Q.to(factor.device, factor.dtype)
        product = factor.adjoint(block) if back else factor.matmat(block)
        Q, R = torch.linalg.qr(product.detach().cpu().double())
        triangles.append(R)
    stacked = torch.stack(triangles)
    finite = stacked.isfinite().all(-1).all(-1)
    if not finite.all():
        first = int(finite.int().argmin())
        name = f"the transpose of factor {len(factors) - 1 - first}" if back else f"factor {first}"
        raise ConfigurationError(f"a product by {name} is not finite")
    return Q, stacked


def _aligned(triangles: Tensor) -> Tensor:
    """Return the triangles ``(L, p, p)`` of a pass that starts at the right singular vectors of R_L … R_1.

    The logarithms of their diagonals add up to ln σ_k.
    """
    # Let P = R_L … R_1 = U Σ Vᵀ. A pass that starts at V ends with P V = U Σ, whose columns are orthogonal. So the
    # product of the new triangles is diagonal and equals Σ up to signs: the growth is split over the factors without
    # bias. V comes from the graded product of the transposes, Pᵀ = R_1ᵀ … R_Lᵀ = V Σ Uᵀ, which resolves singular values
    # far below ε of the largest.
    transposed = GradedProduct(triangles.shape[-1])
    for R in triangles.flip(0):
        transposed.multiply(R.mT)
    C, aligned = transposed.U, []  # V
    for R in triangles:
        C, T = torch.linalg.qr(R @ C)
        aligned.append(T)
    return torch.stack(aligned)


def _largest_change(before: Tensor, after: Tensor) -> float:
    # −inf minus −inf would be NaN. Two exponents of −inf have not changed.
    return float(torch.where(before == after, 0.0, (after - before).abs()).amax())


def angle_exponent(x_first: Tensor, y_first: Tensor, x_last: Tensor, y_last: Tensor, depth: int) -> float:
    """Return λ_a = (1/L) ln[(1 − cos_L) / (1 − cos_0)]: how fast the angle between two nearly equal inputs grows.

    This is the empirical analogue of the angle exponent of Cowsik et al. (arXiv:2403.02579), which they derive for
    Transformers at initialization. The cosine is taken between whole inputs, all tokens as one vector.

    Args:
        x_first: The first input, any shape.
        y_first: The second input, nearly but not exactly parallel to the first.
        x_last: The first input after L layers.
        y_last: The second input after L layers.
        depth: L.

    Returns:
        The exponent in nats per layer; −inf if the two have become parallel.

    Raises:
        ConfigurationError: The inputs are parallel, or one of the four is zero or not finite.
    """
    before, after = _distance(x_first, y_first), _distance(x_last, y_last)
    if not (0 < before < math.inf and 0 <= after < math.inf):
        raise ConfigurationError(
            f"1 − cos is {before:g} before and {after:g} after: expected two different, finite inputs"
        )
    return (math.log(after / before) if after else -math.inf) / _checks.steps("depth", depth)


def _distance(x: Tensor, y: Tensor) -> float:
    """Return 1 − cos as ½‖x/‖x‖ − y/‖y‖‖². The direct formula would lose all digits for nearly equal vectors."""
    x, y = (item.detach().double().flatten() for item in (x, y))
    difference = x / torch.linalg.vector_norm(x) - y / torch.linalg.vector_norm(y)
    return 0.5 * float(difference.square().sum())


def gradient_exponent(gradient_first: Tensor, gradient_last: Tensor, depth: int) -> float:
    """Return λ_g = (1/L) ln(‖∂ℒ/∂X_0‖² / ‖∂ℒ/∂X_L‖²): how fast gradients grow on their way back.

    This is the empirical analogue of the gradient exponent of Cowsik et al. (arXiv:2403.02579).

    Args:
        gradient_first: ∂ℒ/∂X_0, any shape.
        gradient_last: ∂ℒ/∂X_L.
        depth: L.

    Returns:
        The exponent in nats per layer; −inf if ∂ℒ/∂X_0 is zero.

    Raises:
        ConfigurationError: ∂ℒ/∂X_L is zero, or one of the two gradients is not finite.
    """
    first, last = (float(torch.linalg.vector_norm(item.detach().double())) for item in (gradient_first, gradient_last))
    if not (0 < last < math.inf and 0 <= first < math.inf):
        raise ConfigurationError(f"gradients of norm {first:g} and {last:g}: expected finite norms, the second above 0")
    return (2 * math.log(first / last) if first else -math.inf) / _checks.steps("depth", depth)

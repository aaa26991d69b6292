"""The Frobenius norm of an operator that is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.linalg.matrix import Matrix
from lightning_spectral.linalg.operators import Adjoint, Diagonal, LinearOperator, Product, Scaled

__all__ = ["frobenius_norm"]

# Columns multiplied at a time: the width at which a product moves the most bytes per second for each column.
_COLUMNS = 16


def frobenius_norm(
    operator: LinearOperator, *, generator: torch.Generator, n_probes: int = 64, subspace: Tensor | None = None
) -> Tensor:
    """Return ‖A‖_F.

    Exact for a :class:`Matrix`, a :class:`Diagonal`, a matrix between diagonals, and multiples and adjoints of these.
    For other products the estimator of Meyer, Musco, Musco and Woodruff, "Hutch++" (SOSA 2021), Algorithm 1: with a
    known orthonormal subspace V,

        ‖A‖_F² = ‖AV‖_F² + E‖A(I − VVᵀ)g‖²,

    where the second term is a mean over ``n_probes`` vectors g of random signs. It is unbiased, with a standard
    deviation of at most √(2/n_probes) · ‖BᵀB‖_F for B = A(I − VVᵀ). With ‖BᵀB‖_F ≤ ‖B‖₂‖B‖_F, the relative standard
    deviation of the norm is at most √(1/(2 · n_probes · r)), where r = ‖A‖_F²/‖B‖₂² is at least the stable rank of A:
    1 % for 64 probes and r = 78, and never above 9 %.

    Args:
        operator: ``(m, n)``.
        generator: Source of the signs, on any device.
        n_probes: Random vectors; each costs one product by A.
        subspace: ``(n, p)``, orthonormal columns, such as the right singular vectors in a solver's state.

    Returns:
        A scalar in float64, or float32 where the device has no float64. NaN or infinite if the weights are.
    """
    with torch.no_grad(), torch.autocast(operator.device.type, enabled=False):
        squared = _squared(operator, generator, n_probes, subspace)
        if _in_range(squared):
            return squared.sqrt()
        balanced = operator.balanced()
        if balanced is None:
            return squared.sqrt()
        return torch.ldexp(_squared(balanced[0], generator, n_probes, subspace).sqrt(), torch.tensor(balanced[1]))


def _in_range(squared: Tensor) -> bool:
    limits = torch.finfo(torch.float32)
    return bool((squared > limits.tiny**0.4) & (squared < limits.max**0.4))


def _squared(operator: LinearOperator, generator: torch.Generator, n_probes: int, subspace: Tensor | None) -> Tensor:
    c, factors = _flatten(operator)
    matrices = [factor for factor in factors if not isinstance(factor, Diagonal)]
    if len(matrices) <= 1 and all(_weight(factor) is not None for factor in matrices):
        return c * c * _exact(factors)
    return _estimated(operator, generator, n_probes, subspace)


def _flatten(operator: LinearOperator) -> tuple[float | Tensor, list[LinearOperator]]:
    """Return the constant and the factors of nested products and multiples."""
    if isinstance(operator, Scaled):
        c, factors = _flatten(operator.operator)
        return c * operator.c, factors
    if isinstance(operator, Product):
        c = 1.0
        factors = []
        for part in operator.operators:
            part_c, part_factors = _flatten(part)
            c, factors = c * part_c, factors + part_factors
        return c, factors
    if isinstance(operator, Adjoint) and not isinstance(operator.operator, Matrix):
        c, factors = _flatten(operator.operator)
        return c, [factor if isinstance(factor, Diagonal) else Adjoint(factor) for factor in reversed(factors)]
    return 1.0, [operator]


def _weight(operator: LinearOperator) -> Matrix | None:
    inner = operator.operator if isinstance(operator, Adjoint) else operator
    return inner if isinstance(inner, Matrix) else None


def _exact(factors: list[LinearOperator]) -> Tensor:
    """Return Σ lᵢ² wᵢⱼ² rⱼ² for diagonals l, at most one matrix w, and diagonals r."""
    middle = next((i for i, factor in enumerate(factors) if not isinstance(factor, Diagonal)), len(factors) - 1)
    gains = [factor.gain.detach() if isinstance(factor, Diagonal) else None for factor in factors]
    left, right = (_product_of(gains[:middle]), _product_of(gains[middle + 1 :]))
    matrix = _weight(factors[middle])
    if matrix is None:
        diagonal = _product_of(gains)
        assert diagonal is not None
        return diagonal.square().sum()
    if isinstance(factors[middle], Adjoint):
        left, right = right, left
    return matrix.sum_of_squares(left, right)


def _product_of(gains: list[Tensor | None]) -> Tensor | None:
    result: Tensor | None = None
    for gain in gains:
        if gain is not None:
            result = gain.to(_summing(gain)) if result is None else result * gain
    return result


def _summing(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _estimated(operator: LinearOperator, generator: torch.Generator, n_probes: int, V: Tensor | None) -> Tensor:
    """Hutch++ with the given subspace."""
    total = torch.zeros((), dtype=_summing(torch.empty(0, device=operator.device)), device=operator.device)
    if V is not None:
        V = V.to(operator.device, operator.dtype)
        total += operator.matmat(V).to(total.dtype).square().sum()
    for first in range(0, n_probes, _COLUMNS):
        k = min(_COLUMNS, n_probes - first)
        signs = torch.randint(0, 2, (operator.shape[1], k), generator=generator, device=generator.device)
        G = (2 * signs - 1).to(operator.device, operator.dtype)
        if V is not None:
            G = G - V @ (V.mT @ G)
        total += operator.matmat(G).to(total.dtype).square().sum() / n_probes
    return total

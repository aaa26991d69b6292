"""The slow, obvious solver: form every operator in float64 and factorize it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.linalg.norms.solution import (
    OUT_OF_RANGE,
    Memory,
    SolverState,
    SpectralNorm,
    random_rows,
)
from lightning_spectral.linalg.operators import LinearOperator
from lightning_spectral.linalg.sharding.sharded import balanced
from lightning_spectral.records.measurements import NOT_FINITE

__all__ = ["ExactSVD", "largest_singular"]

# Probes whose images are kept, where they are asked for.
_PROBES = 16


@dataclass(frozen=True, slots=True)
class ExactSVD:
    """Dense singular value decomposition in float64 on the CPU. For references and small models.

    Forms the (m, n) product of every operator, one at a time. The bound is the rounding error of the factorization.

    Attributes:
        n_components: Right singular vectors kept in the state.

    Example:
        >>> measure(model, solver=ExactSVD()).layers[0].error_bound < 1e-9  # rounding
        True
    """

    n_components: int = 8

    def init(self, operators: Sequence[LinearOperator]) -> SolverState:
        """Return an empty state. The solver reads nothing from a state; it only writes singular vectors into it."""
        return SolverState(seed=0, memories=(None,) * len(operators))

    def compute(
        self, operators: Sequence[LinearOperator], state: SolverState
    ) -> tuple[tuple[SpectralNorm, ...], SolverState]:
        """Return the spectral norm of every operator, and a state with its right singular vectors."""
        norms: list[SpectralNorm] = []
        memories: list[Memory | None] = []
        for operator in operators:
            with torch.no_grad(), torch.autocast(operator.device.type, enabled=False):
                probes = random_rows(state.seed, _PROBES, operator.shape[1]) if state.keeps_images else None
                norm, memory = largest_singular(operator, self.n_components, probes)
            norms.append(norm)
            memories.append(memory)
        return tuple(norms), SolverState(state.seed, tuple(memories))


def largest_singular(
    operator: LinearOperator, count: int, probes: Tensor | None = None
) -> tuple[SpectralNorm, Memory | None]:
    """Solve one operator densely.

    Args:
        operator: The operator, ``(m, n)``.
        count: Right singular vectors wanted.
        probes: ``(k, n)``, vectors whose images the memory shall keep.

    Returns:
        The norm, and the memory with a subspace ``(n, min(m, n, count))``.
    """
    scaled = balanced(operator)
    if scaled is None:
        return SpectralNorm(None, None, NOT_FINITE), None
    A, exponent = scaled[0].dense(), scaled[1]
    _, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    subspace = Vh[:count].mT.to(operator.device, operator.dtype)
    latest = None if probes is None else (probes.double() @ A.mT).to(subspace)
    memory = Memory(subspace, subspace.new_zeros(0, operator.shape[0]), float(sigma[0]), exponent, latest)
    try:
        value = math.ldexp(float(sigma[0]), exponent)
    except OverflowError:
        return SpectralNorm(None, None, OUT_OF_RANGE), None
    # No other error: all products were taken in float64, and narrower weights convert to it without error.
    bound = torch.finfo(torch.float64).eps * max(operator.shape) if value else 0.0
    return SpectralNorm(value, bound), memory

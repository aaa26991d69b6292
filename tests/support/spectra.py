"""Matrices with spectra made to measure, the operators that every operator test runs over, and what a norm claims."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_spectral.linalg import (
    Adjoint,
    Diagonal,
    ExactSVD,
    Gather,
    LinearOperator,
    Matrix,
    Product,
    RandomizedSVD,
    Scaled,
    SpectralNorm,
    Sum,
)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix with orthonormal columns, ``(rows, columns)`` in float64."""
    Q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    return Q


def with_spectrum(sigma: Tensor, m: int, n: int, generator: torch.Generator) -> Tensor:
    """Return a float64 matrix ``(m, n)`` with the given singular values."""
    k = len(sigma)
    return (orthonormal(m, k, generator) * sigma.double()) @ orthonormal(n, k, generator).mT


def _ramp(k: int) -> Tensor:
    return torch.arange(k, dtype=torch.float64) / k


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "flat": torch.ones,
    "linear": lambda k: 1 - _ramp(k),
    "soft edge": lambda k: (1 - _ramp(k)).sqrt(),
    "clustered": lambda k: torch.cat([1 - 1e-4 * torch.arange(5), torch.full((k - 5,), 0.9)]),
    "spiked": lambda k: torch.cat([torch.tensor([10.0, 9.9, 5.0]), 1 - _ramp(k - 3)]),
    "outlier": lambda k: torch.cat([torch.ones(1), 0.97 - 0.9 * _ramp(k - 1)]),
    "power law": lambda k: torch.arange(1, k + 1, dtype=torch.float64) ** -0.5,
    "rank one": lambda _: torch.ones(1),
    "rank five": lambda _: torch.tensor([3.0, 2.0, 2.0, 1.0, 0.1]),
}

SHAPES = [(1, 300), (300, 1), (7, 5), (40, 60), (96, 96), (400, 100), (100, 400), (200, 200)]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _fused() -> Tensor:
    return _random(4, 3, 6, 20)[:, 2]  # values of four heads in fused rows, (4, 6, 20)


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "matrix": lambda: Matrix(_random(12, 20)),
    "transposed view": lambda: Matrix(_random(20, 12).mT),
    "every third row": lambda: Matrix(_random(36, 20)[::3]),
    "every other column": lambda: Matrix(_random(12, 40)[:, ::2]),
    "column slice": lambda: Matrix(_random(12, 50)[:, 7:27]),
    "interleaved groups": lambda: Matrix(_fused()),
    "interleaved groups in float16": lambda: Matrix(_fused().half()),
    "groups of columns": lambda: Adjoint(Matrix(_fused())),
    "float16": lambda: Matrix(_random(12, 20).half()),
    "bfloat16 transposed": lambda: Matrix(_random(20, 12).bfloat16().mT),
    "bfloat16 in several pieces": lambda: Matrix(_random(700, 900).bfloat16()),
    "float64": lambda: Matrix(_random(12, 20).double()),
    "one row": lambda: Matrix(_random(1, 20)),
    "one column": lambda: Matrix(_random(12, 1)),
    "diagonal": lambda: Diagonal(_random(20)),
    "diagonal in bfloat16": lambda: Diagonal(_random(20).bfloat16()),
    "gather": lambda: Gather(torch.tensor([0, 0, 3, 1, 1, 1]), 5),
    "scaled": lambda: Scaled(Matrix(_random(12, 20)), -0.5),
    "scaled by a tensor": lambda: Scaled(Matrix(_random(12, 20)), torch.tensor([3.0])),
    "adjoint": lambda: Adjoint(Matrix(_random(12, 20))),
    "product": lambda: Product(Matrix(_random(12, 20)), Matrix(_random(20, 9)), Diagonal(_random(9))),
    "nested product": lambda: Adjoint(
        Product(Scaled(Product(Diagonal(_random(12)), Matrix(_random(12, 20))), 2.0), Matrix(_random(20, 9)))
    ),
    "grouped-query attention": lambda: Product(
        Matrix(_random(24, 24)), Gather(torch.arange(12).repeat_interleave(2), 12), Matrix(_random(12, 24))
    ),
    "low-rank update": lambda: Sum(Matrix(_random(12, 20)), Product(Matrix(_random(12, 3)), Matrix(_random(3, 20)))),
    "wide update of a bfloat16 weight": lambda: Sum(
        Matrix(_random(12, 20).bfloat16()), Scaled(Product(Matrix(_random(2, 12).mT), Matrix(_random(2, 20))), 0.5)
    ),
    "transposed sum": lambda: Adjoint(Sum(Matrix(_random(20, 12)), Adjoint(Matrix(_random(12, 20))))),
}


def solve(*operators: LinearOperator, solver: RandomizedSVD | ExactSVD | None = None) -> tuple[SpectralNorm, ...]:
    solver = solver or RandomizedSVD()
    return solver.compute(operators, solver.init(operators))[0]


def assert_holds(norm: SpectralNorm, exact: float, tolerance: float = 1e-2, rounding: float = 1e-5) -> None:
    """Assert the claims of a norm: from below, within the tolerance, within its own bound."""
    assert norm.reason is None
    assert norm.value <= exact * (1 + rounding)
    assert exact - norm.value <= tolerance * exact
    assert exact <= norm.value * (1 + norm.error_bound)

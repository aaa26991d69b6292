"""A weight and its low-rank update have the norm of the merged weight, cold and warm, whatever their sizes."""

from __future__ import annotations

import pytest
import torch
from spectra import assert_holds, solve
from torch import Tensor

from lightning_spectral.linalg import ExactSVD, Matrix, Product, RandomizedSVD, Scaled, SpectralNorm, Sum


def parts(m: int, n: int, generator: torch.Generator, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape, generator=generator) for shape in ((m, n), (m, rank), (rank, n)))


def updated(W: Tensor, B: Tensor, A: Tensor, scale: float = 0.5) -> Sum:
    return Sum(Matrix(W), Scaled(Product(Matrix(B), Matrix(A)), scale))


def largest(W: Tensor, B: Tensor, A: Tensor, scale: float = 0.5) -> float:
    return float(torch.linalg.matrix_norm(W.double() + scale * B.double() @ A.double(), ord=2))


@pytest.mark.parametrize("shape", [(20, 30), (150, 220), (300, 100)])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 30.0])
def test_the_norm_is_that_of_the_merged_weight(shape, size, generator):
    W, B, A = parts(*shape, generator)
    assert_holds(solve(updated(W, size * B, A))[0], largest(W, size * B, A))
    W, B, A = W.double(), B.double(), A.double()
    (norm,) = solve(updated(W, size * B, A), solver=ExactSVD())
    assert norm.value == pytest.approx(largest(W, size * B, A), rel=1e-10)


def test_sums_are_batched_with_plain_products(generator):
    weights = [parts(120, 120, generator) for _ in range(4)]
    operators = [updated(*item) if i % 2 else Product(Matrix(item[0])) for i, item in enumerate(weights)]
    for i, (together, item) in enumerate(zip(solve(*operators), weights, strict=True)):
        assert_holds(together, largest(*item) if i % 2 else float(torch.linalg.matrix_norm(item[0].double(), ord=2)))
        assert together.value == pytest.approx(solve(operators[i])[0].value, rel=1e-6)


def test_a_growing_update_is_followed_warm(generator):
    W, B, A = parts(200, 160, generator)
    B.zero_()
    operator, solver = updated(W, B, A), RandomizedSVD()
    (norm,), state = solver.compute([operator], solver.init([operator]))
    cold = norm.iterations
    for _ in range(20):
        B += 2e-3 * torch.randn(B.shape, generator=generator)
        (norm,), state = solver.compute([operator], state)
        assert_holds(norm, largest(W, B, A), tolerance=1e-3)
        assert norm.iterations < cold


@pytest.mark.parametrize(("base", "update"), [(1e-30, 0.0), (0.0, 1e-30), (1e30, 1e-30), (1e-36, 1e-36), (1e30, 1e30)])
@pytest.mark.parametrize("n", [20, 100])
def test_terms_of_very_different_sizes(base, update, n, generator):
    W, B, A = parts(n, n, generator)
    W, B = base * W, update * B
    assert_holds(solve(updated(W, B, A))[0], largest(W, B, A))


@pytest.mark.parametrize("n", [20, 100])
def test_nothing_and_what_is_not_finite(n, generator):
    W, B, A = parts(n, n, generator)
    zero = Sum(Product(Matrix(0 * B), Matrix(A)), Product(Matrix(0 * B), Matrix(A)))
    assert solve(zero)[0] == SpectralNorm(0.0, 0.0, None, 0)
    A[1, 2] = torch.nan
    assert solve(updated(W, B, A))[0].reason == "weights are not finite (NaN or Inf)"

"""Every value is within 1 % of the exact float64 value, and within its own bound, on spectra made to measure."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import SHAPES, SPECTRA, assert_holds, orthonormal, solve, with_spectrum

from lightning_spectral.linalg import (
    Diagonal,
    ExactSVD,
    Matrix,
    Product,
    RandomizedSVD,
    Scaled,
    SpectralNorm,
)

SOLVERS = {"randomized": RandomizedSVD(), "exact": ExactSVD()}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=list(SPECTRA))
def test_spectra(spectrum, solver, generator):
    for m, n in SHAPES:
        sigma = spectrum(max(min(m, n), 6))[: min(m, n)]
        A = with_spectrum(sigma, m, n, generator)
        exact = float(torch.linalg.matrix_norm(A.float().double(), ord=2))
        (norm,) = solve(Matrix(A.float()), solver=solver)
        assert_holds(norm, exact)


@pytest.mark.parametrize("d", [64, 256, 512])
def test_products_of_random_weights(d, generator):
    """Random weights have no gap: the hard case, and the one at the start of every training."""
    operators, exact = [], []
    for _ in range(4):
        down, up = torch.randn(d, 4 * d, generator=generator), torch.randn(4 * d, d, generator=generator)
        gain = torch.rand(d, generator=generator) + 0.5
        operators.append(Product(Matrix(down), Matrix(up), Diagonal(gain)))
        exact.append(float(torch.linalg.matrix_norm(down.double() @ up.double() * gain.double(), ord=2)))
    for norm, value in zip(solve(*operators), exact, strict=True):
        assert_holds(norm, value)
        assert norm.error_bound <= 0.041


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 30), (150, 220)])
def test_dtypes(dtype, shape, generator):
    A = with_spectrum(SPECTRA["linear"](20), *shape, generator).to(dtype)
    (norm,) = solve(Matrix(A))
    assert_holds(norm, float(torch.linalg.matrix_norm(A.double(), ord=2)))


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e35])
@pytest.mark.parametrize("n", [20, 100])
def test_range_of_values(size, n, generator):
    """Squares of 1e20 do not fit into float32; the value does."""
    A = (with_spectrum(SPECTRA["linear"](n), n, n, generator) * size).float()
    (norm,) = solve(Matrix(A))
    assert_holds(norm, float(torch.linalg.matrix_norm(A.double(), ord=2)))


@pytest.mark.parametrize(("left", "right"), [(1e20, 1e20), (1e-20, 1e-20), (1e30, 1e-30), (1e-35, 1e37), (1e35, 1e35)])
@pytest.mark.parametrize("n", [20, 100])
def test_range_of_products(left, right, n, generator):
    A = (torch.randn(n, n, generator=generator).double() * left).float()
    B = (torch.randn(n, n, generator=generator).double() * right).float()
    exact = float(torch.linalg.matrix_norm((A.double() / left) @ (B.double() / right), ord=2)) * left * right
    ordinary = Product(Matrix(A / left), Matrix(B / right))
    (norm, beside) = solve(Product(Matrix(A), Matrix(B)), ordinary)
    assert_holds(norm, exact)
    assert beside.value is not None


def test_float64_range():
    A = torch.eye(100, dtype=torch.float64)
    tiny, huge, beyond = solve(Matrix(A * 1e-250), Matrix(A * 1e250), Product(Matrix(A * 1e250), Matrix(A * 1e250)))
    assert tiny.value == pytest.approx(1e-250, rel=1e-6)
    assert huge.value == pytest.approx(1e250, rel=1e-6)
    assert beyond == SpectralNorm(None, None, "the spectral norm is outside the range of a float")


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (30, 30), (200, 100)])
def test_zero_is_exactly_zero(solver, shape):
    (norm,) = solve(Matrix(torch.zeros(shape)), solver=solver)
    assert (norm.value, norm.error_bound, norm.reason) == (0.0, 0.0, None)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
@pytest.mark.parametrize("n", [10, 100])
def test_what_is_not_finite_does_not_poison_the_batch(solver, n, generator):
    good = [Matrix(torch.randn(n, n, generator=generator)) for _ in range(3)]
    bad = []
    for poison in (math.nan, math.inf, -math.inf):
        weight = torch.randn(n, n, generator=generator)
        weight[2, 3] = poison
        bad.append(Matrix(weight))
    zero = Matrix(torch.zeros(n, n))
    norms = solve(bad[0], good[0], bad[1], good[1], zero, bad[2], good[2], solver=solver)
    for i in (0, 2, 5):
        assert norms[i] == SpectralNorm(None, None, "weights are not finite (NaN or Inf)")
    alone = solve(*good, solver=solver)
    for i, norm in zip((1, 3, 6), alone, strict=True):
        assert norms[i].value == pytest.approx(norm.value, rel=1e-6)
    assert norms[4].value == 0.0


def test_batch_equals_loop(generator):
    spectra = [SPECTRA[name](120) for name in ("linear", "spiked", "power law", "clustered", "flat")]
    operators = [Matrix(with_spectrum(sigma, 130, 120, generator).float()) for sigma in spectra]
    for together, operator in zip(solve(*operators), operators, strict=True):
        (alone,) = solve(operator)
        assert together.iterations == alone.iterations
        assert together.value == pytest.approx(alone.value, rel=1e-6)
        assert together.error_bound == pytest.approx(alone.error_bound, rel=1e-2, abs=1e-6)


def test_more_operators_than_a_batch_keep_their_order(generator):
    scales = [1.0 + i for i in range(40)]
    A = with_spectrum(SPECTRA["spiked"](80), 80, 80, generator).float()
    operators = [Scaled(Matrix(A if i % 2 else A[:, :70]), scale) for i, scale in enumerate(scales)]
    exact = [float(torch.linalg.matrix_norm(operator.dense(), ord=2)) for operator in operators]
    for norm, value in zip(solve(*operators), exact, strict=True):
        assert_holds(norm, value)


def test_easy_operators_stop_early(generator):
    flat = Matrix(torch.randn(300, 300, generator=generator))
    spiked = Matrix(with_spectrum(SPECTRA["spiked"](300), 300, 300, generator).float())
    hard, easy = solve(flat, spiked)
    assert easy.iterations < hard.iterations


def test_more_iterations_never_lower_the_value(generator):
    operator = Matrix(torch.randn(300, 300, generator=generator))
    values = [solve(operator, solver=RandomizedSVD(max_iter=k, max_bound=1e-3))[0].value for k in range(1, 9)]
    assert all(later >= earlier * (1 - 1e-6) for earlier, later in pairwise(values))


def test_bounds_hold_for_nearly_every_seed(generator):
    """The failure probability of the bound is at most the promised one: 5 % here, to see failures at all."""
    A = with_spectrum(SPECTRA["outlier"](100), 100, 100, generator).float()
    exact = float(torch.linalg.matrix_norm(A.double(), ord=2))
    failures = 0
    for seed in range(200):
        solver = RandomizedSVD(1, 1, seed=seed, max_iter=4, failure_probability=0.05)
        (norm,) = solve(Matrix(A), solver=solver)
        failures += norm.value * (1 + norm.error_bound) < exact
    assert failures <= 20  # 200 · 5 % = 10, and three standard deviations


seeds = st.integers(0, 2**31 - 1)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, c=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]))
def test_scaling(seed, c, sign):
    A = torch.randn(70, 90, generator=torch.Generator().manual_seed(seed))
    norm, scaled = solve(Matrix(A), Scaled(Matrix(A), sign * c))
    assert scaled.value == pytest.approx(c * norm.value, rel=1e-4)


@settings(deadline=None, max_examples=15)
@given(seed=seeds, name=st.sampled_from(sorted(SPECTRA)))
def test_orthogonal_invariance(seed, name):
    generator = torch.Generator().manual_seed(seed)
    A = with_spectrum(SPECTRA[name](80), 90, 80, generator)
    rotated = orthonormal(90, 90, generator) @ A @ orthonormal(80, 80, generator)
    largest = float(SPECTRA[name](80).max())
    stored = [A.float(), rotated.float()]  # rounded, so the largest singular value is the one of the spectrum no more
    for matrix, norm in zip(stored, solve(*map(Matrix, stored)), strict=True):
        exact = float(torch.linalg.matrix_norm(matrix.double(), ord=2))
        assert exact == pytest.approx(largest, rel=1e-6)
        assert_holds(norm, exact)


def test_autocast_changes_nothing(generator):
    operators = [
        Product(Matrix(torch.randn(90, 200, generator=generator)), Matrix(torch.randn(200, 80, generator=generator)))
    ]
    plain = solve(*operators)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert solve(*operators) == plain


def test_global_random_state_is_untouched(generator):
    operator = Matrix(torch.randn(90, 90, generator=generator))
    before = torch.get_rng_state()
    solve(operator)
    assert torch.equal(before, torch.get_rng_state())


def test_no_gradient_is_recorded(generator):
    weight = torch.nn.Parameter(torch.randn(90, 90, generator=generator))
    solver = RandomizedSVD()
    _, state = solver.compute([Matrix(weight)], solver.init([Matrix(weight)]))
    assert not state.subspaces[0].requires_grad
    assert not state.subspaces[0].is_inference()

"""The Frobenius norm: exact where one weight is involved, estimated for products."""

from __future__ import annotations

import pytest
import torch
from spectra import OPERATORS, SPECTRA, with_spectrum

from lightning_spectral.linalg import Adjoint, Diagonal, Matrix, Product, RandomizedSVD, Scaled, frobenius_norm

SUMS = {"low-rank update", "wide update of a bfloat16 weight", "transposed sum"}
ESTIMATED = {"nested product", "product", "grouped-query attention", "gather"} | SUMS


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - ESTIMATED))
def test_one_weight_is_exact(name, generator):
    operator = OPERATORS[name]()
    actual = frobenius_norm(operator, generator=generator, n_probes=1)
    assert float(actual) == pytest.approx(float(operator.dense().norm()), rel=1e-5)


def test_a_matrix_between_diagonals_is_exact(generator):
    left, weight, right = (torch.randn(*shape, generator=generator) for shape in ((30,), (30, 40), (40,)))
    sandwich = Product(Scaled(Diagonal(left), 3.0), Diagonal(left), Matrix(weight), Diagonal(right))
    for operator in (
        sandwich,
        Adjoint(sandwich),
        Product(Diagonal(right), Adjoint(Matrix(weight))),
        Product(Diagonal(left)),
    ):
        actual = frobenius_norm(operator, generator=generator, n_probes=1)
        assert float(actual) == pytest.approx(float(operator.dense().norm()), rel=1e-5)


@pytest.mark.parametrize("deflate", [False, True])
def test_estimates_are_as_good_as_promised(deflate, generator):
    """With a spike, deflation is what makes the estimate good."""
    A = with_spectrum(SPECTRA["spiked"](200), 200, 200, generator).float()
    B = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    operator = Product(Matrix(A), Matrix(B))
    solver = RandomizedSVD()
    subspace = solver.compute([operator], solver.init([operator]))[1].subspaces[0] if deflate else None
    exact = float(operator.dense().norm())
    errors = [float(frobenius_norm(operator, generator=generator, subspace=subspace)) / exact - 1 for _ in range(30)]
    spread = torch.tensor(errors).square().mean().sqrt()
    rest = float(operator.dense().norm() ** 2 - 10**2 - 9.9**2 - 5**2) if deflate else exact**2
    top = 1.0 if deflate else 10.0
    promised = (2 / 64) ** 0.5 * top * rest**0.5 / (2 * exact**2)
    assert spread <= 1.5 * promised
    assert abs(torch.tensor(errors).mean()) <= promised


@pytest.mark.parametrize("name", sorted(SUMS))
def test_a_sum_is_exact_with_as_many_probes_as_columns(name, generator):
    operator = OPERATORS[name]()
    actual = frobenius_norm(operator, generator=generator, n_probes=20)
    assert float(actual) == pytest.approx(float(operator.dense().norm()), rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e25])
def test_range(size, generator):
    A, B = (torch.randn(50, 50, generator=generator) for _ in range(2))
    single = frobenius_norm(Matrix(A * size), generator=generator)
    assert float(single) / size == pytest.approx(float(A.norm()), rel=1e-5)
    seed = 7
    plain = frobenius_norm(Product(Matrix(A), Matrix(B)), generator=generator.manual_seed(seed))
    scaled = frobenius_norm(Product(Matrix(A * size), Matrix(B * size)), generator=generator.manual_seed(seed))
    assert float(scaled) / size / size == pytest.approx(float(plain), rel=1e-4)


def test_zero_and_not_finite(generator):
    assert frobenius_norm(Matrix(torch.zeros(3, 3)), generator=generator) == 0
    assert frobenius_norm(Matrix(torch.full((3, 3), float("nan"))), generator=generator).isnan()
    assert frobenius_norm(Product(Matrix(torch.zeros(3, 3)), Matrix(torch.ones(3, 3))), generator=generator) == 0


def test_global_random_state_is_untouched(generator):
    operator = OPERATORS["product"]()
    before = torch.get_rng_state()
    frobenius_norm(operator, generator=generator)
    assert torch.equal(before, torch.get_rng_state())

"""Rows become orthonormal to 1e-6, also those that Cholesky factorizations break on, and so does every Krylov basis."""

from __future__ import annotations

import pytest
import torch
from spectra import SPECTRA, with_spectrum
from torch import Tensor

from lightning_spectral.linalg import LinearOperator, Matrix, RandomizedSVD, Scaled, Stacked
from lightning_spectral.linalg.norms.krylov import BlockKrylov
from lightning_spectral.linalg.norms.orthonormal import factored, orthonormalized

ROWS, N = 14, 120


def miss(rows: Tensor) -> float:
    """Return how far rows are from orthonormal ones."""
    wide = rows.double()
    return float((wide @ wide.mT - torch.eye(wide.shape[-2], dtype=wide.dtype)).abs().max())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6])
def test_two_passes_make_rows_orthonormal(condition, scale, generator):
    sigma = torch.logspace(0, -float(torch.tensor(condition).log10()), ROWS, dtype=torch.float64)
    rows = torch.stack([with_spectrum(sigma, ROWS, N, generator) for _ in range(3)]).float() * scale
    Q, L = orthonormalized(rows)
    assert miss(Q) < 1e-6
    assert torch.equal(L, L.tril())
    torch.testing.assert_close(L @ Q, rows, rtol=1e-4, atol=1e-6 * scale)


def test_one_pass_is_the_householder_factorization_up_to_signs(generator):
    rows = torch.randn(2, ROWS, N, generator=generator, dtype=torch.float64)
    Q, L = factored(rows)
    expected, R = torch.linalg.qr(rows.mT)
    signs = R.diagonal(dim1=1, dim2=2).sign().unsqueeze(2)
    torch.testing.assert_close(Q, expected.mT * signs)
    torch.testing.assert_close(L.mT, R * signs)


def test_what_is_not_finite_stays_in_its_own_rows(generator):
    rows = torch.randn(3, ROWS, N, generator=generator)
    alone = orthonormalized(rows[2:])
    rows[0, 3, 5], rows[1, 2, 2] = float("nan"), float("inf")
    Q, L = orthonormalized(rows)
    assert not Q[:2].isfinite().all(2).all(1).any()
    assert torch.equal(Q[2], alone[0][0])
    assert torch.equal(L[2], alone[1][0])


def few_columns(generator: torch.Generator) -> Tensor:
    weight = torch.zeros(N, N)
    weight[:, :3] = torch.randn(N, 3, generator=generator)
    return weight


def repeated_columns(generator: torch.Generator) -> Tensor:
    return torch.randn(N, 5, generator=generator).repeat_interleave(N // 5, dim=1)


def zero_rows(generator: torch.Generator) -> Tensor:
    weight = torch.randn(N, N, generator=generator)
    weight[4:] = 0.0
    return weight


def one_entry(generator: torch.Generator) -> Tensor:
    weight = torch.zeros(N, N)
    weight[3, 7] = 2.0
    return weight


def ill_conditioned(generator: torch.Generator) -> Tensor:
    return with_spectrum(torch.logspace(0, -8, N, dtype=torch.float64), N, N, generator).float()


BREAKERS = {
    "identity": lambda generator: torch.eye(N),
    "few columns": few_columns,
    "repeated columns": repeated_columns,
    "zero rows": zero_rows,
    "one entry": one_entry,
    "ill-conditioned": ill_conditioned,
} | {name: lambda generator, s=s: with_spectrum(s(N), N, N, generator).float() for name, s in SPECTRA.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(BREAKERS))
def test_the_basis_is_orthonormal_and_t_is_its_projection(name, dtype, generator):
    weight = BREAKERS[name](generator).to(dtype)
    scales = (1.0, 1e-12, 1e12)  # beyond, operators are balanced before they are multiplied twice
    operators: list[LinearOperator] = [Scaled(Matrix(weight), scale) for scale in scales]
    batch = Stacked(operators)
    start = torch.randn(3, ROWS, N, generator=generator, dtype=dtype)
    block = orthonormalized(start)[0]
    noise = torch.randn(ROWS, N, generator=generator, dtype=dtype)
    krylov = BlockKrylov(batch, block, batch.normal(block), noise)
    while krylov.steps < krylov.capacity:
        krylov.expand()
    assert miss(krylov.basis) < (1e-6 if dtype == torch.float32 else 1e-12)
    Q = krylov.basis.double()
    k = Q.shape[1]
    T = krylov.projected()[:, :k].double().tril()
    for i, scale in enumerate(scales):
        image = Q[i] @ weight.double().mT
        size = float(torch.linalg.matrix_norm(weight.double(), ord=2)) ** 2
        expected = (image @ image.mT).tril()
        assert float((T[i] / scale**2 - expected).abs().max()) < 1e-6 * size


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("name", sorted(BREAKERS))
def test_norms_and_subspaces_of_breakers(name, size, generator):
    operator = Matrix(BREAKERS[name](generator) * size)
    solver = RandomizedSVD()
    exact = float(torch.linalg.matrix_norm(operator.dense(), ord=2))
    state = solver.init([operator])
    for _ in range(3):  # cold, and warm from what the start before it kept
        (norm,), state = solver.compute([operator], state)
        assert norm.value <= exact * (1 + 1e-5)
        assert exact <= norm.value * (1 + norm.error_bound)
        assert exact - norm.value <= 1e-2 * exact
        assert miss(state.subspaces[0].mT) < 1e-6

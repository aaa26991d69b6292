"""Products of matrices whose singular values lie far apart, and the synthetic experiment of 'The 1:1 Rule'."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal, localcontext
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_spectral.analysis.covariance import GradedProduct, effective_ranks, product_spectrum
from lightning_spectral.errors import ConfigurationError


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def haar(n: int, generator: torch.Generator) -> Tensor:
    Q, R = torch.linalg.qr(normal(n, n, generator=generator))
    return Q * R.diagonal().sign()


def product(matrices: Iterable[Tensor]) -> Tensor:
    P = None
    for A in matrices:
        P = A if P is None else A @ P
    assert P is not None
    return P


def decimal_log_singular_values(matrices: list[Tensor]) -> Tensor:
    """One-sided Jacobi rotations on the exact product, in 120 digits."""
    with localcontext() as context:
        context.prec = 120
        P: list[list[Decimal]] | None = None
        for matrix in matrices:
            A = [[Decimal(x) for x in row] for row in matrix.tolist()]
            P = A if P is None else [[dot(row, column) for column in zip(*P, strict=True)] for row in A]
        assert P is not None
        columns = [list(column) for column in zip(*P, strict=True)]
        while rotated(columns) > Decimal("1e-60"):
            pass
        return torch.tensor(sorted((float(dot(x, x).ln() / 2) for x in columns), reverse=True), dtype=torch.float64)


def dot(x: Iterable[Decimal], y: Iterable[Decimal]) -> Decimal:
    return sum((a * b for a, b in zip(x, y, strict=True)), Decimal(0))


def rotated(columns: list[list[Decimal]]) -> Decimal:
    """Make every pair of columns orthogonal once; return the largest squared cosine that was found."""
    worst = Decimal(0)
    for i in range(len(columns)):
        for j in range(i):
            a, b, c = dot(columns[i], columns[i]), dot(columns[j], columns[j]), dot(columns[i], columns[j])
            if c:
                worst = max(worst, c * c / (a * b))
                z = (b - a) / (2 * c)
                t = (1 if z >= 0 else -1) / (abs(z) + (1 + z * z).sqrt())
                cosine = 1 / (1 + t * t).sqrt()
                x, y = columns[i], columns[j]
                columns[i] = [cosine * (p - t * q) for p, q in zip(x, y, strict=True)]
                columns[j] = [cosine * (t * p + q) for p, q in zip(x, y, strict=True)]
    return worst


@pytest.mark.parametrize(("n", "layers", "identity"), [(4, 40, 0.0), (7, 25, 0.0), (6, 30, 1.0), (12, 16, 1.0)])
def test_agrees_with_arithmetic_of_120_digits(n: int, layers: int, identity: float, generator: torch.Generator):
    matrices = [identity * torch.eye(n, dtype=torch.float64) + normal(n, n, generator=generator) for _ in range(layers)]
    spectrum = product_spectrum(matrices)
    for depth in (1, layers // 2, layers):
        exact = decimal_log_singular_values(matrices[:depth])
        torch.testing.assert_close(spectrum.log_singular_values[depth - 1], exact, rtol=0, atol=1e-10)
    assert spectrum.log_condition[-1] > 12 * math.log(10)
    assert not spectrum.at_floor.any()


@pytest.mark.parametrize("decades", [1, 12, 30, 60])
def test_a_known_spectrum_is_found_whatever_the_condition(decades: int, generator: torch.Generator):
    d, layers = 48, 12
    Q = [haar(d, generator) for _ in range(layers + 1)]
    s = torch.logspace(0, -decades / layers, d, dtype=torch.float64)
    spectrum = product_spectrum([after * s @ before.mT for before, after in pairwise(Q)])
    exact = torch.arange(1, layers + 1)[:, None] * s.log()
    torch.testing.assert_close(spectrum.log_singular_values, exact, rtol=0, atol=1e-9)
    assert float(spectrum.log_condition[-1]) == pytest.approx(2 * decades * math.log(10), abs=1e-8)
    assert not spectrum.at_floor.any()


def test_clusters_with_gaps_of_ten_decades_keep_their_digits(generator: torch.Generator):
    d, layers = 30, 9
    Q = [haar(d, generator) for _ in range(layers + 1)]
    s = torch.cat([torch.linspace(1.0, 0.9, 10) * 10.0**-power for power in (0, 3, 5)]).double()
    spectrum = product_spectrum([after * s @ before.mT for before, after in pairwise(Q)])
    torch.testing.assert_close(spectrum.log_singular_values[-1], layers * s.log(), rtol=0, atol=1e-9)


def test_agrees_with_the_svd_of_the_formed_product_while_that_is_well_conditioned(generator: torch.Generator):
    matrices = [torch.eye(20).double() + 0.05 * normal(20, 20, generator=generator) for _ in range(6)]
    spectrum = product_spectrum(matrices)
    for depth in range(1, 7):
        sigma = torch.linalg.svdvals(product(matrices[:depth]))
        torch.testing.assert_close(spectrum.log_singular_values[depth - 1], sigma.log(), rtol=0, atol=1e-12)
        for power in (1, 2):
            p = sigma**power / (sigma**power).sum()
            erank = torch.exp(-(p * p.log()).sum())
            torch.testing.assert_close(spectrum.effective_rank(power=power)[depth - 1], erank)
            torch.testing.assert_close(effective_ranks(matrices, power=power)[depth - 1], erank)


def test_left_singular_vectors_are_those_of_the_product(generator: torch.Generator):
    matrices = [normal(10, 10, generator=generator) for _ in range(40)]
    graded = GradedProduct(10)
    for A in matrices:
        graded.multiply(A)
    torch.testing.assert_close(graded.U.mT @ graded.U, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-13)
    U = torch.linalg.svd(product(matrices))[0][:, 0]
    assert abs(float(U @ graded.U[:, 0])) == pytest.approx(1, abs=1e-12)


def test_inverses_undo_what_was_multiplied(generator: torch.Generator):
    matrices = [torch.eye(12).double() + 0.3 * normal(12, 12, generator=generator) for _ in range(12)]
    spectrum = product_spectrum([*matrices, *(torch.linalg.inv(A) for A in reversed(matrices))])
    assert spectrum.log_condition.max() > 12 * math.log(10)
    torch.testing.assert_close(spectrum.log_singular_values[-1], torch.zeros(12).double(), rtol=0, atol=1e-5)


def test_a_thousand_layers_do_not_overflow(generator: torch.Generator):
    spectrum = product_spectrum(50.0 * haar(6, generator) for _ in range(1000))
    exact = torch.full((6,), 1000 * math.log(50.0), dtype=torch.float64)
    torch.testing.assert_close(spectrum.log_singular_values[-1], exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(spectrum.effective_rank(power=2), torch.full((1000,), 6.0, dtype=torch.float64))


def test_laws_of_the_effective_rank(generator: torch.Generator):
    matrices = [torch.eye(16).double() + 0.4 * normal(16, 16, generator=generator) for _ in range(30)]
    squares, values = effective_ranks(matrices), effective_ranks(matrices, power=1)
    assert ((squares >= 1) & (squares <= values) & (values <= 16)).all()
    rotation = haar(16, generator)
    torch.testing.assert_close(effective_ranks([3.0 * A for A in matrices]), squares)
    torch.testing.assert_close(effective_ranks([matrices[0] @ rotation, *matrices[1:]]), squares)
    assert squares[-1] < 1.5  # any long product of generic matrices has one direction left


def test_a_matrix_that_loses_a_direction_marks_all_that_follows(generator: torch.Generator):
    Q = [haar(5, generator) for _ in range(6)]
    s = torch.tensor([1.0, 0.5, 0.2, 0.1, 1e-20], dtype=torch.float64)
    ordinary = torch.tensor([1.0, 0.9, 0.8, 0.7, 1e-6], dtype=torch.float64)
    spectrum = product_spectrum(
        [Q[1] * ordinary @ Q[0].mT, Q[2] * ordinary @ Q[1].mT, Q[3] * s @ Q[2].mT, Q[4] * ordinary @ Q[3].mT]
    )
    assert spectrum.at_floor.tolist() == [False, False, True, True]
    assert spectrum.log_singular_values.isfinite().all()
    projection = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
    singular = product_spectrum([projection, projection, torch.ones(3, 3)])
    assert singular.at_floor.tolist() == [True, True, True]
    torch.testing.assert_close(singular.effective_rank(power=2), torch.ones(3, dtype=torch.float64))


def naive_conditions(matrices: list[Tensor]) -> list[float]:
    """C ← A C Aᵀ / ‖·‖₂ in float64, and the quotient of its eigenvalues above ε · d."""
    d = len(matrices[0])
    C, found = torch.eye(d, dtype=torch.float64), []
    for A in matrices:
        C = A @ C @ A.mT
        C /= torch.linalg.matrix_norm(C, ord=2)
        eigenvalues = torch.linalg.eigvalsh(C)
        kept = eigenvalues[eigenvalues > torch.finfo(torch.float64).eps * d]
        found.append(float(kept[-1] / kept[0]))
    return found


def test_published_condition_numbers_are_the_threshold_that_cuts_them_off(generator: torch.Generator):
    """Published for d = 640: 7.0e12. Any random A gives that; the truth grows with every layer."""
    d, layers = 640, 7
    scale = 1 / math.sqrt(d)
    matrices = [
        torch.eye(d, dtype=torch.float64) + scale * sum(normal(d, d, generator=generator) for _ in range(2))
        for _ in range(layers)
    ]
    floor = 1 / (torch.finfo(torch.float64).eps * d)
    assert floor == pytest.approx(7.04e12, rel=1e-3)
    naive = naive_conditions(matrices)
    assert all(5e12 < value <= floor for value in naive[-3:]), naive
    spectrum = product_spectrum(matrices)
    decades = spectrum.log_condition / math.log(10)
    assert float(decades[0]) == pytest.approx(math.log10(naive[0]), abs=1e-6)
    assert (decades.diff() > 1).all()
    assert decades[-1] > 20
    assert not spectrum.at_floor.any()


def pathway(U: Tensor, V: Tensor, spike: float, bulk: float) -> Tensor:
    s = torch.full((len(U),), bulk, dtype=torch.float64)
    s[0] = spike
    return U * s @ V.mT


def shared_bases(rho: float, seed: int, attention: float = 5.0, d: int = 128) -> list[Tensor]:
    """24 times A = I + W_mlp + W_attn with common singular vectors, the first one of the attention flipped."""
    generator = torch.Generator().manual_seed(seed)
    U, V = haar(d, generator), haar(d, generator)
    flipped = torch.cat([-U[:, :1], U[:, 1:]], dim=1)
    A = torch.eye(d, dtype=torch.float64) + pathway(U, V, rho * attention, 0.5) + pathway(flipped, V, attention, 0.5)
    return [A] * 24


def own_bases(rho: float, seed: int, bulk_share: float | None = None, d: int = 128) -> list[Tensor]:
    """The control: each pathway has singular vectors, and perhaps a bulk, of its own."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.eye(d, dtype=torch.float64)
    for spike in (5.0 * rho, 5.0):
        bulk = 0.5 if bulk_share is None else bulk_share * spike
        A = A + pathway(haar(d, generator), haar(d, generator), spike, bulk)
    return [A] * 24


@cache
def final_ranks(rho: float, seeds: int) -> Tensor:
    return torch.stack([effective_ranks(shared_bases(rho, seed))[-1] for seed in range(seeds)])


@pytest.mark.parametrize(("rho", "rank", "tolerance"), [(0.8, 24.2, 0.6), (1.0, 22.5, 1.5), (1.2, 24.2, 0.6)])
def test_synthetic_experiment_near_balance(rho: float, rank: float, tolerance: float):
    assert float(final_ranks(rho, 6).mean()) == pytest.approx(rank, abs=tolerance)


def test_identity_plus_orthogonal_loses_rank_by_the_square_root_of_depth():
    formula = 128 * math.sqrt(math.e / (math.pi * 24))
    assert formula == pytest.approx(24.3, abs=0.05)
    assert float(final_ranks(0.8, 6).mean()) == pytest.approx(formula, abs=0.6)


def test_synthetic_experiment_far_from_balance():
    assert float(final_ranks(20.0, 12).median()) < 1.5


def test_only_the_net_spike_matters():
    """(rho − 1) · ‖W_attn‖: the ratio itself is not the control variable."""
    for seed in range(3):
        weak, strong = shared_bases(5.0, seed, attention=1.0), shared_bases(1.8, seed, attention=5.0)
        torch.testing.assert_close(effective_ranks(weak)[-1], effective_ranks(strong)[-1], rtol=1e-3, atol=0)


def test_control_with_independent_bases_inverts_the_rule():
    as_stated = [float(effective_ranks(own_bases(20.0, seed)).min()) for seed in range(5)]
    assert max(as_stated) < 1.1
    by_rho = {
        rho: float(torch.stack([effective_ranks(own_bases(rho, seed, 0.28)).min() for seed in range(5)]).mean())
        for rho in (0.1, 0.97, 20.0)
    }
    assert min(by_rho, key=by_rho.__getitem__) == 0.97
    assert by_rho[0.97] < 0.6 * min(by_rho[0.1], by_rho[20.0])


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ([], "matrices is empty: expected at least one"),
        ([torch.ones(2, 3)], r"matrix 0 has shape \(2, 3\): expected all square, of one width"),
        ([torch.eye(3), torch.eye(2)], r"matrix 1 has shape \(2, 2\): expected all square, of one width"),
        ([torch.ones(0, 0)], r"matrix 0 has shape \(0, 0\)"),
        ([torch.eye(2), torch.zeros(2, 2)], "matrix 1 is zero or not finite"),
        ([torch.full((2, 2), math.nan)], "matrix 0 is zero or not finite"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(matrices: list[Tensor], message: str):
    with pytest.raises(ConfigurationError, match=message):
        product_spectrum(matrices)


def test_an_unknown_power_is_refused():
    with pytest.raises(ConfigurationError, match="power=3: expected 1 or 2"):
        effective_ranks([torch.eye(2)], power=3)  # type: ignore[arg-type]

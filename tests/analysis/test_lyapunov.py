"""Finite-depth Lyapunov exponents against closed forms, the SVD of the product, and laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_spectral.analysis.covariance import product_spectrum
from lightning_spectral.analysis.exponents import (
    LinearMap,
    LyapunovSpectrum,
    angle_exponent,
    gradient_exponent,
    lyapunov_spectrum,
)
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import Diagonal, LinearOperator, Matrix


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def operators(matrices: list[Tensor]) -> list[LinearOperator]:
    return [Matrix(matrix) for matrix in matrices]


def near_identity(count: int, n: int, size: float, generator: torch.Generator) -> list[Tensor]:
    return [
        torch.eye(n, dtype=torch.float64) + size / math.sqrt(n) * normal(n, n, generator=generator)
        for _ in range(count)
    ]


def exact(matrices: list[Tensor]) -> Tensor:
    P = matrices[0]
    for A in matrices[1:]:
        P = A @ P
    return torch.linalg.svdvals(P).log() / len(matrices)


def test_ginibre_matrices_have_the_exponents_of_newman(generator: torch.Generator):
    """λ_k = ½[ln(2/n) + ψ((n − k + 1)/2)] for entries N(0, 1/n): the QR method, over very many factors."""
    n, count = 4, 60_000
    spectrum = lyapunov_spectrum(operators(list(normal(count, n, n, generator=generator) / 2)), n, sweeps=0)
    psi = torch.special.digamma((n - torch.arange(n, dtype=torch.float64)) / 2)
    formula = (math.log(2 / n) + psi) / 2
    torch.testing.assert_close(formula, torch.tensor([-0.1352, -0.3283, -0.6352, -1.3283]).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(spectrum.exponents, formula, rtol=0, atol=0.005)


def test_near_the_identity_exponents_are_equidistant(generator: torch.Generator):
    """I + εG: λ_k = ε²(n − 2k)/(2n) to second order, because E ln|v + εGv| = ½ε²(E|Gv|² − 2E(vᵀGv)²) for k = 1."""
    n, size = 4, 0.1
    spectrum = lyapunov_spectrum(operators(near_identity(20_000, n, size, generator)), n, sweeps=0)
    formula = size**2 * (n - 2 * torch.arange(1, n + 1, dtype=torch.float64)) / (2 * n)
    torch.testing.assert_close(spectrum.exponents, formula, rtol=0, atol=6e-4)


def stochastic(generator: torch.Generator) -> list[Tensor]:
    return [torch.softmax(normal(50, 50, generator=generator), dim=-1) for _ in range(100)]


def test_attention_matrices_keep_the_constant_vector_and_forget_the_rest(generator: torch.Generator):
    """Random row-stochastic n = 50, T = 1, L = 100, 20 trials: Λ₂ = −1.79, and Λ₁ = 0 if the start knows it."""
    from_constant, from_random = [], []
    for trial in range(20):
        factors = operators(stochastic(generator))
        start = torch.cat([torch.full((50, 1), 1 / math.sqrt(50)), torch.randn(50, 1, generator=generator)], dim=1)
        from_constant.append(lyapunov_spectrum(factors, 2, sweeps=0, start=start).exponents)
        from_random.append(lyapunov_spectrum(factors, 2, sweeps=0, seed=trial).exponents)
    constant, random = torch.stack(from_constant), torch.stack(from_random)
    assert constant[:, 0].abs().max() < 1e-15
    assert float(constant[:, 1].mean()) == pytest.approx(-1.79, abs=0.02)
    assert random[:, 0].max() < -0.005  # a random start has to lose what it is not constant in
    assert float(random[:, 0].mean()) == pytest.approx(-0.02, abs=0.015)


def test_exponents_far_below_the_range_of_floats_are_those_of_the_whole_product(generator: torch.Generator):
    matrices = stochastic(generator)
    spectrum = lyapunov_spectrum(operators(matrices), 5, sweeps=20)
    exponents = product_spectrum(matrices).log_singular_values[-1, :5] / 100
    torch.testing.assert_close(spectrum.exponents, exponents, rtol=0, atol=1e-6)
    assert 100 * spectrum.exponents[1] < math.log(1e-70)
    assert 0 < spectrum.exponents[0] < 1e-3  # ‖P‖₂ ≥ 1 at finite depth, although the limit is 0


@pytest.mark.parametrize("seed", range(3))
def test_sweeps_find_the_svd_of_the_product_and_a_single_pass_does_not(seed: int):
    matrices = near_identity(6, 24, 0.6, torch.Generator().manual_seed(seed))
    truth = exact(matrices)[:6]
    swept = lyapunov_spectrum(operators(matrices), 6, sweeps=20)
    torch.testing.assert_close(swept.exponents, truth, rtol=0, atol=1e-6)
    assert swept.change is not None
    assert swept.change < 1e-6
    single = lyapunov_spectrum(operators(matrices), 6, sweeps=0)
    assert single.change is None
    assert (truth - single.exponents)[0] > 0.05
    norms = torch.stack([torch.linalg.matrix_norm(A, ord=2).log() for A in matrices]).mean()
    assert norms - truth[0] > 0.1  # the product of the norms is no estimate either


def test_every_sweep_raises_the_exponents_and_none_passes_the_truth(generator: torch.Generator):
    matrices = near_identity(5, 30, 0.8, generator)
    truth = exact(matrices)[:8]
    before = torch.full((8,), -math.inf, dtype=torch.float64)
    for sweeps in range(1, 8):
        spectrum = lyapunov_spectrum(operators(matrices), 8, sweeps=sweeps)
        assert (spectrum.exponents >= before - 1e-12).all()
        assert (spectrum.exponents <= truth + 1e-12).all()
        if sweeps > 1:
            assert spectrum.change == pytest.approx(float((spectrum.exponents - before).max()), abs=1e-12)
        before = spectrum.exponents
    assert (truth - before).max() < 1e-3


def test_growth_per_factor_adds_up_and_follows_the_directions_of_the_product():
    gains = torch.tensor([[2.0, 1.0, 0.1], [0.5, 3.0, 0.1], [4.0, 1.0, 0.1]], dtype=torch.float64)
    spectrum = lyapunov_spectrum([Diagonal(gain) for gain in gains], 2, sweeps=30)
    torch.testing.assert_close(spectrum.growth, gains[:, :2].log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(spectrum.exponents, spectrum.growth.mean(0))


def test_a_thousand_factors_do_not_overflow(generator: torch.Generator):
    matrices = list(10.0 * normal(1000, 6, 6, generator=generator))
    spectrum = lyapunov_spectrum(operators(matrices), 2, sweeps=1)
    truth = product_spectrum(matrices).log_singular_values[-1, :2] / 1000
    torch.testing.assert_close(spectrum.exponents, truth, rtol=0, atol=1e-9)
    assert 1000 * float(spectrum.exponents[0]) > math.log(torch.finfo(torch.float64).max)


def test_rectangular_factors_and_plain_functions(generator: torch.Generator):
    matrices = [normal(*shape, generator=generator) for shape in ((9, 6), (7, 9), (8, 7))]
    maps = [LinearMap((len(A), A.shape[1]), lambda X, A=A: A @ X, lambda Y, A=A: A.mT @ Y) for A in matrices]
    spectrum = lyapunov_spectrum(maps, 4, sweeps=40)
    torch.testing.assert_close(spectrum.exponents, exact(matrices)[:4], rtol=0, atol=1e-9)
    same(spectrum, lyapunov_spectrum(operators(matrices), 4, sweeps=40))


def same(one: LyapunovSpectrum, other: LyapunovSpectrum) -> None:
    torch.testing.assert_close(one.exponents, other.exponents, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.growth, other.growth, rtol=0, atol=1e-12)
    assert one.sweeps == other.sweeps


def test_factors_of_32_bits_are_multiplied_as_they_are(generator: torch.Generator):
    matrices = near_identity(4, 12, 0.5, generator)
    spectrum = lyapunov_spectrum(operators([A.float() for A in matrices]), 3, sweeps=20)
    assert spectrum.exponents.dtype == torch.float64
    torch.testing.assert_close(spectrum.exponents, exact(matrices)[:3], rtol=0, atol=1e-5)


def test_a_lost_direction_has_no_exponent():
    projection = Diagonal(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    spectrum = lyapunov_spectrum([projection, projection], 3, sweeps=2)
    torch.testing.assert_close(spectrum.exponents[:2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert spectrum.exponents[2] < math.log(1e-7)


def test_the_seed_decides_and_global_random_numbers_do_not(generator: torch.Generator):
    factors = operators(near_identity(4, 20, 0.5, generator))
    state = torch.get_rng_state()
    first = lyapunov_spectrum(factors, 3, sweeps=1, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(lyapunov_spectrum(factors, 3, sweeps=1, seed=1).growth, first.growth)
    assert not torch.equal(lyapunov_spectrum(factors, 3, sweeps=1, seed=2).growth, first.growth)


EYE = Matrix(torch.eye(3))


@pytest.mark.parametrize(
    ("factors", "arguments", "message"),
    [
        ([], {}, "factors is empty: expected at least one"),
        ([EYE, Matrix(torch.ones(2, 4))], {}, r"factor 1 of shape \(2, 4\) cannot follow one of shape \(3, 3\)"),
        ([EYE], {"k": 4}, "k=4: expected at most 3, the smallest side of a factor"),
        ([EYE], {"k": 0}, "k=0: expected an integer of at least 1"),
        ([EYE], {"sweeps": -1}, "sweeps=-1: expected an integer of at least 0"),
        ([EYE], {"k": 2, "start": torch.ones(3, 1)}, r"start has shape \(3, 1\): expected \(3, 2\) to \(3, 3\)"),
        ([EYE], {"start": torch.ones(4, 2)}, r"start has shape \(4, 2\)"),
        ([EYE, Matrix(torch.full((3, 3), math.inf))], {}, "a product by factor 1 is not finite"),
        (
            [EYE, LinearMap((3, 3), lambda X: X, lambda Y: math.nan * Y), EYE],
            {},
            "a product by the transpose of factor 1 is not finite",
        ),
    ],
)
def test_what_cannot_be_multiplied_is_refused(factors: list[LinearOperator], arguments: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        lyapunov_spectrum(factors, **{"k": 1, **arguments})


def at_angle(angle: float) -> Tensor:
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def test_the_angle_exponent_is_the_growth_of_one_minus_cosine():
    x, before, after = at_angle(0.0), at_angle(1e-7), at_angle(1e-3)
    exponent = angle_exponent(x, 2 * before, 5 * x, after, 4)
    assert exponent == pytest.approx(math.log((1 - math.cos(1e-3)) / (0.5e-14)) / 4, rel=1e-6)
    assert angle_exponent(x, before, x, 3 * x, 4) == -math.inf
    with pytest.raises(ConfigurationError, match=r"1 − cos is 0 before and .*: expected two different, finite inputs"):
        angle_exponent(x, 2 * x, x, after, 4)
    with pytest.raises(ConfigurationError, match=r"1 − cos is .* before and nan after"):
        angle_exponent(x, before, x, 0 * x, 4)
    with pytest.raises(ConfigurationError, match="depth=0: expected an integer of at least 1"):
        angle_exponent(x, before, x, after, 0)


def test_the_gradient_exponent_is_the_growth_of_the_squared_norm():
    gradient = torch.ones(2, 3)
    assert gradient_exponent(math.e**2 * gradient, gradient, 4) == pytest.approx(1.0, rel=1e-6)
    assert gradient_exponent(0 * gradient, gradient, 4) == -math.inf
    for last in (0 * gradient, math.nan * gradient):
        with pytest.raises(ConfigurationError, match=r"gradients of norm .*expected finite norms, the second above 0"):
            gradient_exponent(gradient, last, 4)
    with pytest.raises(ConfigurationError, match="depth=0"):
        gradient_exponent(gradient, gradient, 0)

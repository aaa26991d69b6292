"""Ranks of token representations against dense singular values in float64, and the laws that they obey."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.tokens import (
    effective_rank,
    moment_shares,
    participation_ratio,
    rank_one_residual,
    rankme,
    shares_effective_rank,
    spectral_shares,
    stable_rank,
    token_residual,
)


def entropy_rank(p: Tensor) -> Tensor:
    p = p[p > 1e-14]
    return torch.exp(-(p * p.log()).sum())


def sigma(X: Tensor) -> Tensor:
    return torch.linalg.svdvals(X.double())


# Each measure beside the same thing said slowly, for one matrix.
TWINS = {
    "effective rank of σ": (
        lambda X, *a, **k: effective_rank(X, *a, power=1, **k),
        lambda X: entropy_rank(sigma(X) / sigma(X).sum()),
    ),
    "effective rank of σ²": (
        lambda X, *a, **k: effective_rank(X, *a, power=2, **k),
        lambda X: entropy_rank(sigma(X) ** 2 / (sigma(X) ** 2).sum()),
    ),
    "stable rank": (stable_rank, lambda X: X.double().square().sum() / torch.linalg.matrix_norm(X.double(), 2) ** 2),
    "participation ratio": (participation_ratio, lambda X: (sigma(X) ** 2).sum() ** 2 / (sigma(X) ** 4).sum()),
    "rank-one residual": (
        rank_one_residual,
        lambda X: torch.linalg.norm(X.double() - nearest_of_rank_one(X)) / torch.linalg.norm(X.double()),
    ),
}
RANKS = [name for name in TWINS if "residual" not in name]
SHAPES = [(1, 7), (7, 1), (5, 12), (12, 5), (16, 16), (60, 40)]


def nearest_of_rank_one(X: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return S[0] * torch.outer(U[:, 0], Vh[0])


def tokens(generator: torch.Generator, *shape: int, mean: float = 1.0) -> Tensor:
    """Return tokens of very different sizes around a common mean."""
    spread = torch.logspace(0, -2, shape[-1])
    return torch.randn(*shape, generator=generator) * spread + mean


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_dense_twin_agrees(name, shape, generator):
    measure, twin = TWINS[name]
    X = tokens(generator, *shape)
    # The residual of a matrix of rank one is the root of a rounding error.
    assert measure(X).item() == pytest.approx(twin(X).item(), rel=1e-9, abs=1e-7)
    if shape[0] > 1:
        centred = X.double() - X.double().mean(0)
        assert measure(X, centred=True).item() == pytest.approx(twin(centred).item(), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rankme_is_the_formula_of_the_paper(shape, generator):
    X = tokens(generator, *shape)
    for epsilon in (1e-7, 1e-2):
        p = sigma(X) / sigma(X).sum() + epsilon
        expected = math.exp(-(p * p.log()).sum().item())
        assert rankme(X, epsilon=epsilon).item() == pytest.approx(expected, rel=1e-9)
    assert rankme(X, epsilon=0.0).item() == pytest.approx(effective_rank(X, power=1).item(), rel=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_the_order_of_the_ranks(centred, generator):
    for shape in SHAPES[2:]:
        X = tokens(generator, 20, *shape)
        stable, participation = stable_rank(X, centred=centred), participation_ratio(X, centred=centred)
        squares, values = effective_rank(X, power=2, centred=centred), effective_rank(X, power=1, centred=centred)
        centre = X.double() - X.double().mean(-2, keepdim=True) if centred else X.double()
        rank = torch.linalg.matrix_rank(centre)
        order = torch.stack([torch.ones(20), stable, participation, squares, values, rank.double()])
        assert (order.diff(dim=0) >= -1e-9).all()


@pytest.mark.parametrize("name", RANKS)
def test_known_values(name, generator):
    measure, _ = TWINS[name]
    orthonormal = torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64)).Q
    assert measure(orthonormal.mT).item() == pytest.approx(5)
    assert measure(orthonormal).item() == pytest.approx(5)
    same = torch.randn(12, generator=generator).expand(9, 12)
    assert measure(same).item() == pytest.approx(1, abs=1e-12)
    assert measure(same, centred=True).isnan()
    rank_one = torch.outer(torch.randn(9, generator=generator), torch.randn(12, generator=generator))
    assert measure(rank_one.double()).item() == pytest.approx(1, abs=1e-5)


def test_two_conventions_differ_and_are_never_guessed():
    X = torch.diag(torch.tensor([2.0, 1.0]))
    assert effective_rank(X, power=1).item() == pytest.approx(3 / 2 ** (2 / 3))
    assert effective_rank(X, power=2).item() == pytest.approx(5 / 4**0.8)
    with pytest.raises(TypeError, match="power"):
        effective_rank(X)
    with pytest.raises(ConfigurationError, match="power=3: expected 1 or 2"):
        effective_rank(X, power=3)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("centred", [False, True])
def test_invariances(name, centred, generator):
    measure, _ = TWINS[name]
    X = tokens(generator, 10, 6).double()
    value = measure(X, centred=centred).item()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    for same in (X * 1e-3, X * -7, X[torch.randperm(10, generator=generator)], X @ rotation):
        assert measure(same, centred=centred).item() == pytest.approx(value, rel=1e-9)
    if centred:
        assert measure(X + 100, centred=True).item() == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("name", [*TWINS, "rankme"])
def test_a_mask_is_the_same_as_dropping_the_tokens(name, generator):
    measure = rankme if name == "rankme" else TWINS[name][0]
    options = [{}] if name == "rankme" else [{}, {"centred": True}, {"massive": 3.0}]
    X = tokens(generator, 4, 10, 8)
    mask = torch.rand(4, 10, generator=generator) < 0.5
    mask[:, :3] = torch.tensor([[True, True, False], [False, True, True], [True] * 3, [False, True, True]])
    dirty = X.masked_fill(~mask[..., None], math.nan)
    for option in options:
        expected = torch.stack([measure(x[m], **option) for x, m in zip(X, mask, strict=True)])
        for form in (mask, mask.long(), mask.float()):
            torch.testing.assert_close(measure(dirty, form, **option), expected, rtol=1e-9, atol=0)
    assert measure(dirty, mask).shape == (4,)


@pytest.mark.parametrize("name", TWINS)
def test_what_is_not_measurable_is_nan_and_spoils_nothing_else(name, generator):
    measure, _ = TWINS[name]
    X = tokens(generator, 2, 3, 5, 4)
    expected = measure(X)
    X[0, 0] = 0
    X[0, 1, 2, 1] = math.nan
    X[1, 2, 0, 0] = math.inf
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[1, 0] = False
    wrong = torch.tensor([[True, True, False], [True, False, True]])
    value = measure(X, mask)
    assert torch.equal(value.isnan(), wrong)
    torch.testing.assert_close(value[~wrong], expected[~wrong], rtol=1e-12, atol=0)
    assert torch.equal(measure(X, mask, massive=5.0).isnan(), wrong)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 2e4),
        (torch.float16, 1e-4),
        (torch.bfloat16, 1e38),
        (torch.float32, 1e20),
        (torch.float32, 1e38),
        (torch.float32, 1e-30),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
    ],
    ids=str,
)
def test_range_and_half_precision(name, dtype, scale, generator):
    """What is measured is exactly what the numbers in half precision say."""
    measure, twin = TWINS[name]
    X = (torch.randn(10, 6, generator=generator, dtype=torch.float64).clamp(-3, 3) * scale).to(dtype)
    unit = X.double() / X.double().abs().max()
    assert measure(X).item() == pytest.approx(twin(unit).item(), rel=1e-9)
    centred = unit - unit.mean(0)
    assert measure(X, centred=True).item() == pytest.approx(twin(centred).item(), rel=1e-9)


def test_integers_are_taken_too():
    assert stable_rank(torch.tensor([[3, 0], [0, 3]])).item() == pytest.approx(2)


@pytest.mark.parametrize("name", TWINS)
def test_autocast_changes_nothing(name, generator):
    measure, _ = TWINS[name]
    X = tokens(generator, 10, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measure(X, centred=True)
    assert torch.equal(inside, measure(X, centred=True))


@pytest.mark.parametrize("name", TWINS)
def test_gradients(name, generator):
    measure, _ = TWINS[name]
    X = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: measure(x), X)
    assert torch.autograd.gradcheck(lambda x: measure(x, centred=True), X)
    for degenerate in (
        torch.eye(4),
        torch.ones(5, 4),
        torch.zeros(5, 4),
        torch.outer(torch.arange(5.0), torch.ones(4)),
    ):
        x = degenerate.clone().requires_grad_()
        value = measure(x)
        if not value.isnan():
            value.backward()
            assert x.grad.isfinite().all()


def test_shares_of_energy(generator):
    X = tokens(generator, 3, 9, 5)
    shares = spectral_shares(X)
    expected = torch.linalg.svdvals(X.double()).square()
    torch.testing.assert_close(shares, expected / expected.sum(-1, keepdim=True), rtol=1e-9, atol=1e-15)
    assert spectral_shares(X.mT).shape == (3, 5)
    assert torch.equal(shares_effective_rank(shares, power=2), effective_rank(X, power=2))
    assert spectral_shares(torch.zeros(0, 4, 5)).shape == (0, 4)


def test_rounding_is_no_rank(generator):
    """Without a floor, the smallest eigenvalues of the Gram matrix add rounding to ranks over σ."""
    factors = (torch.randn(200, 2, generator=generator), torch.randn(2, 100, generator=generator))
    X = factors[0].double() @ factors[1].double()
    assert (spectral_shares(X) != 0).sum() == 2
    shares = moment_shares(X.mT @ X, size=200)
    assert (shares != 0).sum() == 2
    assert moment_shares(torch.eye(3, dtype=torch.float64) * 1e-18, size=3, total=torch.tensor(1.0)).isnan().all()


def test_the_nearest_matrix_of_rank_one_is_nearer_than_equal_rows(generator):
    X = tokens(generator, 20, 8, 6)
    assert (rank_one_residual(X) <= token_residual(X) + 1e-12).all()


@pytest.mark.parametrize(
    ("X", "mask", "options", "message"),
    [
        (torch.ones(3), None, {}, r"X has the shape \(3,\): expected \(\.\.\., tokens, width\), neither of them 0"),
        (torch.ones(2, 0, 3), None, {}, r"X has the shape \(2, 0, 3\): expected"),
        (torch.ones(2, 4, 3), torch.ones(4), {}, r"mask has the shape \(4,\): expected \(2, 4\), the shape of X"),
        (torch.ones(4, 3), None, {"massive": 1.0}, "massive=1.0: expected a number above 1"),
        (torch.ones(4, 3), None, {"massive": "no"}, "massive='no': expected a number above 1"),
    ],
)
def test_errors(X, mask, options, message):
    for measure in (stable_rank, participation_ratio, rank_one_residual, token_residual):
        with pytest.raises(ConfigurationError, match=message):
            measure(X, mask, **options)

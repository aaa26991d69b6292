"""Token residual, token similarity and massive activations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.tokens import (
    effective_rank,
    massive_activations,
    select,
    stable_rank,
    token_residual,
    token_similarity,
)


def slow_residual(X: Tensor) -> float:
    X = X.double()
    mean = sum(X) / len(X)
    return (sum((x - mean).dot(x - mean) for x in X) / sum(x.dot(x) for x in X)).sqrt().item()


def slow_similarity(X: Tensor) -> float:
    X = X.double()
    cosines = [
        X[i].dot(X[j]).item() / math.sqrt(X[i].dot(X[i]) * X[j].dot(X[j])) for i in range(len(X)) for j in range(i)
    ]
    return sum(cosines) / len(cosines)


TWINS = {"residual": (token_residual, slow_residual), "similarity": (token_similarity, slow_similarity)}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("shape", [(2, 7), (7, 1), (5, 12), (60, 40)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0, 1000.0])
def test_the_slow_twin_agrees(name, shape, mean, generator):
    measure, twin = TWINS[name]
    X = torch.randn(*shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None] + mean
    assert measure(X).item() == pytest.approx(twin(X), rel=1e-9, abs=1e-12)


def test_equal_tokens():
    X = torch.tensor([0.1, -0.7, 1e-3]).expand(2, 11, 3)
    assert torch.equal(token_residual(X), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(token_similarity(X), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-14)
    assert token_residual(X[:, :1]).tolist() == [0, 0]


def test_opposite_and_orthogonal_tokens():
    X = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    assert token_residual(X).item() == 1
    assert token_similarity(X).item() == pytest.approx(-1)
    n = 6
    assert token_residual(torch.eye(n)).item() == pytest.approx(math.sqrt(1 - 1 / n))
    assert token_similarity(torch.eye(n)).item() == 0
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    assert token_similarity(simplex).item() == pytest.approx(-1 / (n - 1))


def test_unit_tokens_tie_the_two_together(generator):
    """For unit tokens r² = (1 − 1/n)(1 − c), c the mean cosine."""
    X = torch.nn.functional.normalize(torch.randn(9, 4, generator=generator).double() + 0.5, dim=-1)
    assert token_residual(X).item() ** 2 == pytest.approx((1 - 1 / 9) * (1 - token_similarity(X).item()))


@pytest.mark.parametrize("name", TWINS)
def test_invariances(name, generator):
    measure, _ = TWINS[name]
    X = torch.randn(10, 6, generator=generator).double() + 1
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    for same in (X * 1e-3, X * -7, X[torch.randperm(10, generator=generator)], X @ rotation, torch.cat([X, 0 * X], 1)):
        assert measure(same).item() == pytest.approx(measure(X).item(), rel=1e-9)
    sizes = torch.rand(10, 1, generator=generator) + 0.1
    assert token_similarity(X * sizes).item() == pytest.approx(token_similarity(X).item(), rel=1e-9)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("massive", [None, 3.0])
def test_a_mask_is_the_same_as_dropping_the_tokens(name, massive, generator):
    measure, _ = TWINS[name]
    X = torch.randn(4, 10, 8, generator=generator) + 1
    X[:, 4] *= 50
    mask = torch.rand(4, 10, generator=generator) < 0.5
    mask[:, 1:4] = True
    expected = torch.stack([measure(x[m], massive=massive) for x, m in zip(X, mask, strict=True)])
    for form in (mask, mask.long()):
        value = measure(X.masked_fill(~mask[..., None], math.nan), form, massive=massive)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_what_is_not_measurable_is_nan():
    X = torch.ones(6, 3, 2)
    X[0] = 0
    X[1, 0, 0] = math.nan
    X[2, 1, 1] = -math.inf
    X[3, 1:] = 0
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[4] = False
    assert token_residual(X, mask).isnan().tolist() == [True, True, True, False, True, False]
    # A single token with a direction makes no pair.
    assert token_similarity(X, mask).isnan().tolist() == [True, True, True, True, True, False]


def test_tokens_of_zeros_have_no_direction(generator):
    X = torch.randn(5, 4, generator=generator)
    padded = torch.cat([X, torch.zeros(3, 4)])
    assert token_similarity(padded).item() == pytest.approx(token_similarity(X).item(), rel=1e-12)
    assert token_residual(padded).item() != pytest.approx(token_residual(X).item(), rel=1e-3)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 2e4),
        (torch.bfloat16, 1e38),
        (torch.float32, 1e20),
        (torch.float32, 1e-30),
        (torch.float64, 1e200),
    ],
    ids=str,
)
def test_range_and_half_precision(name, dtype, scale, generator):
    measure, twin = TWINS[name]
    X = (torch.randn(10, 6, generator=generator, dtype=torch.float64).clamp(-3, 3) * scale).to(dtype)
    assert measure(X).item() == pytest.approx(twin(X.double() / scale), rel=1e-9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(measure(X), measure(X.double()))


@pytest.mark.parametrize("name", TWINS)
def test_gradients(name, generator):
    measure, _ = TWINS[name]
    X = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: measure(x), X)
    for degenerate in (torch.ones(5, 4), torch.eye(4), torch.cat([torch.eye(4), torch.zeros(1, 4)])):
        x = degenerate.clone().requires_grad_()
        measure(x).backward()
        assert x.grad.isfinite().all()


def massive_case(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return healthy tokens, and the same with what trained language models have.

    That is a first token that is massive in two fixed dimensions, one of which is large in every other token too.
    """
    X = torch.randn(32, 64, generator=generator)
    broken = X.clone()
    broken[0, 15], broken[0, 33] = 2e5, -1e5
    broken[1:, 33] = 3e3
    return X, broken


def test_massive_activations_are_found(generator):
    _, broken = massive_case(generator)
    tokens, dimensions = massive_activations(broken)
    # Dimension 33 is large in every token: that costs the dimension, and no token but the first.
    assert dimensions.nonzero().flatten().tolist() == [15, 33]
    assert not tokens.any()  # 2e5 is 67 times the typical peak of 3e3
    assert massive_activations(broken, multiple=50)[0].nonzero().flatten().tolist() == [0]
    X, valid = select(broken, massive=50)
    assert valid.tolist() == [False] + [True] * 31
    assert (X[0] == 0).all()
    assert (X[:, [15, 33]] == 0).all()


def test_without_massive_activations_the_rest_is_seen(generator):
    X, broken = massive_case(generator)
    rest = X[1:][:, [j for j in range(64) if j not in (15, 33)]]
    assert stable_rank(broken).item() < 1.01
    assert token_residual(X).item() > 0.9
    for measure in (stable_rank, token_residual, token_similarity, lambda x, **k: effective_rank(x, power=1, **k)):
        assert measure(broken, massive=50.0).item() == pytest.approx(measure(rest).item(), rel=1e-9)
        assert measure(X, massive=50.0).item() == pytest.approx(measure(X).item(), rel=1e-9)


def test_at_most_half_is_massive(generator):
    X = torch.randn(9, 7, generator=generator) * torch.logspace(0, 30, 9).double()[:, None]
    tokens, dimensions = massive_activations(X, multiple=1.001)
    assert tokens.sum() <= 4
    assert dimensions.sum() <= 3
    # What is zero throughout has no say in the median: a ReLU layer with few live dimensions is not massive.
    sparse = torch.zeros(10, 20)
    sparse[:, 0] = 1
    assert not massive_activations(sparse)[1].any()


def test_each_sequence_has_its_own_median(generator):
    X = torch.randn(2, 8, 5, generator=generator)
    X[1] *= 1e6
    X[0, 3] *= 1e4
    tokens, dimensions = massive_activations(X)
    assert tokens.nonzero().tolist() == [[0, 3]]
    assert not dimensions.any()


def test_errors():
    with pytest.raises(ConfigurationError, match=r"multiple=0\.5: expected a number above 1"):
        massive_activations(torch.ones(2, 3), multiple=0.5)
    with pytest.raises(ConfigurationError, match="massive=inf: expected a number above 1"):
        token_similarity(torch.ones(2, 3), massive=math.inf)
    with pytest.raises(
        ConfigurationError, match=r"mask has the shape \(3,\): expected \(2,\), the shape of X without width"
    ):
        token_similarity(torch.ones(2, 3), torch.ones(3))

"""An operator is its dense matrix, and its adjoint is the transpose."""

from __future__ import annotations

import pytest
import torch
from spectra import OPERATORS

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import Diagonal, Gather, LinearOperator, Matrix, Product, Stacked, Sum

EPS = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture(params=OPERATORS.values(), ids=list(OPERATORS))
def operator(request: pytest.FixtureRequest) -> LinearOperator:
    return request.param()


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_matmat_equals_the_dense_twin(operator, generator, k):
    X = torch.randn(operator.shape[1], k, generator=generator, dtype=operator.dtype)
    expected = operator.dense() @ X.double()
    actual = operator.matmat(X)
    assert actual.dtype == operator.dtype
    assert actual.shape == (operator.shape[0], k)
    torch.testing.assert_close(
        actual.double(), expected, rtol=1e-4, atol=EPS[operator.dtype] * float(expected.abs().max())
    )


def test_vectors_of_64_bits_are_multiplied_in_64_bits(operator, generator):
    X = torch.randn(operator.shape[1], 3, generator=generator, dtype=torch.float64)
    actual, expected = operator.matmat(X), operator.dense() @ X
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13 * float(expected.abs().max()))


def test_one_wide_weight_makes_the_vectors_of_a_product_wide(generator):
    A, B = torch.randn(4, 6, generator=generator), torch.randn(6, 5, generator=generator).double()
    X = torch.randn(5, 2, generator=generator).double()
    product = Product(Matrix(A), Matrix(B))
    assert product.dtype == torch.float64
    torch.testing.assert_close(product.matmat(X), A.double() @ B @ X, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_adjoint_identity(operator, generator, k):
    X = torch.randn(operator.shape[1], k, generator=generator, dtype=operator.dtype)
    Y = torch.randn(operator.shape[0], k, generator=generator, dtype=operator.dtype)
    left, right = operator.matmat(X).mT @ Y, X.mT @ operator.adjoint(Y)
    assert operator.adjoint(Y).shape == (operator.shape[1], k)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=10 * EPS[operator.dtype] * float(left.abs().max()))


def test_identity_gives_the_dense_twin(operator):
    eye = torch.eye(operator.shape[1], dtype=operator.dtype)
    torch.testing.assert_close(operator.matmat(eye).double(), operator.dense(), rtol=1e-4, atol=1e-5)


def test_balanced_takes_out_a_power_of_two(operator):
    balanced, exponent = operator.balanced()
    torch.testing.assert_close(balanced.dense() * 2.0**exponent, operator.dense())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_balanced_refuses_what_is_not_finite(poison):
    weight = torch.ones(3, 4)
    weight[1, 2] = poison
    for operator in (
        Matrix(weight),
        Product(Diagonal(torch.ones(3)), Matrix(weight)),
        Diagonal(weight[1]),
        Sum(Matrix(torch.ones(3, 4)), Matrix(weight)),
    ):
        assert operator.balanced() is None


def test_a_weight_is_never_copied():
    weight = torch.randn(64, 3, 32)
    for view in (weight[:, 1], weight[:, 1].mT, weight, weight[0].bfloat16()):
        assert Matrix(view).weight.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


def test_operators_see_the_weights_of_now():
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    operator = Matrix(weight)
    with torch.no_grad():
        weight.fill_(1.0)
    product = operator.matmat(torch.ones(3, 1))
    assert not product.requires_grad
    assert torch.equal(product, torch.full((3, 1), 3.0))


def test_product_applies_right_to_left():
    A, B = torch.randn(4, 6), torch.randn(6, 5)
    torch.testing.assert_close(Product(Matrix(A), Matrix(B)).dense(), A.double() @ B.double())


def test_a_sum_is_the_sum_of_its_terms():
    terms = [torch.randn(4, 6) for _ in range(3)]
    torch.testing.assert_close(Sum(*map(Matrix, terms)).dense(), sum(terms).double())


def test_stacked_equals_the_loop(generator):
    operators = [Matrix(torch.randn(6, 9, generator=generator)) for _ in range(3)]
    rows = torch.randn(3, 4, 9, generator=generator)
    batch = Stacked(operators)
    for i, operator in enumerate(operators):
        assert torch.equal(batch.matmat(rows)[i], operator.matmat(rows[i].mT).mT)
        assert torch.equal(batch.normal(rows)[i], operator.adjoint(operator.matmat(rows[i].mT)).mT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Matrix(torch.ones(3, 4, device="meta")), "meta device"),
        (lambda: Matrix(torch.ones(3, 4, dtype=torch.int8)), "got torch.int8: dequantize"),
        (lambda: Matrix(torch.ones(3, 4, dtype=torch.complex64)), "got torch.complex64"),
        (lambda: Matrix(torch.ones(3)), "2 or 3 dimension"),
        (lambda: Matrix(torch.ones(0, 3)), r"shape \(0, 3\)"),
        (lambda: Diagonal(torch.ones(3, 3)), "gain must be non-empty with 1 dimension"),
        (lambda: Diagonal(torch.ones(3, dtype=torch.int64)), "gain must be float16"),
        (lambda: Gather(torch.ones(3), 4), "index must be a vector of int32 or int64"),
        (lambda: Product(), "at least one operator"),
        (lambda: Product(Matrix(torch.ones(3, 4)), Matrix(torch.ones(3, 4))), r"do not fit: \(3, 4\) @ \(3, 4\)"),
        (lambda: Sum(), "operators of one shape, got none"),
        (lambda: Sum(Matrix(torch.ones(3, 4)), Matrix(torch.ones(4, 3))), r"got \(3, 4\) \+ \(4, 3\)"),
        (lambda: Stacked([Matrix(torch.ones(3, 4)), Matrix(torch.ones(4, 3))]), "must agree in shape"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()

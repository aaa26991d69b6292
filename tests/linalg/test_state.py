"""What a solver carries from one measurement to the next."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from spectra import SPECTRA, assert_holds, with_spectrum

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import ExactSVD, Matrix, Product, RandomizedSVD, SolverState


@pytest.fixture
def weights(generator) -> list[torch.Tensor]:
    return [torch.randn(150, 300, generator=generator), torch.randn(300, 120, generator=generator)]


def through_a_file(state: SolverState) -> SolverState:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return SolverState.from_state_dict(torch.load(file, weights_only=True))


def drift(weights: list[torch.Tensor], generator: torch.Generator) -> None:
    """Change every weight by 1e-3 of its size, as one step of Adam does."""
    for weight in weights:
        weight += 1e-3 * torch.randn(weight.shape, generator=generator).sign()


@pytest.mark.parametrize("name", sorted(SPECTRA))
def test_warm_start_on_an_unchanged_matrix_never_lowers_the_value(name, generator):
    operator = Matrix(with_spectrum(SPECTRA[name](120), 150, 120, generator).float())
    solver = RandomizedSVD()
    state = solver.init([operator])
    values = []
    for _ in range(4):
        (norm,), state = solver.compute([operator], state)
        values.append(norm.value)
        assert_holds(norm, float(torch.linalg.matrix_norm(operator.dense(), ord=2)))
    assert all(later >= earlier * (1 - 1e-6) for earlier, later in pairwise(values))
    assert norm.iterations == 1


def test_slow_drift_is_followed_to_a_thousandth(weights, generator):
    operator = Product(*map(Matrix, weights))
    solver = RandomizedSVD()
    (norm,), state = solver.compute([operator], solver.init([operator]))
    for _ in range(25):
        drift(weights, generator)
        (norm,), state = solver.compute([operator], state)
        exact = float(torch.linalg.matrix_norm(operator.dense(), ord=2))
        assert_holds(norm, exact, tolerance=1e-3)
        assert norm.error_bound <= 0.101


def test_a_jump_is_certified_again(weights, generator):
    operator = Product(*map(Matrix, weights))
    solver = RandomizedSVD()
    _, state = solver.compute([operator], solver.init([operator]))
    spike = torch.outer(torch.randn(300, generator=generator), torch.randn(120, generator=generator))
    weights[1] += spike
    (norm,), _ = solver.compute([operator], state)
    assert_holds(norm, float(torch.linalg.matrix_norm(operator.dense(), ord=2)))
    assert norm.iterations > 1


def test_subspace_holds_the_dominant_singular_vectors(generator):
    A = with_spectrum(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]), 120, 100, generator)
    Vh = torch.linalg.svd(A).Vh
    for solver in (RandomizedSVD(n_components=4), ExactSVD(n_components=4)):
        operators = [Matrix(A.float())]
        _, state = solver.compute(operators, solver.init(operators))
        V = state.subspaces[0].double()
        assert V.shape == (100, 4)
        torch.testing.assert_close(V.mT @ V, torch.eye(4).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close((Vh[:4] @ V).diagonal().abs(), torch.ones(4).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", [RandomizedSVD(), ExactSVD()], ids=["randomized", "exact"])
def test_resuming_from_a_file_is_bitwise(weights, generator, solver):
    operators = [
        Product(*map(Matrix, weights)),
        Matrix(torch.zeros(80, 80)),
        Matrix(torch.ones(4, 4)),
        Matrix(weights[0]),
    ]
    _, state = solver.compute(operators, solver.init(operators))
    copy = through_a_file(state)
    for _ in range(3):
        drift(weights, generator)
        norms, state = solver.compute(operators, state)
        resumed, copy = solver.compute(operators, copy)
        assert norms == resumed
        for left, right in zip(state.memories, copy.memories, strict=True):
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left.subspace, right.subspace)


def test_compute_is_pure(weights):
    operators = [Product(*map(Matrix, weights))]
    solver = RandomizedSVD()
    first = solver.compute(operators, solver.init(operators))
    second = solver.compute(operators, first[1])
    assert solver.compute(operators, solver.init(operators))[0] == first[0]
    assert solver.compute(operators, first[1])[0] == second[0]


def test_a_saved_state_holds_no_more_than_it_shows(weights):
    operators = [Product(*map(Matrix, weights))] * 12
    solver = RandomizedSVD()
    _, state = solver.compute(operators, solver.init(operators))
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    elements = 12 * (120 * solver.n_components + 150 * solver.n_oversamples)
    assert file.tell() < 4 * elements + 20_000


def test_what_does_not_fit_starts_afresh(weights, generator):
    solver = RandomizedSVD()
    old = [Product(*map(Matrix, weights)), Matrix(weights[0])]
    _, state = solver.compute(old, solver.init(old))
    new = [Product(*map(Matrix, weights)), Matrix(torch.randn(90, 90, generator=generator))]
    norms, state = solver.compute(new, state)
    assert norms[0].iterations < norms[1].iterations
    (alone,), _ = solver.compute(new[1:], solver.init(new[1:]))
    assert norms[1] == alone
    norms, _ = solver.compute(new[:1], state)  # another number of operators
    assert norms[0].iterations > 1


def test_values_that_leave_and_reenter_the_range(generator):
    weight = torch.randn(100, 100, generator=generator)
    solver = RandomizedSVD()
    state = solver.init([Matrix(weight)])
    for size in (1.0, 1e25, 1e25, float("nan"), 1e-25, 0.0, 1.0):
        (norm,), state = solver.compute([Matrix(weight * size)], state)
        exact = torch.linalg.matrix_norm(weight.double() * size, ord=2) if size == size else None
        if exact is None:
            assert norm.value is None
        else:
            assert_holds(norm, float(exact))


@pytest.mark.parametrize("broken", [{}, {"seed": 0, "memories": [{"subspace": None}]}])
def test_a_foreign_state_is_refused(broken):
    with pytest.raises(ConfigurationError, match="Not the state of a solver"):
        SolverState.from_state_dict(broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"max_iter": -1}, "max_iter must be at least 1"),
        ({"tolerance": 0.0}, "tolerance must lie between 0 and 1, got 0.0"),
        ({"failure_probability": 1.0}, "failure_probability must lie"),
    ],
)
def test_bad_hyperparameters_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        RandomizedSVD(**arguments)

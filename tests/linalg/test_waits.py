"""Nothing waits for the device but the questions that a computation asks, and those of all batches go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from spectra import SPECTRA, with_spectrum
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_spectral.linalg import LinearOperator, Matrix, Memory, RandomizedSVD, Stacked
from lightning_spectral.linalg.norms.asking import Asking, answered
from lightning_spectral.linalg.norms.precision import full_precision
from lightning_spectral.linalg.norms.randomized import _Batch


def questions(computation: Asking[Any]) -> tuple[int, Any]:
    """Answer a computation, and return how often it asked, and its result."""
    count, answer = 0, None
    try:
        asked = next(computation)
        while True:
            count += 1
            answer = [tensor.double() for tensor in asked]
            asked = computation.send(answer)
    except StopIteration as stop:
        return count, stop.value


def batch(operators: Sequence[LinearOperator], memories: Sequence[Memory] = ()) -> _Batch:
    return _Batch(RandomizedSVD(), 0, Stacked(operators), list(memories))


@pytest.mark.parametrize(
    ("name", "cold", "warm"), [("spiked", 2, 1), ("flat", 1, 1), ("linear", 3, 3), ("random", 3, 3)]
)
def test_a_start_asks_once_and_once_more_for_every_look_at_the_error(name, cold, warm, generator):
    """Spectra with a gap at the top, as trained weights have, are good enough at the first look of a warm start."""
    if name == "random":
        weights = [torch.randn(200, 300, generator=generator) for _ in range(3)]
    else:
        weights = [with_spectrum(SPECTRA[name](200), 200, 300, generator).float() for _ in range(3)]
    operators = [Matrix(weight) for weight in weights]
    asked, solved = questions(batch(operators).solve())
    assert asked <= cold
    for weight in weights:
        weight += 1e-4 * weight.std() * torch.randn(200, 300, generator=generator)
    asked, solved = questions(batch(operators, [memory for _, memory in solved]).solve())
    assert asked <= warm
    assert max(norm.iterations for norm, _ in solved) >= asked


@pytest.mark.parametrize("warm", [False, True])
def test_nothing_is_read_before_the_first_question(warm):
    """Tensors without content raise where anybody reads them."""
    with FakeTensorMode(), torch.no_grad():
        weight = torch.empty(100, 80)
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            weight.sum().tolist()
        memory = Memory(torch.empty(80, 6), torch.empty(8, 100), 1.0)
        asked = next(batch([Matrix(weight)] * 2, [memory] * 2 if warm else []).solve())
    assert len(asked) == (4 if warm else 3)


def test_computations_side_by_side_share_their_transfers():
    log = []

    def computation(name: str, times: int) -> Asking[list[float]]:
        seen = []
        for k in range(times):
            log.append(name)
            one, two = yield [torch.tensor(float(k)), torch.full((2, 3), k + 0.5)]
            assert one.dtype == two.dtype == torch.float64
            assert two.shape == (2, 3)
            seen += [float(one), float(two[1, 2])]
        return seen

    assert answered([computation("a", 3), computation("b", 0), computation("c", 2)]) == [
        [0.0, 0.5, 1.0, 1.5, 2.0, 2.5],
        [],
        [0.0, 0.5, 1.0, 1.5],
    ]
    assert log == ["a", "c", "a", "c", "a"]


@pytest.fixture
def medium():
    """Allow reduced precision, as trainings on recent devices do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_reduced_precision_does_not_touch_the_solver(medium, generator):
    A, B = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = A.double() @ B.double()
    reduced = float((A @ B - exact).norm() / exact.norm())
    with full_precision():
        assert float((A @ B - exact).norm() / exact.norm()) < 1e-6
        assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert float((A @ B - exact).norm() / exact.norm()) == reduced
    solver, operators = RandomizedSVD(), [Matrix(A)]
    norms, state = solver.compute(operators, solver.init(operators))
    torch.set_float32_matmul_precision("highest")
    expected, plain = solver.compute(operators, solver.init(operators))
    assert norms == expected
    assert torch.equal(state.subspaces[0], plain.subspaces[0])

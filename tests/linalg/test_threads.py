"""Small steps in one thread, large products in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import example

from lightning_spectral import find_blocks
from lightning_spectral.linalg import LinearOperator, Matrix, Product, RandomizedSVD, frobenius_norm
from lightning_spectral.linalg import matrix as matrices
from lightning_spectral.linalg.threads import all_threads, one_thread


class Seen(TorchDispatchMode):
    """Notes in how many threads operations run: the entries of the largest, and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}
        self.products: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = max((item.numel() for item in args if isinstance(item, torch.Tensor)), default=0)
        self.counts[torch.get_num_threads()] = max(size, self.counts.get(torch.get_num_threads(), 0))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.products.add(torch.get_num_threads())
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def chain(width: int, hidden: int) -> LinearOperator:
    generator = torch.Generator().manual_seed(0)
    return Product(
        Matrix(torch.randn(width, hidden, generator=generator)), Matrix(torch.randn(hidden, width, generator=generator))
    )


def test_small_steps_take_one_thread_and_large_products_take_all():
    operator, solver = chain(2048, matrices._LARGE // 2048), RandomizedSVD()
    with Seen() as seen:
        solver.compute([operator], solver.init([operator]))
    assert set(seen.counts) == {1, 3}
    assert seen.counts[1] < matrices._LARGE <= seen.counts[3]


def test_the_norms_of_small_weights_do_not_depend_on_the_number_of_threads():
    operator, solver = chain(300, 900), RandomizedSVD()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        first, state = solver.compute([operator], solver.init([operator]))
        again, _ = solver.compute([operator], state)
        size = frobenius_norm(operator, generator=torch.Generator().manual_seed(0))
        found.append((first, again, float(size)))
    torch.set_num_threads(3)
    assert found[0] == found[1] == found[2]


def test_a_guessed_pass_and_what_is_asked_of_it_take_one_thread():
    model = example("nanogpt").build()
    with Seen() as guessed:
        find_blocks(model)
    args, kwargs = example("nanogpt").inputs(model)
    with Seen() as given:
        find_blocks(model, batch=args or kwargs)
    assert given.products == {1, 3}  # a batch of the user's may be large
    assert guessed.products == {1}


def nested() -> None:
    """Raise inside of two contexts, one in the other."""
    with one_thread():
        assert torch.get_num_threads() == 1
        with all_threads():
            assert torch.get_num_threads() == 3
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
            raise RuntimeError("lost")


def test_the_number_of_threads_comes_back_after_an_error():
    with pytest.raises(RuntimeError, match="lost"):
        nested()
    with all_threads():
        assert torch.get_num_threads() == 3

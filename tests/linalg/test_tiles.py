"""The parts of a weight: each entry is in exactly one, and the tiles of all parts make the matrix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.tiles import Cut, held, stand_in, tiles

VIEWS = {
    "whole": lambda w: w.flatten(1),
    "transposed": lambda w: w.flatten(1).mT,
    "last rows as groups": lambda w: w[:, 1:],
    "one of the first dimension": lambda w: w[2],
    "one of the second dimension": lambda w: w[:, 1],
    "flattened rows": lambda w: w.flatten(0, 1),
    "every other column": lambda w: w.flatten(0, 1)[:, ::2],
    "split rows": lambda w: w.flatten(0, 1).unflatten(0, (2, 3, -1))[:, 2],
}


def all_parts(shape: tuple[int, ...], cuts: dict[int, int]) -> Iterator[list[Tensor]]:
    """Yield the indices of every part when some dimensions are cut."""
    for places in product(*(range(count) for count in cuts.values())):
        ours = dict(zip(cuts, places, strict=True))
        yield [held(size, [Cut(cuts[dim], ours[dim])] if dim in cuts else []) for dim, size in enumerate(shape)]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_every_index_is_held_once_and_inner_pieces_are_cut_by_the_outer_processes(size, outer, inner):
    parts = {
        (first, second): held(size, [Cut(outer, first, pieces=inner), Cut(inner, second)])
        for first in range(outer)
        for second in range(inner)
    }
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(size))
    if size % (inner * outer) == 0:  # the rows of the inner process, of which the outer ones hold successive parts
        for (first, second), part in parts.items():
            assert torch.equal(part, torch.arange(size).chunk(inner)[second].chunk(outer)[first])


@pytest.mark.parametrize("cuts", [{}, {0: 2}, {1: 3}, {2: 4}, {0: 7}, {0: 2, 2: 2}, {0: 3, 1: 2}], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["by rows", "strided"])
@pytest.mark.parametrize("name", VIEWS)
def test_the_tiles_of_all_parts_make_the_matrix(name, order, cuts, generator):
    weight = torch.randn(3, 4, 6, generator=generator)
    expected = VIEWS[name](weight)
    expected = expected.reshape(-1, expected.shape[-1])
    actual, covered = torch.zeros_like(expected), torch.zeros_like(expected)
    for indices in all_parts(weight.shape, cuts):
        local = weight[indices[0]][:, indices[1]][:, :, indices[2]]
        local = local.permute(order).contiguous().permute(*torch.tensor(order).argsort().tolist())
        for tile in tiles(local, weight.shape, indices, VIEWS[name](stand_in(weight.shape))):
            assert tile.matrix.weight.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
            actual[tile.rows, tile.columns] += tile.matrix.weight
            covered[tile.rows, tile.columns] += 1
    assert bool((covered == 1).all())
    assert torch.equal(actual, expected)


def test_rows_at_one_distance_are_one_tile():
    """As few products as possible: what is cut off from its neighbours in memory is all that is separate."""
    weight = torch.zeros(12, 5)
    whole = [torch.arange(12), torch.arange(5)]
    assert len(tiles(weight, weight.shape, whole, stand_in(weight.shape)[1::3])) == 1
    assert len(tiles(weight, weight.shape, whole, stand_in(weight.shape).unflatten(0, (2, 3, 2))[:, 1])) == 2
    assert tiles(weight[:0], weight.shape, [torch.arange(0), torch.arange(5)], stand_in(weight.shape)) == []


@pytest.mark.parametrize(
    "read",
    [lambda w: w.mT.contiguous(), lambda w: w.mT.reshape(4, 6), lambda w: w.view(6, 4)],
    ids=["copied", "turned and cut", "cut anew"],
)
def test_what_is_no_rectangle_of_the_weight_is_refused(read):
    weight = torch.zeros(3, 8)
    with pytest.raises(ConfigurationError, match="rearranged on the way to a matrix in a way that is no view of it"):
        tiles(weight, weight.shape, [torch.arange(3), torch.arange(8)], read(stand_in(weight.shape)))

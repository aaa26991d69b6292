"""Ranges of a flattened weight: boxes that hold each entry once, and make the matrix together."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.linalg.sharding.flattened import boxes
from lightning_spectral.linalg.sharding.tiles import stand_in, tiles

SHAPES = [(7,), (6, 4), (4, 1), (1, 9), (3, 4, 5)]


@given(st.sampled_from(SHAPES), st.data())
def test_boxes_of_a_range_hold_its_entries_at_their_places(shape, data):
    size = torch.Size(shape)
    start = data.draw(st.integers(0, size.numel()))
    stop = data.draw(st.integers(start, size.numel()))
    entries = torch.arange(start, stop)  # each entry is its own place
    found = torch.full(shape, -1)
    for box, indices in boxes(entries, size, start):
        assert box.shape == torch.Size(map(len, indices))
        assert box.untyped_storage().data_ptr() == entries.untyped_storage().data_ptr()
        places = torch.meshgrid(*indices, indexing="ij")
        assert bool((found[places] == -1).all())
        found[places] = box
    expected = torch.full((size.numel(),), -1)
    expected[start:stop] = entries
    assert torch.equal(found.flatten(), expected)


@given(st.integers(0, 24), st.integers(0, 24))
def test_a_range_of_a_matrix_is_at_most_three_boxes(one, other):
    start, stop = sorted((one, other))
    assert len(list(boxes(torch.arange(start, stop), torch.Size((6, 4)), start))) <= 3


@pytest.mark.parametrize("cuts", [(0, 24), (0, 0, 5, 24), (0, 3, 7, 7, 22, 24), tuple(range(25))], ids=str)
@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.mT, lambda w: w[1:5], lambda w: w[:, 1::2]])
def test_the_tiles_of_all_ranges_make_the_matrix(cuts, view, generator):
    weight = torch.randn(6, 4, generator=generator)
    actual, covered = torch.zeros_like(view(weight)), torch.zeros_like(view(weight))
    for start, stop in pairwise(cuts):
        for box, indices in boxes(weight.flatten()[start:stop], weight.shape, start):
            for tile in tiles(box, weight.shape, indices, view(stand_in(weight.shape))):
                actual[tile.rows, tile.columns] += tile.matrix.weight
                covered[tile.rows, tile.columns] += 1
    assert bool((covered == 1).all())
    assert torch.equal(actual, view(weight))

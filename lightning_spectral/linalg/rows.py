"""Picked rows of a weight, without a copy: a view where the rows form a pattern, and a repetition of that view.

The rows of heads form a pattern. For a fused weight with the rows k k v v | k k v v of 2 heads::

    rows 2 3, 6 7   ──►  one view (2 heads, 2 rows, n) with strides (4 n, n, 1), from row 2
    rows 2 3, 2 3   ──►  the view of rows 2 3, and a Gather that repeats it: one value head for two query heads
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lightning_spectral.linalg.operators import Gather, LinearOperator

__all__ = ["rows_of"]


def rows_of(
    weight: Tensor, rows: tuple[range, ...] | None, matrix: Callable[[Tensor], LinearOperator]
) -> list[LinearOperator]:
    """Return the picked rows of a weight as factors, the leftmost first: a Gather if needed, and the matrix.

    Args:
        weight: The weight, ``(m, n)``, or its stand-in (see :mod:`.sharding.tiles`).
        rows: The rows, ``None`` for all rows.
        matrix: Makes an operator of a view of the weight.
    """
    if rows is None:
        return [matrix(weight)]
    # First the rows in memory order, each run once; then, if that is not the wanted order, a Gather on top.
    unique = tuple(sorted(set(rows), key=lambda run: run.start))
    view = _view(weight, unique)
    operator = matrix(weight if view is None else view)
    if view is not None and unique == rows:
        return [operator]
    if view is None:
        index = torch.cat([torch.tensor(run, device="cpu") for run in rows])
    else:
        starts = dict(zip(unique, _offsets(unique), strict=True))
        index = torch.cat([torch.arange(starts[run], starts[run] + len(run), device="cpu") for run in rows])
    return [Gather(index.to(operator.device), operator.shape[0]), operator]


def _offsets(runs: tuple[range, ...]) -> list[int]:
    """Return the place of the first row of each run in the view."""
    lengths = [len(run) for run in runs]
    return [sum(lengths[:position]) for position in range(len(runs))]


def _view(weight: Tensor, runs: tuple[range, ...]) -> Tensor | None:
    """Return runs of equal length at equal distances (heads) as one strided view, ``None`` for other runs."""
    first = runs[0]
    if len(runs) == 1:
        return weight[first.start : first.stop : first.step]
    distances = {later.start - earlier.start for earlier, later in pairwise(runs)}
    if len(distances) != 1 or len({(len(run), run.step) for run in runs}) != 1 or min(distances) <= 0:
        return None
    row, column = weight.stride()
    return weight.as_strided(
        (len(runs), len(first), weight.shape[1]),
        (distances.pop() * row, first.step * row, column),
        weight.storage_offset() + first.start * row,
    )

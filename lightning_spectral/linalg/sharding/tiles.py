"""Find the entries of a matrix that lie in one process's part of a weight: arithmetic on indices, without processes.

A process holds a part of a *weight*: some indices along each stored dimension. A solver multiplies by a *matrix*: a
view of the weight, such as its transpose, or the value rows of a fused projection. Which rows and columns of the matrix
does the process hold, and at which addresses?

    weight (6, 4), cut in 2 along dimension 0         matrix = weight[3:6], the values
    process 0 holds rows 0 1 2                        process 0: no row
    process 1 holds rows 3 4 5                        process 1: rows 0 1 2, at local rows 0 1 2

The answer has three steps:

1. `stand_in` makes a meta tensor in which entry i of the weight lies at address i + 1. The caller takes the view of
   this tensor that makes the matrix; its strides then tell which entry of the weight each matrix entry is.
2. `places` splits these entry numbers into one index per stored dimension. Either the rows of the matrix or its
   columns walk along a stored dimension, not both. So the held part is a grid: held rows × held columns.
3. `_runs` looks up the held indices, and collects successive rows (or columns) at one distance in memory. A run of rows
   and a run of columns make a tile, a strided view of the local tensor::

                 columns of the matrix
                ┌───────┬───────┐
       rows     │ tile  │ tile  │        two runs of rows × two runs of columns: four tiles, no copy
                ├───────┼───────┤
                │ tile  │ tile  │
                └───────┴───────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.matrix import Matrix

__all__ = ["Cut", "Tile", "held", "places", "stand_in", "tiles"]

_NO_VIEW = "the weight is sharded, and it is rearranged on the way to a matrix in a way that is no view of it"


class Cut(NamedTuple):
    """One cut of a dimension.

    Attributes:
        parts: The number of parts.
        place: The number of our part.
        pieces: The number of pieces that are cut separately. ``fully_shard`` around tensor parallelism cuts each piece
            of the tensor parallelism, but stands before it in the placements.

    With tensor parallelism over 2 and ``fully_shard`` over 2, eight rows are cut like this::

        placements: (_StridedShard(0, split_factor=2), Shard(0))
        pieces        0 1 2 3 | 4 5 6 7         Cut(2, place, pieces=2) takes one half of each piece:
        place 0       0 1     | 4 5             0 1 4 5
        then Cut(2, 0)                          0 1        of the first tensor-parallel process
    """

    parts: int
    place: int
    pieces: int = 1


class Tile(NamedTuple):
    """A rectangle of a matrix.

    Attributes:
        matrix: The entries.
        rows: The rows of the entries in the whole matrix.
        columns: The columns of the entries in the whole matrix.
    """

    matrix: Matrix
    rows: slice
    columns: slice


def stand_in(shape: torch.Size) -> Tensor:
    """Return a meta tensor in which entry i of a weight, counted by rows, lies at address i + 1.

    A view of it tells by its offset and strides which entries it has. The extra place in memory tells a view from a
    copy: a copy, even of all entries, has memory of another size.
    """
    memory = torch.empty(shape.numel() + 1, device="meta")
    return memory[1:].view(shape)


def held(size: int, cuts: Sequence[Cut]) -> Tensor:
    """Return our indices along a dimension after all cuts, in the order in which they are stored.

    Parts are cut as by :func:`torch.chunk`: the last parts may be smaller, or empty.
    """
    indices = torch.arange(size, device="cpu")
    for cut in cuts:
        indices = torch.cat([_part(piece, cut) for piece in indices.chunk(cut.pieces)])
    return indices


def _part(indices: Tensor, cut: Cut) -> Tensor:
    """Return our part of one piece; empty where ``chunk`` returns fewer parts than asked for."""
    parts = indices.chunk(cut.parts)
    return parts[cut.place] if cut.place < len(parts) else indices[:0]


def tiles(local: Tensor, shape: torch.Size, indices: Sequence[Tensor], view: Tensor) -> list[Tile]:
    """Return the rectangles of a matrix that lie in a part of its weight, as views of that part.

    Args:
        local: The part.
        shape: Shape of the whole weight.
        indices: The indices of the part along every dimension of the weight, as :func:`held` returns them.
        view: The matrix, ``(m, n)`` or ``(groups, rows, n)``, as a view of the :func:`stand_in` of the weight.

    Raises:
        ConfigurationError: If the matrix is no view of the weight, or not a rectangle of it.
    """
    rows, columns = places(view, shape)
    # Held rows and held columns are independent of each other, so every run of rows meets every run of columns.
    return [
        Tile(Matrix(_rectangle(local, row, column)), row.positions, column.positions)
        for row in _runs(local, indices, rows, view.shape[:-1].numel())
        for column in _runs(local, indices, columns, view.shape[-1])
    ]


class _Run(NamedTuple):
    """Successive rows (or columns) of a matrix at one distance from each other in the memory of this process.

    Attributes:
        positions: The rows in the matrix.
        start: The address of the first row, relative to the local tensor.
        step: The distance between neighbouring rows.
    """

    positions: slice
    start: int
    step: int

    def __len__(self) -> int:
        return int(self.positions.stop - self.positions.start)


def places(view: Tensor, shape: torch.Size) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return where the rows and the columns of a view lie along every dimension of the stored weight.

    Entry (i, j) of the view is entry row[i] + column[j] of the weight, counted by rows. The index of entry e along a
    dimension is e // below % size, where ``below`` is the number of entries behind one index of this dimension. Along
    each dimension only the rows or only the columns may move::

        the columns stay at 0                   the dimension belongs to the rows
        the rows stay at r, r + c < size        the dimension belongs to the columns, which begin at r
        both move, or they carry over           not a grid: an error

    Args:
        view: ``(m, n)`` or ``(groups, rows, n)``, a view of a :func:`stand_in`.
        shape: Shape of the weight.

    Returns:
        Indices ``(m,)`` of the rows and ``(n,)`` of the columns along every dimension, each ``None`` along a dimension
        that belongs to the other.
    """
    if view.untyped_storage().nbytes() != (shape.numel() + 1) * view.element_size():
        raise ConfigurationError(_NO_VIEW)
    # row[i] is the entry number of element (i, 0). Groups and rows are flattened: each dimension adds its own stride.
    row = torch.tensor([view.storage_offset() - 1], device="cpu")
    for size, stride in zip(view.shape[:-1], view.stride()[:-1], strict=True):
        row = (row.unsqueeze(1) + stride * torch.arange(size, device="cpu")).flatten()
    column = view.stride(-1) * torch.arange(view.shape[-1], device="cpu")
    rows: list[Tensor | None] = []
    columns: list[Tensor | None] = []
    for dim, size in enumerate(shape):
        below = shape[dim + 1 :].numel()
        r, c = row // below % size, column // below % size
        if not c.any():
            rows, columns = [*rows, r], [*columns, None]
        # A carry, r + c ≥ size, would move the index of the dimension in front, which belongs to the rows.
        elif bool((r == r[0]).all()) and int(r[0] + c.max()) < size:
            rows, columns = [*rows, None], [*columns, r[0] + c]
        else:
            raise ConfigurationError(_NO_VIEW)
    return rows, columns


def _rectangle(local: Tensor, row: _Run, column: _Run) -> Tensor:
    """Return one tile as a view. Rows and columns walk different dimensions, so their addresses add up."""
    offset = local.storage_offset() + row.start + column.start
    return local.as_strided((len(row), len(column)), (row.step, column.step), offset)


def _runs(local: Tensor, indices: Sequence[Tensor], places: Sequence[Tensor | None], length: int) -> Iterator[_Run]:
    """Yield the rows (or columns) that this process holds, in runs as long as possible.

    Args:
        local: The part.
        indices: The indices of the part along every dimension.
        places: The indices of the rows along every dimension, ``None`` along a dimension of the columns.
        length: The number of rows of the matrix.
    """
    # A row is held if its index is held along every dimension of the rows. Its address adds up over the dimensions.
    here, address = (torch.full((length,), value, device="cpu") for value in (True, 0))
    for dim, place in enumerate(places):
        if place is not None:
            # index[i] is the local index of row i along this dimension, −1 for a row that another process holds.
            size = 1 + int(torch.cat([place, indices[dim]]).max())
            order = torch.arange(len(indices[dim]), device="cpu")
            index = torch.full((size,), -1, device="cpu").scatter_(0, indices[dim], order)[place]
            here &= index >= 0
            address += index * local.stride(dim)
    positions, address = here.nonzero().flatten(), address[here]
    # Such as the rows of V on a process that holds rows of Q.
    if not len(positions):
        return
    # A run ends where the next held row is not the next row, or lies at another distance. The smallest distance of
    # neighbours is the step: larger ones are jumps between heads.
    distances = address.diff()
    neighbours = (positions.diff() == 1) & (distances >= 0)
    # A negative distance is a jump back, where the next group of a permuted view begins.
    step = int(distances[neighbours].min()) if neighbours.any() else 1
    ends = (~(neighbours & (distances == step))).nonzero().flatten().tolist()
    for first, last in zip([0, *(end + 1 for end in ends)], [*ends, len(positions) - 1], strict=True):
        yield _Run(slice(int(positions[first]), int(positions[last]) + 1), int(address[first]), step)

"""Which entries of a matrix lie in a part of its weight, and where: arithmetic on indices, without any process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.matrix import Matrix

__all__ = ["Cut", "Tile", "held", "stand_in", "tiles"]

_NO_VIEW = "the weight is sharded, and it is rearranged on the way to a matrix in a way that is no view of it"


class Cut(NamedTuple):
    """One cut of a dimension.

    Attributes:
        parts: Into how many parts.
        place: Which of them is ours.
        pieces: How many pieces are cut each for itself. ``fully_shard`` around tensor parallelism cuts the pieces of
            the latter, but is listed before it.
    """

    parts: int
    place: int
    pieces: int = 1


class Tile(NamedTuple):
    """A rectangle of a matrix.

    Attributes:
        matrix: Its entries.
        rows: Their rows in the whole matrix.
        columns: Their columns.
    """

    matrix: Matrix
    rows: slice
    columns: slice


def stand_in(shape: torch.Size) -> Tensor:
    """Return a tensor without numbers in which entry i of a weight, counted by rows, lies at place i + 1 of memory.

    A view of it says by its strides which entries are meant. A copy, even of all of it, has memory of another size.
    """
    memory = torch.empty(shape.numel() + 1, device="meta")
    return memory[1:].view(shape)


def held(size: int, cuts: Sequence[Cut]) -> Tensor:
    """Return the indices along a dimension that are ours after all cuts, in the order in which they are stored.

    Parts are those of :func:`torch.chunk`: the last ones may be smaller, or empty.
    """
    indices = torch.arange(size, device="cpu")
    for cut in cuts:
        indices = torch.cat([_part(piece, cut) for piece in indices.chunk(cut.pieces)])
    return indices


def _part(indices: Tensor, cut: Cut) -> Tensor:
    parts = indices.chunk(cut.parts)
    return parts[cut.place] if cut.place < len(parts) else indices[:0]


def tiles(local: Tensor, shape: torch.Size, indices: Sequence[Tensor], view: Tensor) -> list[Tile]:
    """Return the rectangles of a matrix that lie in a part of its weight, as views of that part.

    Args:
        local: The part.
        shape: Of the whole weight.
        indices: For every dimension, those that the part consists of, as :func:`held` returns them.
        view: How the matrix is read: ``(m, n)`` or ``(groups, rows, n)``, a view of what :func:`stand_in` returned.

    Raises:
        ConfigurationError: If the matrix is no view of the weight, or not a rectangle of it.
    """
    rows, columns = _places(view, shape)
    return [
        Tile(Matrix(_rectangle(local, row, column)), row.positions, column.positions)
        for row in _runs(local, indices, rows, view.shape[:-1].numel())
        for column in _runs(local, indices, columns, view.shape[-1])
    ]


class _Run(NamedTuple):
    """Successive rows or columns that lie at one distance from each other in the memory of this process."""

    positions: slice
    start: int
    step: int

    def __len__(self) -> int:
        return int(self.positions.stop - self.positions.start)


def _places(view: Tensor, shape: torch.Size) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Say, for every dimension of the stored weight, where in it the rows and the columns of a view lie.

    Args:
        view: ``(m, n)`` or ``(groups, rows, n)``, a view of what :func:`stand_in` returned.
        shape: Of the weight.

    Returns:
        Indices ``(m,)`` of the rows and ``(n,)`` of the columns along every dimension. A dimension belongs to the rows
        or to the columns; for the others there is ``None``.
    """
    if view.untyped_storage().nbytes() != (shape.numel() + 1) * view.element_size():
        raise ConfigurationError(_NO_VIEW)
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
        elif bool((r == r[0]).all()) and int(r[0] + c.max()) < size:
            rows, columns = [*rows, None], [*columns, r[0] + c]
        else:
            raise ConfigurationError(_NO_VIEW)
    return rows, columns


def _rectangle(local: Tensor, row: _Run, column: _Run) -> Tensor:
    offset = local.storage_offset() + row.start + column.start
    return local.as_strided((len(row), len(column)), (row.step, column.step), offset)


def _runs(local: Tensor, indices: Sequence[Tensor], places: Sequence[Tensor | None], length: int) -> Iterator[_Run]:
    """Yield the rows (or columns) whose places this process holds, in runs as long as possible."""
    here, address = (torch.full((length,), value, device="cpu") for value in (True, 0))
    for dim, place in enumerate(places):
        if place is not None:
            size = 1 + int(torch.cat([place, indices[dim]]).max())
            order = torch.arange(len(indices[dim]), device="cpu")
            index = torch.full((size,), -1, device="cpu").scatter_(0, indices[dim], order)[place]
            here &= index >= 0
            address += index * local.stride(dim)
    positions, address = here.nonzero().flatten(), address[here]
    if not len(positions):
        return
    distances = address.diff()
    neighbours = (positions.diff() == 1) & (distances >= 0)
    step = int(distances[neighbours].min()) if neighbours.any() else 1
    ends = (~(neighbours & (distances == step))).nonzero().flatten().tolist()
    for first, last in zip([0, *(end + 1 for end in ends)], [*ends, len(positions) - 1], strict=True):
        yield _Run(slice(int(positions[first]), int(positions[last]) + 1), int(address[first]), step)

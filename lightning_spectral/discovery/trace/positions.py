"""Which positions of a branch's output move when positions of its stream are perturbed.

A branch that mixes no positions moves exactly the perturbed ones. Two patterns of perturbation are tried::

    moved_by_one     x . . . . .      causal attention: every later position sees the first
    moved_by_half    x . x . x .      local or shifted mixers, and attention that hides the first position
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["moved_by_half", "moved_by_one"]

Change = Callable[[Tensor, float], Tensor]
"""Maps a mask of positions and a size of perturbation to how far each position of the output moves."""

_ONE, _HALF = 1e-3, 1e-5  # sizes of perturbation, relative to the stream
_LEAST = 1e-9  # relative to the largest move: smaller moves are rounding


def moved_by_one(change: Change, rows: Tensor) -> tuple[int, tuple[int, ...]]:
    """Perturb the first position.

    Args:
        change: Maps a perturbation to how far each position moves.
        rows: The stream, its channels last.

    Returns:
        How many other positions move, and the dimensions along which they lie.
    """
    places = _nowhere(rows)
    places[(0,) * places.dim()] = True
    moved = _moved(change(places, _ONE), places)
    whole = moved.shape == places.shape and bool(moved.any())
    dims = tuple(dim for dim, place in enumerate(moved.nonzero().amax(0).tolist()) if place) if whole else ()
    return max(int(moved.sum()) - 1, 0), dims


def moved_by_half(change: Change, rows: Tensor) -> tuple[int, tuple[int, ...]]:
    """Perturb every second position along each dimension in turn.

    Args:
        change: Maps a perturbation to how far each position moves.
        rows: The stream, its channels last.

    Returns:
        The largest number of unperturbed positions that move, and the dimensions along which some move.
    """
    counts: dict[int, int] = {}
    for dim, first in itertools.product(range(rows.dim() - 1), (1, 0)):
        if rows.shape[dim] < 2 or counts.get(dim):
            continue
        places = _nowhere(rows)
        places.movedim(dim, 0)[first::2] = True
        try:
            moved = _moved(change(places, _HALF), places)
        except (RuntimeError, IndexError):  # a router changed its choice, and shapes depend on the choice
            continue
        if moved.shape == places.shape:
            counts[dim] = int(moved[~places].sum())
    return max(counts.values(), default=0), tuple(dim for dim, count in counts.items() if count)


def _nowhere(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[:-1], dtype=torch.bool, device=rows.device)


def _moved(change: Tensor, places: Tensor) -> Tensor:
    """Return a mask of the positions that move. No position of a branch that is not finite counts."""
    largest = change.max()
    moved = (change > _LEAST * largest) & largest.isfinite()
    return moved.view_as(places) if moved.numel() == places.numel() else moved  # the output may have other positions

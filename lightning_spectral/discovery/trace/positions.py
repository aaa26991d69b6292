"""Which positions of a branch's output move when positions of its stream are perturbed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["moved_by_half", "moved_by_one"]

Change = Callable[[Tensor, float], Tensor]
"""Perturbs the stream at the positions of a mask by a size, and returns how far each position of the output moves."""

_ONE, _HALF = 1e-3, 1e-5
_LEAST = 1e-9


def moved_by_one(change: Change, rows: Tensor) -> tuple[int, tuple[int, ...]]:
    """Perturb the first position.

    Args:
        change: How far each position moves.
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
        change: How far each position moves.
        rows: The stream, its channels last.

    Returns:
        The largest number of positions between them that move, and the dimensions along which some do.
    """
    counts: dict[int, int] = {}
    for dim, first in itertools.product(range(rows.dim() - 1), (1, 0)):
        if rows.shape[dim] < 2 or counts.get(dim):
            continue
        places = _nowhere(rows)
        places.movedim(dim, 0)[first::2] = True
        try:
            moved = _moved(change(places, _HALF), places)
        except (RuntimeError, IndexError):  # a router chose otherwise, and shapes depend on its choice
            continue
        if moved.shape == places.shape:
            counts[dim] = int(moved[~places].sum())
    return max(counts.values(), default=0), tuple(dim for dim, count in counts.items() if count)


def _nowhere(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[:-1], dtype=torch.bool, device=rows.device)


def _moved(change: Tensor, places: Tensor) -> Tensor:
    """Return which positions move: none of a branch that is not finite."""
    largest = change.max()
    moved = (change > _LEAST * largest) & largest.isfinite()
    return moved.view_as(places) if moved.numel() == places.numel() else moved  # the branch can lay them out otherwise

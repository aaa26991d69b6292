"""A batch of operators of one shape. The weights stay where they are; only the small blocks of vectors are stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.leaves import Factors, Leaf, Walk, walk
from lightning_spectral.linalg.operators import LinearOperator
from lightning_spectral.linalg.sharding.hidden import unsummed
from lightning_spectral.linalg.sharding.sharded import Sharded, Share, added, agreed

__all__ = ["Stacked"]

Kept = dict[tuple[LinearOperator, bool, Factors], tuple[int, ...]]
"""The dimensions of the mesh along which the product of a leaf is not added up, by what makes a leaf."""


class Stacked:
    """Operators of one shape that multiply a stack of blocks, one block each.

    Blocks are stored as rows, ``(batch, k, n)``. The transposed product leaves them so, and projections of rows were
    measured to be 2 to 4 times as fast as projections of columns.

    Args:
        operators: At least one operator; all of one shape, dtype and device.
        kept: Answers of :func:`~lightning_spectral.linalg.sharding.hidden.unsummed` about these operators so far.

    Raises:
        ConfigurationError: If the operators differ in shape, dtype or device.
    """

    def __init__(self, operators: Sequence[LinearOperator], kept: Kept | None = None) -> None:
        kinds = {(operator.shape, operator.dtype, operator.device) for operator in operators}
        if len(kinds) != 1:
            raise ConfigurationError(f"Stacked operators must agree in shape, dtype and device, got {kinds}.")
        self.operators = tuple(operators)
        self._kept: Kept = {} if kept is None else kept
        ((self.shape, self.dtype, self.device),) = kinds
        self.sharded = any(operator.mesh is not None for operator in operators)

    def __len__(self) -> int:
        """Return the number of operators."""
        return len(self.operators)

    def matmat(self, rows: Tensor) -> Tensor:
        """Multiply: ``(batch, k, n) -> (batch, k, m)``."""
        if self.sharded:
            return self._together(rows, (False,))
        return torch.stack([A.matmat(x.mT).mT for A, x in zip(self.operators, rows, strict=True)])

    def adjoint(self, rows: Tensor) -> Tensor:
        """Multiply by the transposes: ``(batch, k, m) -> (batch, k, n)``."""
        if self.sharded:
            return self._together(rows, (True,))
        return torch.stack([A.adjoint(y.mT).mT for A, y in zip(self.operators, rows, strict=True)])

    def normal(self, rows: Tensor) -> Tensor:
        """Multiply by AᵀA: ``(batch, k, n) -> (batch, k, n)``.

        Each operator multiplies twice in a row, so that the second product can find its weight in the cache.
        """
        if self.sharded:
            return self._together(rows, (False, True))
        pairs = zip(self.operators, rows, strict=True)
        return torch.stack([A.adjoint(A.matmat(x.mT)).mT for A, x in pairs])

    @torch.no_grad()
    def _together(self, rows: Tensor, turns: tuple[bool, ...]) -> Tensor:
        """Multiply by every operator, or by its transpose, in turn; partial sums of all operators travel together."""
        walks = [_in_turn(A, x.mT, turns) for A, x in zip(self.operators, rows, strict=True)]
        return torch.stack([block.mT for block in _side_by_side(walks, self._kept)])

    def agreed(self, numbers: Tensor) -> Tensor:
        """Return numbers that a decision depends on, ``(batch, ...)``, as the first process has them."""
        if not self.sharded:
            return numbers
        return torch.stack(agreed(list(numbers), [operator.mesh for operator in self.operators]))

    def select(self, indices: Sequence[int]) -> Stacked:
        """Return the operators at the given positions."""
        return Stacked([self.operators[i] for i in indices], self._kept)


def _in_turn(operator: LinearOperator, X: Tensor, turns: tuple[bool, ...]) -> Walk:
    """Walk over an operator once for every turn; a true turn multiplies by the transpose."""
    for transposed in turns:
        X = yield from walk(operator, X, transposed=transposed)
    return X


def _product(leaf: Leaf, kept: Kept) -> Tensor | Share:
    """Return the product of a leaf, or the share of this process where others have to add theirs."""
    if not isinstance(leaf.operator, Sharded):
        return leaf.multiplied()
    share = leaf.operator.share(leaf.X, transposed=leaf.transposed)
    place = (leaf.operator, leaf.transposed, leaf.then)
    if place not in kept:  # each leaf is multiplied again and again
        kept[place] = unsummed(leaf)
    dims = tuple(dim for dim in share.dims if dim not in kept[place])
    return share._replace(dims=dims) if dims else share.block


def _side_by_side(walks: Sequence[Walk], kept: Kept) -> list[Tensor]:
    """Finish all walks, with one collective for the sharded leaves that all of them have reached.

    Only a sharded leaf needs other processes. Each walk runs ahead to its next one; then one collective serves all::

        walk 0:  leaf, leaf, sharded ─┐                ┌─ leaf, sharded ─┐
        walk 1:  leaf, sharded ───────┴── collective ──┴─ sharded ───────┴── collective …
    """
    results: dict[int, Tensor] = {}
    waiting: dict[int, Share] = {}

    def go_on(i: int, total: Tensor | None) -> None:
        try:
            leaf = next(walks[i]) if total is None else walks[i].send(total)
            while isinstance(product := _product(leaf, kept), Tensor):
                leaf = walks[i].send(product)
            waiting[i] = product
        except StopIteration as stop:
            results[i] = stop.value

    for i in range(len(walks)):
        go_on(i, None)
    while waiting:
        members, totals = list(waiting), added(list(waiting.values()))
        waiting.clear()
        for i, total in zip(members, totals, strict=True):
            go_on(i, total)
    return [results[i] for i in range(len(walks))]

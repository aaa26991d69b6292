"""Hidden blocks that need no sum: with tensor parallelism each process reads the rows that it has itself computed.

    Y = W₂ W₁ X, with the rows of W₁ and the columns of W₂ cut alike:

    process 0   H₀ = W₁[0] X    W₂[:, 0] H₀ ─┐
    process 1   H₁ = W₁[1] X    W₂[:, 1] H₁ ─┴─ one sum, of the blocks of Y

Gains and repeated heads between the two matrices change nothing, as long as no row leaves its process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.linalg.leaves import Leaf, flat
from lightning_spectral.linalg.operators import Diagonal, Gather
from lightning_spectral.linalg.sharding.sharded import Sharded

__all__ = ["unsummed"]

_NOBODY, _SEVERAL = -1, -2


def unsummed(leaf: Leaf) -> tuple[int, ...]:
    """Return the dimensions of the mesh along which the product of a sharded leaf need not be added up.

    Along these, whatever the next matrix reads on a process has been computed by this process alone. The answer is the
    same on all processes, because it follows from the placements.
    """
    first = leaf.operator
    assert isinstance(first, Sharded)
    between: list[tuple[Diagonal | Gather, bool]] = []
    for operator, transposed in flat(leaf.then):
        match operator:
            case Diagonal() | Gather():
                between.append((operator, transposed))
            case Sharded() if operator.mesh == first.mesh:
                return tuple(
                    dim
                    for dim in range(first.mesh.ndim)
                    if _stays(
                        first.owners(dim, rows=not leaf.transposed), between, operator.owners(dim, rows=transposed)
                    )
                )
            case _:
                return ()
    return ()


def _stays(written: Tensor | None, between: list[tuple[Diagonal | Gather, bool]], read: Tensor | None) -> bool:
    """Whether every row is read by the process that writes it.

    Args:
        written: The process that writes each row of a product; ``None`` if several write it.
        between: Gains and selections of rows behind it, each with whether its transpose multiplies.
        read: The process that reads each row in the end; ``None`` if all read it.
    """
    if written is None or read is None:
        return False
    for operator, transposed in between:
        if isinstance(operator, Gather):
            written = _added(written, operator) if transposed else written[operator.index.cpu()]
    return bool(((written == read) | (written == _NOBODY)).all())


def _added(written: Tensor, gather: Gather) -> Tensor:
    """Return who writes each row that rows are added up to: their common writer, if there is one."""
    index, n = gather.index.cpu(), gather.shape[1]
    low = torch.full((n,), torch.iinfo(torch.long).max, device="cpu").scatter_reduce(0, index, written, "amin")
    high = torch.full((n,), _NOBODY, device="cpu").scatter_reduce(0, index, written, "amax")
    return torch.where(high == _NOBODY, _NOBODY, torch.where(low == high, high, _SEVERAL))

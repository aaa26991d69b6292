"""The expected size of what enters a norm behind a branch: estimated once, then carried on.

A norm behind a matrix divides by the root mean square of Bx, which is ‖B‖_F/√m for x of independent entries and B with
m rows. :func:`~lightning_spectral.linalg.frobenius_norm` reads the weights of B ten times. Where they have moved little
since, one read is enough. With the same k vectors g of random signs then (B₀) and now (B),

    ‖B‖_F² = ‖B₀‖_F² + E[‖Bg‖² − ‖B₀g‖²],

where the mean has the standard deviation of k differences over √k, and the differences are as small as the change.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.linalg import LinearOperator, Stacked, frobenius_norm, frobenius_norm_is_cheap
from lightning_spectral.linalg.norms.precision import own_arithmetic
from lightning_spectral.linalg.operators import sum_dtype
from lightning_spectral.measuring.linearize import probes_of

__all__ = ["NormSize", "norm_sizes"]

# Vectors g: at this number of columns a product takes the least time per column.
_PROBES = 16
# Relative standard deviation of the size that carrying may add, before the size is estimated anew.
_CARRIED = 2.5e-3


@dataclass(frozen=True, slots=True)
class NormSize:
    """The size of one operator B, and what it is carried on from.

    Attributes:
        size: ‖B‖_F; NaN if a weight is not finite.
        deviation: Relative standard deviation of ``size``, 0 where it is exact.
        anchor: ‖B₀‖_F and its relative standard deviation, at the last full estimate.
        squares: ‖B₀g‖² for every g, empty where the size is never carried.
    """

    size: float
    deviation: float
    anchor: tuple[float, float]
    squares: tuple[float, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "anchor": list(self.anchor), "squares": list(self.squares)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> NormSize:
        """Rebuild what :meth:`state_dict` returned."""
        return cls(state["size"], state["deviation"], tuple(state["anchor"]), tuple(state["squares"]))


def norm_sizes(
    operators: Sequence[LinearOperator | None],
    subspaces: Sequence[Tensor | None],
    before: Sequence[NormSize | None],
    *,
    carry: bool = True,
) -> list[NormSize | None]:
    """Return the size of every operator, ``None`` for none.

    Args:
        operators: What stands right of a norm behind a branch.
        subspaces: Right singular vectors of each, ``(n, p)``, which make an estimate better; ``None`` if not known.
        before: The sizes at the last measurement.
        carry: Whether sizes may be carried on; else all are estimated.
    """
    squares = _squares(operators) if carry else [()] * len(operators)
    return [
        None if operator is None else _carried(old, new) or _estimated(operator, subspace, new)
        for operator, subspace, old, new in zip(operators, subspaces, before, squares, strict=True)
    ]


def _carried(before: NormSize | None, squares: tuple[float, ...]) -> NormSize | None:
    """Carry a size on, ``None`` where the change is too large for it."""
    if before is None or not squares or len(before.squares) != len(squares):
        return None
    changes = [new - old for new, old in zip(squares, before.squares, strict=True)]
    if not all(map(math.isfinite, changes)):
        return None
    size, known = before.anchor
    square = size**2 + mean(changes)
    if not 0 < square < math.inf:
        return None
    # ‖B‖_F = √square, whose relative deviation is half of that of the square.
    added = stdev(changes) / math.sqrt(len(squares)) / (2 * square)
    if added > _CARRIED:
        return None
    return NormSize(math.sqrt(square), known * size**2 / square + added, before.anchor, before.squares)


def _estimated(operator: LinearOperator, subspace: Tensor | None, squares: tuple[float, ...]) -> NormSize:
    """Estimate a size with all probes."""
    probes, worst = probes_of(operator)
    generator = torch.Generator().manual_seed(0)
    size = float(frobenius_norm(operator, generator=generator, n_probes=probes, subspace=subspace))
    deviation = 0.0
    if worst and subspace is not None and size:
        # Relative standard deviation of the estimate: at most 1 / √(2 · probes · r), r the stable rank.
        largest = float(torch.linalg.matrix_norm(operator.matmat(subspace), ord=2))
        deviation = largest / size / math.sqrt(2 * probes)
    # Between the fifth roots of the limits no product of a chain has overflowed or lost digits; see `frobenius_norm`.
    limits = torch.finfo(torch.float32)
    in_range = limits.tiny**0.2 < size < limits.max**0.2
    return NormSize(size, deviation, (size, deviation), squares if in_range else ())


def _squares(operators: Sequence[LinearOperator | None]) -> list[tuple[float, ...]]:
    """Return ‖Bg‖² for every vector g, read in a single transfer; nothing where all of ‖B‖_F is as cheap."""
    alike: dict[Hashable, dict[int, LinearOperator]] = {}
    for i, operator in enumerate(operators):
        if operator is not None and operator.shape[1] > 4 * _PROBES and not frobenius_norm_is_cheap(operator):
            alike.setdefault((operator.shape, operator.dtype, operator.device), {})[i] = operator
    found: dict[int, Tensor] = {}
    for group in alike.values():
        batch = Stacked(list(group.values()))
        generator = torch.Generator().manual_seed(1)
        signs = torch.randint(0, 2, (_PROBES, batch.shape[1]), generator=generator, device=generator.device)
        rows = (2 * signs - 1).to(batch.device, batch.dtype)
        with own_arithmetic(batch.device):
            images = batch.matmat(rows.expand(len(batch), -1, -1)).to(sum_dtype(batch.device))
            found.update(zip(group, batch.agreed(images.square().sum(2)), strict=True))
    if not found:
        return [()] * len(operators)
    device = next(iter(found.values())).device
    numbers = torch.stack([squares.to(device) for squares in found.values()]).tolist()
    rows_of = dict(zip(found, map(tuple, numbers), strict=True))
    return [rows_of.get(i, ()) for i in range(len(operators))]

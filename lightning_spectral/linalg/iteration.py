"""The adaptive loop: grow the Krylov subspaces of a batch, and stop each operator when its own error allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_spectral.linalg.krylov import BlockKrylov, Ritz

__all__ = ["Outcome", "iterate"]

# Far above its tolerance an operator is looked at every other step: solving the projected problem costs as much as
# multiplying by a small weight.
_FAR = 8.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where one operator stopped.

    Attributes:
        theta: The largest Ritz value, at most σ₁².
        error: What the caller's error function said.
        subspace: ``(n, count)``, right singular vectors, improved by one power step.
        steps: Products by AᵀA.
    """

    theta: float
    error: float
    subspace: Tensor
    steps: int


def iterate(
    krylov: BlockKrylov,
    error: Callable[[Ritz, Sequence[int]], Tensor],
    *,
    tolerance: float,
    max_steps: int,
    count: int,
) -> list[Outcome | None]:
    """Expand until every operator is below the tolerance or out of steps.

    Args:
        krylov: The subspaces before their first step.
        error: Maps the Ritz pairs of the operators that still run, and their positions in the batch, to ``(batch,)``.
        tolerance: At which an operator stops.
        max_steps: At which all stop. A subspace also stops before it fills its space.
        count: Singular vectors wanted.

    Returns:
        One outcome per operator; ``None`` where the arithmetic overflowed.
    """
    max_steps = min(max_steps, krylov.capacity)
    active = list(range(len(krylov.operators)))
    outcomes: list[Outcome | None] = [None] * len(active)
    due = 1
    while active:
        krylov.expand()
        if krylov.steps < min(due, max_steps):
            continue
        ritz = krylov.ritz()
        errors = error(ritz, active).tolist()
        stops = [
            krylov.steps == max_steps or not fine or e <= tolerance for fine, e in zip(ritz.finite, errors, strict=True)
        ]
        if any(stops):
            subspaces = krylov.dominant(ritz, count)
            for i in (i for i, stop in enumerate(stops) if stop and ritz.finite[i]):
                outcomes[active[i]] = Outcome(float(ritz.theta[i, -1]), errors[i], subspaces[i].mT, krylov.steps)
        going = [i for i, stop in enumerate(stops) if not stop]
        if going and len(going) < len(active):
            krylov = krylov.select(going)
        active = [active[i] for i in going]
        due = krylov.steps + (2 if min((errors[i] for i in going), default=0.0) > _FAR * tolerance else 1)
    return outcomes

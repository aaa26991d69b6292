"""The adaptive loop: grow the Krylov subspaces of a batch, and stop each operator when its own error allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_spectral.linalg.krylov import BlockKrylov, Ritz

__all__ = ["Outcome", "iterate"]

# Far from its end an operator is looked at every other step: solving the projected problem costs as much as
# multiplying by a small weight.
_FAR = 4.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where one operator stopped.

    Attributes:
        theta: The largest Ritz value, at most σ₁².
        bound: Relative, of √σ₁²/θ − 1 from above.
        subspace: ``(n, count)``, right singular vectors, improved by one power step.
        steps: Products by AᵀA.
    """

    theta: float
    bound: float
    subspace: Tensor
    steps: int


def iterate(
    krylov: BlockKrylov,
    judge: Callable[[Ritz, Sequence[int]], tuple[Tensor, Tensor]],
    *,
    max_steps: int,
    count: int,
) -> list[Outcome | None]:
    """Expand until every operator is good enough or out of steps.

    Args:
        krylov: The subspaces before their first step.
        judge: Maps the Ritz pairs of the operators that still run, and their positions in the batch, to what is left
            to do, ``(batch,)``, with 1 or less where an operator may stop, and to the relative bounds, ``(batch,)``.
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
        excess, bounds = (column.tolist() for column in judge(ritz, active))
        stops = [
            krylov.steps == max_steps or not fine or left <= 1 for fine, left in zip(ritz.finite, excess, strict=True)
        ]
        if any(stops):
            subspaces = krylov.dominant(ritz, count)
            for i in (i for i, stop in enumerate(stops) if stop and ritz.finite[i]):
                outcomes[active[i]] = Outcome(
                    float(ritz.theta[i, -1]), bounds[i], subspaces[i].clone().mT, krylov.steps
                )
        going = [i for i, stop in enumerate(stops) if not stop]
        if going and len(going) < len(active):
            krylov = krylov.select(going)
        active = [active[i] for i in going]
        due = krylov.steps + (2 if min((excess[i] for i in going), default=0.0) > _FAR else 1)
    return outcomes

"""The adaptive loop: grow the Krylov subspaces of a batch, and stop each operator when its own error allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.linalg.norms.krylov import BlockKrylov, Ritz

__all__ = ["Outcome", "iterate"]


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
    first: int,
    max_steps: int,
    count: int,
) -> list[Outcome | None]:
    """Expand until every operator is good enough or out of steps.

    Args:
        krylov: The subspaces before their first step.
        judge: Maps the Ritz pairs of the operators that still run, and their positions in the batch, to what is left
            to do, ``(batch,)``, with 1 or less where an operator may stop, and to the relative bounds, ``(batch,)``.
        first: Step at which to judge for the first time.
        max_steps: At which all stop. A subspace also stops before it fills its space.
        count: Singular vectors wanted.

    Returns:
        One outcome per operator; ``None`` where the arithmetic overflowed.
    """
    max_steps = min(max_steps, krylov.capacity)
    active = list(range(len(krylov.operators)))
    outcomes: list[Outcome | None] = [None] * len(active)
    paces = [_Pace(due=first) for _ in active]
    while active:
        krylov.expand()
        judged = [j for j, i in enumerate(active) if krylov.steps >= min(paces[i].due, max_steps)]
        if not judged:
            continue
        part = krylov if len(judged) == len(active) else krylov.select(judged)
        ritz = part.ritz()
        positions = [active[j] for j in judged]
        judged_by = torch.stack([*judge(ritz, positions), ritz.theta[:, -1], ritz.finite.double()])
        excess, bounds, theta, finite = part.operators.agreed(judged_by.mT).mT.tolist()
        stopped = [j for j, left in enumerate(excess) if krylov.steps == max_steps or left <= 1 or not finite[j]]
        if stopped:
            subspaces = part.dominant(ritz, count)
            for j in (j for j in stopped if finite[j]):
                outcomes[positions[j]] = Outcome(theta[j], bounds[j], subspaces[j].clone().mT, krylov.steps)
        for i, left in zip(positions, excess, strict=True):
            paces[i] = paces[i].after(krylov.steps, left)
        gone = {positions[j] for j in stopped}
        going = [j for j, i in enumerate(active) if i not in gone]
        if gone and going:
            krylov = krylov.select(going)
        active = [active[j] for j in going]
    return outcomes


@dataclass(frozen=True, slots=True)
class _Pace:
    """When to judge an operator again: judging costs as much as multiplying by a small weight.

    Each operator keeps its own pace, so that its result does not depend on its neighbours.

    Attributes:
        due: The step of the next judgement.
        seen: The step of the last one, and
        excess: what was left to do then; before the first, what is typical of the first step.
    """

    due: int
    seen: int = 1
    excess: float = 60.0

    def after(self, step: int, excess: float) -> _Pace:
        """Return the pace after a judgement.

        What is left to do falls by a factor that itself falls from step to step on hard spectra, so the last factor
        names a step before which nothing will be found.
        """
        if not 1 < excess < math.inf:
            return _Pace(step + 1, step, self.excess)
        rate = max((self.excess / excess) ** (1 / max(step - self.seen, 1)), 1.5)
        return _Pace(step + min(math.ceil(math.log(excess) / math.log(rate)), 3), step, excess)

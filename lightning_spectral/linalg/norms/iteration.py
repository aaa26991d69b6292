"""The adaptive loop: grow the Krylov subspaces of a batch, and stop each operator as soon as its own error is small."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.linalg.norms.asking import Asking
from lightning_spectral.linalg.norms.krylov import BlockKrylov, Ritz

__all__ = ["Outcome", "iterate"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for one operator.

    Attributes:
        theta: The largest Ritz value θ, at most σ₁².
        bound: An upper bound of √(σ₁²/θ) − 1, the relative error of √θ.
        subspace: ``(n, count)``, right singular vectors, improved by one power step.
        steps: Products by AᵀA.
    """

    theta: float
    bound: float
    subspace: Tensor
    steps: int


def iterate(
    krylov: BlockKrylov,
    projected: Tensor,
    judge: Callable[[Ritz, Sequence[int]], tuple[Tensor, Tensor]],
    *,
    max_steps: int,
    count: int,
) -> Asking[list[Outcome | None]]:
    """Expand until every operator is good enough or out of steps.

    Args:
        krylov: The subspaces after their first steps.
        projected: Their projected problems, on the CPU.
        judge: Maps Ritz pairs and the positions of their operators in the batch to the excess and the relative bound,
            ``(batch,)`` each. The excess is the error divided by the allowed error: an operator stops at 1 or less.
        max_steps: Step at which all operators stop. A subspace also stops before it fills the whole space.
        count: Singular vectors wanted.

    Returns:
        One outcome per operator; ``None`` where the arithmetic overflowed.
    """
    max_steps = min(max_steps, krylov.capacity)
    outcomes: list[Outcome | None] = [None] * len(krylov.operators)
    # i counts the operators of the batch, j the operators that still run.
    active = judged = list(range(len(outcomes)))
    paces = [_Pace(krylov.steps) for _ in active]
    part = krylov
    while True:
        ritz = Ritz.of(projected)
        positions = [active[j] for j in judged]
        # Every process decides from the numbers of the first one (see `sharded`).
        judged_by = torch.stack([*judge(ritz, positions), ritz.theta[:, -1], ritz.finite.double()])
        excess, bounds, theta, finite = part.operators.agreed(judged_by.mT).mT.tolist()
        stopped = [j for j, left in enumerate(excess) if krylov.steps >= max_steps or left <= 1 or not finite[j]]
        if stopped:
            subspaces = part.dominant(ritz, count)
            for j in (j for j in stopped if finite[j]):
                outcomes[positions[j]] = Outcome(theta[j], bounds[j], subspaces[j].clone().mT, krylov.steps)
        for i, left in zip(positions, excess, strict=True):
            paces[i] = paces[i].after(krylov.steps, left)
        gone = {positions[j] for j in stopped}
        going = [j for j, i in enumerate(active) if i not in gone]
        if not going:
            return outcomes
        krylov = krylov.select(going)
        active = [active[j] for j in going]
        while krylov.steps < min(max_steps, *(paces[i].due for i in active)):
            krylov.expand()
        judged = [j for j, i in enumerate(active) if krylov.steps >= min(paces[i].due, max_steps)]
        part = krylov.select(judged)
        (projected,) = yield [part.projected()]


@dataclass(frozen=True, slots=True)
class _Pace:
    """When to judge an operator again. A judgement costs as much as a product with a small weight.

    Each operator has its own pace, so that its result does not depend on the other operators of the batch.

    Attributes:
        due: The step of the next judgement.
        seen: The step of the last judgement.
        excess: The excess at that step. Before the first judgement, a value typical of step 1.
    """

    due: int
    seen: int = 1
    excess: float = 60.0

    def after(self, step: int, excess: float) -> _Pace:
        """Return the pace after a judgement.

        The excess falls by a factor r per step. On hard spectra r itself falls from step to step. So if r stays as it
        was, the excess reaches 1 after ln(excess) / ln(r) steps, and in truth not earlier.
        """
        if not 1 < excess < math.inf:
            return _Pace(step + 1, step, self.excess)
        rate = max((self.excess / excess) ** (1 / max(step - self.seen, 1)), 1.5)
        return _Pace(step + min(math.ceil(math.log(excess) / math.log(rate)), 3), step, excess)

"""Batched randomized SVD: adaptive, warm-started, with an error bound for every value."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.norms.asking import Asking, answered, sent
from lightning_spectral.linalg.norms.certificate import grams, normal_quantile, spectral_norms, upper_bound
from lightning_spectral.linalg.norms.exact import largest_singular
from lightning_spectral.linalg.norms.iteration import Outcome, iterate
from lightning_spectral.linalg.norms.krylov import BlockKrylov, Ritz
from lightning_spectral.linalg.norms.orthonormal import orthonormalized
from lightning_spectral.linalg.norms.precision import own_arithmetic
from lightning_spectral.linalg.norms.solution import (
    OUT_OF_RANGE,
    Memory,
    SolverState,
    SpectralNorm,
    random_rows,
)
from lightning_spectral.linalg.operators import LinearOperator
from lightning_spectral.linalg.sharding.sharded import balanced
from lightning_spectral.linalg.sharding.stacked import Stacked
from lightning_spectral.records.measurements import NOT_FINITE

__all__ = ["RandomizedSVD"]

# Operators solved side by side: enough to share small dense steps, few enough to keep the memory of their bases small.
_BATCH = 8
# Batches that share one transfer to the CPU, where transfers cost something: enough for 64 blocks of two branches.
_BATCHES = 16
# Up to this dimension a dense factorization is as cheap as iterating.
_DENSE = 32
# Products by AᵀA of a warm start at most. Each of them reads every weight twice.
_WARM_STEPS = 3
# Products by AᵀA before a certificate is looked at for the first time: one never suffices.
_FIRST = 2
# A carried bound may grow to 2.5 times ``max_bound`` before the operator is certified again. With less slack, weights
# that move quickly would need a new certificate at every measurement.
_SLACK = 2.5

Solved = tuple[SpectralNorm, Memory | None]


@dataclass(frozen=True, slots=True)
class RandomizedSVD:
    """Spectral norms by randomized block Krylov iteration, warm-started, with a bound for every value.

    *Cold.* The range finder of Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 53, 2011),
    Algorithm 4.4, starts from a Gaussian test matrix X of ``n_components + n_oversamples`` columns. All blocks are kept
    as in Musco and Musco (see :class:`~lightning_spectral.linalg.norms.krylov.BlockKrylov`). Random weights have a
    spectrum without a gap; there the Krylov subspace needs 5 products, and subspace iteration dozens. Each operator is
    iterated until its estimated error falls below ``tolerance`` and its bound below ``max_bound``.

    *Warm.* The state holds ``n_components`` right singular vectors V of every operator. They are iterated until the
    second-order estimate of their error falls below ``warm_tolerance``: one or two products on slowly changing weights.
    The bound is carried over. σ₁ has grown at most by the norm of the change of the operator, and the images of the old
    probes under the new operator bound that norm. If the carried bound exceeds 2.5 times ``max_bound``, the operator is
    certified again, from [V X].

    *The bound.* The value is a Rayleigh value, always below σ₁, up to rounding. The ``error_bound`` β says
    σ₁ ≤ (1 + β) · value. After a cold start this fails with a probability below ``failure_probability`` over the choice
    of ``seed``, for every operator (see :mod:`~lightning_spectral.linalg.norms.certificate`). After warm starts the
    probability at most doubles, provided that the operators do not depend on the seed.

    Attributes:
        n_components: Right singular vectors kept in the state.
        n_oversamples: Random columns beside them. Fewer columns give a weaker bound at equal cost.
        tolerance: Relative estimated error at which a cold operator stops.
        max_bound: Relative bound at which a cold operator stops. The bound is 3 to 1000 times as large as the error, so
            it may exceed the tolerance. With the defaults, the largest error in 1500 random matrices of five kinds of
            flat and decaying spectra was 0.9 %.
        warm_tolerance: Relative estimated error at which a warm operator stops.
        max_iter: Largest number of products by AᵀA per operator. There the value is returned with the bound so far.
        failure_probability: Probability that the bound fails, see above.
        seed: Seed of the probes. The global random state is never touched.

    Raises:
        ConfigurationError: If an attribute is out of its range.

    Example:
        >>> measure(model, solver=RandomizedSVD(max_bound=0.01)).layers[0].error_bound < 0.01
        True
    """

    n_components: int = 6
    n_oversamples: int = 8
    tolerance: float = 1e-2
    max_bound: float = 0.04
    warm_tolerance: float = 1e-3
    max_iter: int = 30
    failure_probability: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the attributes."""
        for name in ("n_components", "n_oversamples", "max_iter"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        for name in ("tolerance", "max_bound", "warm_tolerance", "failure_probability"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}.")

    def init(self, operators: Sequence[LinearOperator]) -> SolverState:
        """Return the state before the first measurement: the seed alone."""
        return SolverState(self.seed, (None,) * len(operators))

    def compute(
        self, operators: Sequence[LinearOperator], state: SolverState
    ) -> tuple[tuple[SpectralNorm, ...], SolverState]:
        """Measure every operator.

        Args:
            operators: In the order of the state.
            state: From :meth:`init` or the last call. A memory whose shapes do not fit its operator is ignored.

        Returns:
            The norms, in the order of the operators, and the state for the next call.
        """
        old = state.memories if len(state.memories) == len(operators) else (None,) * len(operators)
        memories = [self._fitting(operator, memory) for operator, memory in zip(operators, old, strict=True)]
        norms: list[SpectralNorm] = [SpectralNorm(None, None)] * len(operators)
        for group in _side_by_side(operators, memories):
            device = operators[group[0][0]].device
            with own_arithmetic(device):
                batches = []
                for indices in group:
                    warm = [memory for i in indices if (memory := memories[i])]
                    batch = Stacked([operators[i] for i in indices])
                    batches.append(_Batch(self, state.seed, batch, warm, keeps_images=state.keeps_images))
                results = answered([batch.solve() for batch in batches])
            for indices, solved in zip(group, results, strict=True):
                for i, (norm, memory) in zip(indices, solved, strict=True):
                    norms[i], memories[i] = norm, memory
        return tuple(norms), SolverState(state.seed, tuple(memories))

    def _fitting(self, operator: LinearOperator, memory: Memory | None) -> Memory | None:
        """Return a memory on the device and in the dtype of its operator, ``None`` if its shapes do not fit."""
        m, n = operator.shape
        shapes = ((n, self.n_components), (self.n_oversamples, m))
        if memory is None or (tuple(memory.subspace.shape), tuple(memory.images.shape)) != shapes:
            return None
        subspace, images = (x.to(operator.device, operator.dtype) for x in (memory.subspace, memory.images))
        return Memory(subspace, images, memory.upper, memory.exponent)


def _chosen(rows: Tensor, indices: Sequence[int]) -> Tensor:
    """Return the blocks at the given positions, without a copy if these are all."""
    return rows if len(indices) == len(rows) else rows[indices]


def _side_by_side(operators: Sequence[LinearOperator], memories: Sequence[Memory | None]) -> Iterator[list[list[int]]]:
    """Group operators into batches of one shape, and batches of one kind of device into those that share transfers.

    On the CPU nothing is transferred, and each batch goes by itself: less memory, and it stays in the cache.
    """
    shapes: dict[Hashable, list[int]] = {}
    for i, (operator, memory) in enumerate(zip(operators, memories, strict=True)):
        kind = (operator.shape, operator.dtype, operator.device, memory is None)
        shapes.setdefault(kind, []).append(i)
    devices: dict[str, list[list[int]]] = {}
    for shape in shapes.values():
        batches = [shape[first : first + _BATCH] for first in range(0, len(shape), _BATCH)]
        devices.setdefault(operators[shape[0]].device.type, []).extend(batches)
    for device, batches in devices.items():
        size = 1 if device == "cpu" else _BATCHES
        yield from (batches[first : first + size] for first in range(0, len(batches), size))


@dataclass(frozen=True, slots=True)
class _Batch:
    """One measurement of same-shape operators, all with a memory or all without.

    Attributes:
        solver: The hyper-parameters.
        seed: Seed of the probes.
        operators: The batch.
        memories: One per operator; empty for a cold start.
        exponent: The exponent of the power of two that was taken out; ``None`` if the operators are not balanced.
        keeps_images: Whether the memories shall keep the images of the probes.
    """

    solver: RandomizedSVD
    seed: int
    operators: Stacked
    memories: list[Memory]
    exponent: int | None = None
    keeps_images: bool = False

    def solve(self) -> Asking[list[Solved]]:
        """Solve all operators: together, but one by one where the arithmetic leaves the range of the dtype."""
        columns = self.solver.n_components + self.solver.n_oversamples
        if min(self.operators.shape) <= max(_DENSE, 2 * columns):
            n, s = self.operators.shape[1], self.solver.n_oversamples
            X = random_rows(self.seed, s, n) if self.keeps_images else None
            return [largest_singular(operator, self.solver.n_components, X) for operator in self.operators.operators]
        start = self._start()
        images = self.operators.matmat(start)
        measured = yield from (self._warm(start, images) if self.memories else self._cold(start, images))
        solved: list[Solved] = []
        for i, result in enumerate(measured):
            result = self._with_images(result, images[i])
            solved.append((yield from self._rescue(i, images[i])) if result is None else result)
        return solved

    def _random(self, count: int, seed: int) -> Tensor:
        """Return ``(count, n)`` standard normal numbers on the device."""
        like = torch.empty(0, dtype=self.operators.dtype, device=self.operators.device)
        return sent(random_rows(seed, count, self.operators.shape[1]), like)

    def _start(self) -> Tensor:
        """Return the blocks [V X] as rows, ``(batch, p + s, n)``; for a cold start all of them are random."""
        p, s = self.solver.n_components, self.solver.n_oversamples
        # One X for all operators of a width. Each bound holds by itself, and the result of an operator does not depend
        # on the rest of its batch.
        rows = self._random(p + s, self.seed).expand(len(self.operators), -1, -1)
        if not self.memories:
            return rows
        return torch.cat([torch.stack([memory.subspace.mT for memory in self.memories]), rows[:, :s]], dim=1)

    def _with_images(self, solved: Solved | None, images: Tensor) -> Solved | None:
        """Keep the images of the first s rows of X, which are multiplied in every measurement, cold or warm."""
        if not self.keeps_images or solved is None:
            return solved
        norm, memory = solved
        if memory is None:
            return solved
        first = self.solver.n_components if self.memories else 0
        latest = images[first : first + self.solver.n_oversamples]
        # An operator that was solved densely in the end has been balanced for it.
        return norm, replace(memory, latest=latest * 2.0 ** ((self.exponent or 0) - memory.exponent))

    def _rescue(self, i: int, images: Tensor) -> Asking[Solved]:
        """Take the power of two out of one operator and solve it again."""
        if self.exponent is not None:  # balanced, and still out of range
            zero = not images.any()
            return (SpectralNorm(0.0, 0.0) if zero else SpectralNorm(None, None, OUT_OF_RANGE)), None
        scaled = balanced(self.operators.operators[i])
        if scaled is None:
            return SpectralNorm(None, None, NOT_FINITE), None
        single = replace(self, operators=Stacked([scaled[0]]), memories=self.memories[i : i + 1], exponent=scaled[1])
        return (yield from single.solve())[0]

    def _select(self, indices: Sequence[int]) -> _Batch:
        memories = [self.memories[i] for i in indices] if self.memories else []
        return replace(self, operators=self.operators.select(indices), memories=memories)

    def _in_range(self, size: float) -> bool:
        """Whether products by AᵀA neither overflow nor underflow, for images with this largest entry."""
        limits = torch.finfo(self.operators.dtype)
        low, high = (limits.tiny**0.4, limits.max**0.4) if self.exponent is None else (0.0, limits.max)
        return low < size < high

    def _cold(self, start: Tensor, images: Tensor) -> Asking[list[Solved | None]]:
        """Certify the operators whose products stay in the range of the dtype."""
        krylov, R = self._certifying(start[:1], self.operators.adjoint(images))
        sizes, R, projected = yield [images.abs().amax((1, 2)), R, krylov.projected()]
        healthy = [i for i, size in enumerate(self.operators.agreed(sizes).tolist()) if self._in_range(size)]
        solved: list[Solved | None] = [None] * len(self.operators)
        if healthy:
            part = self._select(healthy)
            results = yield from part._certified(
                krylov.select(healthy), R, projected[healthy], _chosen(images, healthy)
            )
            for i, result in zip(healthy, results, strict=True):
                solved[i] = result
        return solved

    def _warm(self, start: Tensor, images: Tensor) -> Asking[list[Solved | None]]:
        """Refine the operators whose carried bound is tight enough, certify the others."""
        p = self.solver.n_components
        products = self.operators.adjoint(images[:, :p])
        krylov = BlockKrylov(self.operators, start[:, :p], products, self._random(p, self.seed + 1))
        old = torch.stack([memory.images for memory in self.memories])
        changes, present, sizes, projected = yield [
            grams(images[:, p:] - old),
            grams(images[:, :p]),
            images.abs().amax((1, 2)),
            krylov.projected(),
        ]
        seen = torch.stack([sizes, self._ceilings(changes), spectral_norms(present)])
        sizes, ceilings, values = self.operators.agreed(seen.mT).mT.tolist()
        slack = 1 + _SLACK * self.solver.max_bound
        healthy = [i for i, size in enumerate(sizes) if self._in_range(size)]
        keep = [i for i in healthy if ceilings[i] <= slack * values[i]]
        drop = [i for i in healthy if i not in keep]
        solved: list[Solved | None] = [None] * len(self.operators)
        if keep:
            part = self._select(keep)
            results = yield from part._refined(krylov.select(keep), projected[keep], [ceilings[i] for i in keep])
            for i, result in zip(keep, results, strict=True):
                solved[i] = result
        if drop:
            part = self._select(drop)
            # AᵀAV is known by now.
            rest = part.operators.adjoint(images[drop, p:])
            krylov, R = part._certifying(start[drop], torch.cat([products[drop], rest], dim=1))
            R, projected = yield [R, krylov.projected()]
            results = yield from part._certified(krylov, R, projected, images[drop])
            for i, result in zip(drop, results, strict=True):
                solved[i] = result
        return solved

    def _ceilings(self, changes: Tensor) -> Tensor:
        """Return the carried upper bounds of ‖A‖₂: the certified bound plus a bound of the change since then."""
        delta = normal_quantile(self.solver.n_oversamples, self.solver.failure_probability)
        known = [memory.upper if memory.exponent == (self.exponent or 0) else math.inf for memory in self.memories]
        return changes.new_tensor(known) + spectral_norms(changes) / delta

    def _refined(
        self, krylov: BlockKrylov, projected: Tensor, ceilings: Sequence[float]
    ) -> Asking[list[Solved | None]]:
        """Iterate V alone until its estimated error is small. The bound is carried over."""
        outcomes = yield from iterate(
            krylov,
            projected,
            lambda ritz, _: (ritz.leak() / self.solver.warm_tolerance, ritz.leak()),
            max_steps=_WARM_STEPS,
            count=self.solver.n_components,
        )
        return [
            None if outcome is None else self._solved(outcome, ceiling, memory)
            for outcome, ceiling, memory in zip(outcomes, ceilings, self.memories, strict=True)
        ]

    def _certifying(self, start: Tensor, products: Tensor) -> tuple[BlockKrylov, Tensor]:
        """Return the subspaces of [V X] after the first steps, and R of the start.

        Args:
            start: ``(batch, p + s, n)``, or one block for all operators.
            products: ``(batch, p + s, n)``, those of the start by AᵀA.
        """
        Q, L = orthonormalized(start)
        # AᵀAQ = AᵀA[V X]R⁻¹ costs no product. R is well conditioned, because X is random and V orthonormal.
        products = torch.linalg.solve_triangular(L.expand(len(products), -1, -1), products, upper=False)
        noise = self._random(start.shape[1], self.seed + 1)
        krylov = BlockKrylov(self.operators, Q.expand(len(products), -1, -1), products, noise)
        while krylov.steps < min(_FIRST, self.solver.max_iter, krylov.capacity):
            krylov.expand()
        return krylov, L.mT

    def _certified(
        self, krylov: BlockKrylov, R: Tensor, projected: Tensor, images: Tensor
    ) -> Asking[list[Solved | None]]:
        """Iterate [V X] until the bound that X certifies is small."""
        columns, s = R.shape[1], self.solver.n_oversamples
        random = s if self.memories else columns
        delta = normal_quantile(random, self.solver.failure_probability)
        R_X = R[:, :, -random:].mT.expand(len(images), -1, -1)

        def judge(ritz: Ritz, active: Sequence[int]) -> tuple[Tensor, Tensor]:
            above = upper_bound(ritz.theta, R_X[active] @ ritz.vectors[:, :columns], ritz.coupling, delta)
            bound = (above / ritz.theta[:, -1]).sqrt() - 1
            return torch.maximum(bound / self.solver.max_bound, ritz.leak() / self.solver.tolerance), bound

        outcomes = yield from iterate(
            krylov, projected, judge, max_steps=self.solver.max_iter, count=self.solver.n_components
        )
        # The present images of the s probes anchor the bounds that are carried from here on.
        probes = images[:, columns - random :][:, :s]
        solved: list[Solved | None] = []
        for i, outcome in enumerate(outcomes):
            if outcome is None:
                solved.append(None)
            elif outcome.bound > self.solver.max_bound and outcome.steps == krylov.capacity:
                solved.append(largest_singular(self.operators.operators[i], self.solver.n_components))
            else:
                ceiling = math.sqrt(outcome.theta) * (1 + outcome.bound)
                anchor = Memory(outcome.subspace, probes[i].clone(), ceiling, self.exponent or 0)
                solved.append(self._solved(outcome, ceiling, anchor))
        return solved

    def _solved(self, outcome: Outcome, ceiling: float, anchor: Memory) -> Solved:
        """Return the norm, and the memory: new singular vectors beside the last certificate, ``anchor``."""
        value, exponent = math.sqrt(outcome.theta), self.exponent or 0
        # Rounding errors of long sums grow like the square root of their length.
        rounding = 8 * torch.finfo(self.operators.dtype).eps * math.sqrt(max(self.operators.shape))
        bound = max(ceiling / value - 1, 0.0) + rounding
        memory = Memory(outcome.subspace, anchor.images, anchor.upper, exponent)
        try:
            return SpectralNorm(math.ldexp(value, exponent), bound, None, outcome.steps), memory
        except OverflowError:
            return SpectralNorm(None, None, OUT_OF_RANGE), None

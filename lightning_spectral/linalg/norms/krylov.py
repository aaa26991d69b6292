"""Block Krylov subspaces of AᵀA for a batch of operators, and their Ritz values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.linalg.sharding.stacked import Stacked

__all__ = ["BlockKrylov", "Ritz"]


@dataclass(frozen=True, slots=True)
class Ritz:
    """The eigenpairs of T = QᵀAᵀAQ, on the CPU in float64: matrices this small cost more to launch than to solve.

    Attributes:
        theta: ``(batch, k)``, Ritz values, ascending.
        vectors: ``(batch, k, k)``, eigenvectors of T as columns.
        coupling: ``(batch, b, k)``: Ritz vector i leaves the subspace by Q_{q+1} · coupling[:, i].
        finite: ``(batch,)``, one flag per operator; the other fields hold zeros where the arithmetic overflowed.
    """

    theta: Tensor
    vectors: Tensor
    coupling: Tensor
    finite: Tensor

    def leak(self) -> Tensor:
        """Return the relative error of √θ₁ to second order, ``(batch,)``.

        The residual r of the first Ritz vector moves its value by about r²/gap, where the gap reaches to the smallest
        Ritz value of the first block, the nearest one that the subspace can no longer tell from what it has not seen.
        """
        first = self.theta[:, -1].clamp_min(torch.finfo(self.theta.dtype).tiny)
        residual = torch.linalg.vector_norm(self.coupling[:, :, -1], dim=1) / first
        rank = min(self.coupling.shape[1], self.theta.shape[1])
        gap = (1 - self.theta[:, -rank] / first).clamp_min(torch.finfo(self.theta.dtype).eps)
        return 0.5 * torch.minimum(residual, residual.square() / gap)


class BlockKrylov:
    """The block Krylov subspace span{S, AᵀAS, …, (AᵀA)^{q−1}S} of every operator of a batch, grown block by block.

    Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition"
    (2015), Algorithm 2, with an orthonormal basis kept as in the block Lanczos method: fully reorthogonalized, twice,
    which makes T = QᵀAᵀAQ the projection in fact and not only in exact arithmetic.

    Args:
        operators: The batch.
        block: ``(batch, b, n)``, orthonormal rows, the transposed first block.
        images: ``(batch, b, m)``, its images under the operators, which the caller has already paid for.
    """

    def __init__(self, operators: Stacked, block: Tensor, images: Tensor) -> None:
        self.operators = operators
        self.basis = block  # all finished blocks, (batch, k, n)
        self._next = block  # the block that expand multiplies
        self._images: Tensor | None = images
        self._columns: list[Tensor] = []  # of T: (batch, b, k) each
        self._coupling = block.new_zeros(0)  # the last R, (batch, b, b)

    @property
    def steps(self) -> int:
        """Multiplications by AᵀA so far."""
        return len(self._columns)

    @property
    def capacity(self) -> int:
        """Steps after which the next block would no longer fit into the space."""
        return max(1, min(self.operators.shape) // self._next.shape[1] - 1)

    def expand(self) -> None:
        """Multiply the newest block by AᵀA, project it onto the basis, orthonormalize the rest into the next block."""
        if self._images is None:
            self.basis = torch.cat([self.basis, self._next], dim=1)
            Z = self.operators.normal(self._next)
        else:
            Z = self.operators.adjoint(self._images)
            self._images = None
        column = Z @ self.basis.mT
        Q, R = torch.linalg.qr(torch.baddbmm(Z, column, self.basis, alpha=-1).mT)
        # Twice is enough: what is left after one projection may be little more than its rounding error.
        again = Q.mT @ self.basis.mT
        Q, R2 = torch.linalg.qr(torch.baddbmm(Q.mT, again, self.basis, alpha=-1).mT)
        self._columns.append(column + R.mT @ again)
        self._coupling = R2 @ R
        self._next = Q.mT.contiguous()

    def ritz(self) -> Ritz:
        """Solve the projected problem. One transfer to the CPU."""
        batch, b, k = self._columns[-1].shape
        T = self.basis.new_zeros(batch, k, k)
        for i, column in enumerate(self._columns):
            T[:, i * b : (i + 1) * b, : column.shape[2]] = column  # the lower triangle is all that eigh reads
        parts = torch.cat([T, torch.nn.functional.pad(self._coupling, (0, k - b))], dim=1).cpu().double()
        finite = parts.isfinite().all(2).all(1)
        parts = torch.where(finite[:, None, None], parts, parts.new_zeros(()))
        theta, vectors = torch.linalg.eigh(parts[:, :k])
        return Ritz(theta, vectors, parts[:, k:, :b] @ vectors[:, -b:], finite)

    def dominant(self, ritz: Ritz, count: int) -> Tensor:
        """Return the first Ritz vectors, improved by the power step that is already known.

        AᵀA times a Ritz vector is its Ritz value times itself plus its coupling to the next block: no weight is read.

        Args:
            ritz: What :meth:`ritz` returned for the present basis.
            count: Vectors wanted; fewer if the basis is smaller.

        Returns:
            ``(batch, count, n)``, orthonormal rows, the dominant one first.
        """
        first = ritz.theta[:, -1:].clamp_min(torch.finfo(ritz.theta.dtype).tiny)
        inside = (ritz.vectors * (ritz.theta / first).unsqueeze(1))[:, :, -count:].flip(2).to(self.basis)
        outside = (ritz.coupling / first.unsqueeze(2))[:, :, -count:].flip(2).to(self.basis)
        vectors: Tensor = torch.linalg.qr((inside.mT @ self.basis + outside.mT @ self._next).mT).Q
        return vectors.mT

    def select(self, indices: Sequence[int]) -> BlockKrylov:
        """Return the subspaces of the operators at the given positions."""
        chosen = torch.tensor(indices, device=self.basis.device)
        part = BlockKrylov(self.operators.select(indices), self.basis[chosen], self.basis)
        part._images = None
        part._next = self._next[chosen]
        part._columns = [column[chosen] for column in self._columns]
        part._coupling = self._coupling[chosen]
        return part

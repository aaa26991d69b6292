"""Block Krylov subspaces of AᵀA for a batch of operators, and their Ritz values.

After q steps of block Lanczos, with blocks Q₁ … Q_q of b columns each and Q = [Q₁ … Q_q]:

    AᵀA Q = Q T + Q_{q+1} B E_qᵀ

    T = ┌ T₁₁  R₂ᵀ          ┐          T = QᵀAᵀAQ is block tridiagonal in exact arithmetic.
        │ R₂   T₂₂  R₃ᵀ     │          B couples the last block to Q_{q+1}, the next one.
        │      R₃   T₃₃  …  │          E_q selects the last b columns.
        └           …    …  ┘

For an eigenpair T s = θ s, the Ritz vector Q s has the residual AᵀA Q s − θ Q s = Q_{q+1} (B E_qᵀ s). So the last b
entries of s tell how far a Ritz vector is from an eigenvector, without another product.

All blocks are stored transposed, as rows: Q is ``(batch, k, n)`` with k = q · b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.linalg.sharding.stacked import Stacked

__all__ = ["BlockKrylov", "Ritz"]


@dataclass(frozen=True, slots=True)
class Ritz:
    """The eigenpairs (θᵢ, sᵢ) of T, on the CPU in float64: launching kernels for such small matrices costs more.

    Attributes:
        theta: ``(batch, k)``, Ritz values θᵢ, ascending.
        vectors: ``(batch, k, k)``, eigenvectors sᵢ as columns.
        coupling: ``(batch, b, k)``, columns B E_qᵀ sᵢ: the residual of Ritz vector i is Q_{q+1} · coupling[:, i].
        finite: ``(batch,)``, one flag per operator. Where the arithmetic overflowed, the other fields hold zeros.
    """

    theta: Tensor
    vectors: Tensor
    coupling: Tensor
    finite: Tensor

    def leak(self) -> Tensor:
        """Return an estimate of the relative error of √θ₁, to second order, ``(batch,)``.

        With the residual r of the first Ritz vector, σ₁² − θ₁ is about min(r, r² / gap). The gap is the distance from
        θ₁ to the b-th largest Ritz value: a block of b columns approximates the b largest eigenvalues, and cannot tell
        smaller ones from unseen ones. The relative error of √θ₁ is half of the relative error of θ₁.
        """
        first = self.theta[:, -1].clamp_min(torch.finfo(self.theta.dtype).tiny)
        residual = torch.linalg.vector_norm(self.coupling[:, :, -1], dim=1) / first
        rank = min(self.coupling.shape[1], self.theta.shape[1])
        gap = (1 - self.theta[:, -rank] / first).clamp_min(torch.finfo(self.theta.dtype).eps)
        return 0.5 * torch.minimum(residual, residual.square() / gap)


class BlockKrylov:
    """The block Krylov subspace span{S, AᵀAS, …, (AᵀA)^{q−1}S} of every operator of a batch, grown block by block.

    Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition"
    (2015), Algorithm 2. The basis is kept orthonormal as in the block Lanczos method, and is fully reorthogonalized,
    twice: only then is the computed T the projection QᵀAᵀAQ despite rounding errors.

    Args:
        operators: The batch.
        block: ``(batch, b, n)``, orthonormal rows, the transposed first block.
        images: ``(batch, b, m)``, the images of the rows under the operators, so that they are not computed twice.
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
        # The first step is cheaper: the caller has the images A Q₁, so AᵀA Q₁ takes one product instead of two.
        if self._images is None:
            self.basis = torch.cat([self.basis, self._next], dim=1)
            Z = self.operators.normal(self._next)
        else:
            Z = self.operators.adjoint(self._images)
            self._images = None
        column = Z @ self.basis.mT
        Q, R = torch.linalg.qr(torch.baddbmm(Z, column, self.basis, alpha=-1).mT)
        # The rest after one projection may be little more than its rounding error, and then not orthogonal to the
        # basis. Two projections are enough ("twice is enough", Kahan and Parlett).
        again = Q.mT @ self.basis.mT
        Q, R2 = torch.linalg.qr(torch.baddbmm(Q.mT, again, self.basis, alpha=-1).mT)
        # Z = basis · column + Q·R of the first pass, and that Q = basis · again + Q·R2 of the second pass.
        self._columns.append(column + R.mT @ again)
        self._coupling = R2 @ R
        self._next = Q.mT.contiguous()

    def ritz(self) -> Ritz:
        """Solve the projected problem, with one transfer to the CPU."""
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
        """Return the first Ritz vectors, improved by one power step that reads no weight.

        AᵀA Q s = θ Q s + Q_{q+1} B E_qᵀ s, and all terms on the right are known.

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

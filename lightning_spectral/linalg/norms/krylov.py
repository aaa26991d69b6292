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
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.linalg.norms.asking import sent
from lightning_spectral.linalg.norms.orthonormal import factored, orthonormalized
from lightning_spectral.linalg.sharding.stacked import Stacked

__all__ = ["BlockKrylov", "Ritz"]


# Noise that is added to a block, relative to its largest entry. It stands out of the rounding errors of float32, most
# of which lie in the basis and are no new directions. Its square stands out of those of the Gram matrix in float64.
_NOISE = {torch.float32: 2.0**-20, torch.float64: 2.0**-24}
# Ritz values below are zero, relative to the largest one.
_ZERO = 2.0**-20


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

    @classmethod
    def of(cls, projected: Tensor) -> Ritz:
        """Solve the projected problems.

        Args:
            projected: ``(batch, k + b, k)``, what :meth:`BlockKrylov.projected` returned, on the CPU in float64.
        """
        k = projected.shape[2]
        b = projected.shape[1] - k
        finite = projected.isfinite().all(2).all(1)
        projected = torch.where(finite[:, None, None], projected, projected.new_zeros(()))
        theta, vectors = torch.linalg.eigh(projected[:, :k])
        return cls(theta, vectors, projected[:, k:, :b] @ vectors[:, -b:], finite)

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
        products: ``(batch, b, n)``, the products of the rows by AᵀA.
        noise: ``(b, n)``, standard normal numbers. A block whose rows depend on each other, as where the rank of A is
            smaller than b, is filled up from them; other blocks do not change by more than a rounding error.
    """

    def __init__(self, operators: Stacked, block: Tensor, products: Tensor, noise: Tensor) -> None:
        self.operators = operators
        self.basis = block  # all finished blocks, (batch, k, n)
        self._noise = noise
        self._columns: list[Tensor] = []  # of T: (batch, b, k) each
        self._absorb(products)

    @property
    def steps(self) -> int:
        """Multiplications by AᵀA so far."""
        return len(self._columns)

    @property
    def capacity(self) -> int:
        """Steps after which the next block would no longer fit into the space."""
        return max(1, min(self.operators.shape) // len(self._noise) - 1)

    def expand(self) -> None:
        """Multiply the newest block by AᵀA."""
        self.basis = torch.cat([self.basis, self._next], dim=1)
        self._absorb(self.operators.normal(self._next))

    def _absorb(self, Z: Tensor) -> None:
        """Project the product of the newest block onto the basis, orthonormalize the rest into the next block."""
        column = Z @ self.basis.mT
        rest = torch.baddbmm(Z, column, self.basis, alpha=-1)
        # Each step needs new noise: the old may be part of the basis by now. Rolled normal numbers are as good as new.
        noise, size = self._noise.roll(self.steps, 1), _NOISE[Z.dtype] * Z.abs().amax((1, 2), keepdim=True)
        Q, L = factored(torch.addcmul(rest, size, noise))
        # The rest after one projection may be little more than its rounding error, and then not orthogonal to the
        # basis. Two projections are enough ("twice is enough", Kahan and Parlett), and so are two factorizations.
        again = Q @ self.basis.mT
        Q, L2 = factored(torch.baddbmm(Q, again, self.basis, alpha=-1))
        # Z + noise = column · basis + L·Q of the first pass, and that Q = again · basis + L2·Q of the second pass. The
        # second pass corrects the rounding errors of the first one; only the noise does not belong to T.
        self._columns.append(column + L @ again - size * (noise @ self.basis.mT))
        self._coupling = (L @ L2).mT  # (batch, b, b)
        self._next = Q

    def projected(self) -> Tensor:
        """Return T, of which only the lower triangle is filled in, and below it the coupling block B.

        ``(batch, k + b, k)``: T in the first k rows, B in the first b columns of the others.
        """
        batch, b, k = self._columns[-1].shape
        T = self.basis.new_zeros(batch, k + b, k)
        for i, column in enumerate(self._columns):
            T[:, i * b : (i + 1) * b, : column.shape[2]] = column
        T[:, k:, :b] = self._coupling
        return T

    def dominant(self, ritz: Ritz, count: int) -> Tensor:
        """Return the first Ritz vectors, improved by one power step that reads no weight.

        AᵀA Q s = θ Q s + Q_{q+1} B E_qᵀ s, and all terms on the right are known.

        Args:
            ritz: The solution for the present basis.
            count: Vectors wanted; fewer if the basis is smaller.

        Returns:
            ``(batch, count, n)``, orthonormal rows, the dominant one first.
        """
        # Divided by θ, a row is a unit vector of the basis and a part outside of it: long enough to be orthonormalized.
        theta = ritz.theta[:, -count:].flip(1)
        floor = _ZERO * theta[:, :1].clamp_min(torch.finfo(theta.dtype).tiny)
        outside = ritz.coupling[:, :, -count:].flip(2) / torch.maximum(theta, floor).unsqueeze(1)
        weights = sent(torch.cat([ritz.vectors[:, :, -count:].flip(2), outside], dim=1), like=self.basis).mT
        k = self.basis.shape[1]
        return orthonormalized(weights[:, :, :k] @ self.basis + weights[:, :, k:] @ self._next)[0]

    def select(self, indices: Sequence[int]) -> BlockKrylov:
        """Return the subspaces of the operators at the given positions, themselves if these are all."""
        if len(indices) == len(self.operators):
            return self
        chosen = torch.tensor(indices, device=self.basis.device)
        part = copy(self)
        part.operators, part.basis = self.operators.select(indices), self.basis[chosen]
        part._next, part._coupling = self._next[chosen], self._coupling[chosen]
        part._columns = [column[chosen] for column in self._columns]
        return part

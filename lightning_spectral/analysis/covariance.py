"""All singular values of a product of matrices, layer after layer, at any ratio of the largest to the smallest.

'The 1:1 Rule' (Gamaleldin; unreviewed) iterates a covariance, C ← A C Aᵀ / ‖·‖₂ from C = I, and computes an effective
rank and a condition number from C. In floating point this fails when the singular values of the product
P = A_ℓ … A_1 spread: C holds their squares, and every square below ε · d of the largest is a rounding error. This
module keeps P itself as U diag(exp(log_s)) Vᵀ, so that only the condition of the single matrices limits the precision:

    singular values of P      1    1e-4    1e-8    1e-12   1e-20
    their squares, in C       1    1e-8    1e-16   1e-24   1e-40
    correct in C              yes  yes     no      no      no         (ε = 2e-16)
    correct as log_s          yes  yes     yes     yes     yes
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral._checks import choice
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.tokens.ranks import Power, shares_effective_rank

__all__ = ["GradedProduct", "ProductSpectrum", "effective_ranks", "product_spectrum"]

# A dense SVD has an absolute error of ε times its largest singular value. So each SVD gets a window of six decades:
#
#     1 ────────── 1e-3 ────────── 1e-6 ── below
#     final: ten     go into the           left out: it couples to the
#     digits left    next window           final values by less than ε
_WINDOW, _FINAL = math.log(1e-6), math.log(1e-3)


@dataclass(frozen=True, slots=True, eq=False)
class ProductSpectrum:
    """The singular values σ of the products A_ℓ … A_1, for every ℓ. The eigenvalues of the paper's C are σ².

    Attributes:
        log_singular_values: ``(layers, d)``, float64: ln σ, the largest first.
        at_floor: ``(layers,)``, bool: whether the smallest σ are rounding errors of this or of an earlier layer. The
            true ones may then be smaller, and ``log_condition`` is a lower bound.
    """

    log_singular_values: Tensor
    at_floor: Tensor

    @property
    def log_condition(self) -> Tensor:
        """ln of the condition number of the covariance C = P Pᵀ, ``(layers,)``: 2 (ln σ₁ − ln σ_d)."""
        return 2 * (self.log_singular_values[:, 0] - self.log_singular_values[:, -1])

    def effective_rank(self, *, power: Power) -> Tensor:
        """Return exp H(p) with p = σ^power / Σσ^power, ``(layers,)``, between 1 and d.

        Args:
            power: 2 for the eigenvalues of C, as in 'The 1:1 Rule'; 1 for the definition of Roy and Vetterli (2007),
                which is larger.
        """
        return shares_effective_rank(torch.softmax(2 * self.log_singular_values, dim=-1), power=power)


class GradedProduct:
    """A product of square matrices as U diag(exp(log_s)) Vᵀ. V is not stored.

    Args:
        width: Rows and columns d of every matrix. The empty product is the identity.

    Attributes:
        U: ``(d, d)``, float64: left singular vectors.
        log_s: ``(d,)``, float64: ln of the singular values, the largest first.
        at_floor: Whether a singular value may be a rounding error.
    """

    def __init__(self, width: int) -> None:
        self.U = torch.eye(width, dtype=torch.float64, device="cpu")
        self.log_s = torch.zeros(width, dtype=torch.float64, device="cpu")
        self.at_floor = False

    def multiply(self, A: Tensor) -> None:
        """Multiply by one more matrix from the left.

        If all singular values lie within six decades, one dense SVD of A U diag(s) gives the result. A wider spectrum
        is first made nearly diagonal by QR factorizations of the matrix and of its transpose in turn (Stewart, "The QLP
        approximation to the singular value decomposition", 1999). QR commutes with a scaling of the columns, so that
        the factorizations see no graded matrix. The rest lies near the diagonal and is done in overlapping windows.

        Args:
            A: ``(d, d)``, float64, on the CPU.
        """
        C = A @ self.U
        if self.log_s[0] - self.log_s[-1] < -_WINDOW:
            U, log_sigma = _svd(C * torch.exp(self.log_s - self.log_s[0]), self.log_s[0])
            if log_sigma[0] - log_sigma[-1] < -_WINDOW:
                self.U, self.log_s = U, log_sigma
                return
        # Step 1: C = B R, so C S = B (R S) with S = diag(s). The scaling S of the columns stays outside of the QR.
        basis, R = torch.linalg.qr(C)
        sizes = torch.linalg.vector_norm(R, dim=0)
        self.at_floor |= bool(R.diagonal().abs().amin() <= torch.finfo(R.dtype).eps * len(R) * sizes.amax())
        # Step 2: (R S)ᵀ = S Rᵀ = (S Rᵀ S⁻¹) S. Entry (i, j) of the bracket is R_ji · s_i / s_j. Rᵀ is lower triangular
        # (i ≥ j) and s falls, so every quotient is at most 1: nothing overflows. QR of the bracket gives Q₂ R₂ S, and
        # Q₂ belongs to V, which is not stored.
        fall = torch.exp((self.log_s[:, None] - self.log_s).clamp(max=0))
        _, R = torch.linalg.qr(R.mT * fall)
        # Step 3: the same for (R₂ S)ᵀ = L R₃ S. The product is now (B L) R₃ S times an orthogonal matrix on the right,
        # and R₃ is nearly diagonal.
        left, R = torch.linalg.qr(R.mT * fall)
        self._diagonalize(basis @ left, R)

    def _diagonalize(self, Q: Tensor, R: Tensor) -> None:
        """Set this product to Q R S with R upper triangular, window by window.

        A window has two kinds of columns: the values that the last window left over, and the columns of R S that come
        into the range of six decades below the largest of them.

            rows / columns     left over           new columns of R S
            left over          diag(old values)    coupling
            new rows           0                   R[start:stop] S
        """
        d = len(R)
        sizes = torch.linalg.vector_norm(R, dim=0).clamp(min=torch.finfo(R.dtype).tiny).log() + self.log_s
        vectors: list[Tensor] = []
        values: list[Tensor] = []
        start, left_over, basis, coupling = 0, self.log_s[:0], Q[:, :0], R[:0]
        while start < d or len(left_over):
            top = torch.cat([left_over, sizes[start:]]).amax()
            inside = torch.nonzero(sizes[start:] >= top + _WINDOW)
            stop = start + (int(inside[-1]) + 1 if len(inside) else 0)
            # All numbers of the window are divided by its largest, exp(top), so that none underflows.
            rows = torch.cat([coupling, R[start:stop]])
            block = rows[:, start:stop] * torch.exp(self.log_s[start:stop] - top)
            old = torch.eye(len(rows), len(left_over), dtype=R.dtype, device=R.device) * torch.exp(left_over - top)
            u, log_sigma = _svd(torch.cat([old, block], dim=1), top)
            basis, coupling = torch.cat([basis, Q[:, start:stop]], dim=1) @ u, u.mT @ rows
            # The rows of the new columns rotate with the basis, and couple to the columns of later windows.
            final = int((log_sigma >= log_sigma[0] + _FINAL).sum()) if stop < d else len(log_sigma)
            vectors.append(basis[:, :final])
            values.append(log_sigma[:final])
            start, left_over, basis, coupling = stop, log_sigma[final:], basis[:, final:], coupling[final:]
        self.log_s, order = torch.cat(values).sort(descending=True)
        self.U = torch.cat(vectors, dim=1)[:, order]


def _svd(block: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors and ln of the singular values of exp(log_scale) · block."""
    U, sigma, _ = torch.linalg.svd(block)
    return U, sigma.clamp(min=torch.finfo(sigma.dtype).tiny).log() + log_scale


def product_spectrum(matrices: Iterable[Tensor]) -> ProductSpectrum:
    """Return the singular values of A_1, of A_2 A_1, and so on.

    Args:
        matrices: A_1, A_2, …, each ``(d, d)``; taken one at a time and converted to float64 on the CPU.

    Returns:
        ln σ after every matrix. The condition κ(A) of the single matrices limits the precision, not κ of the product:
        for exactly known products with κ up to 1e60, of matrices with κ = 1e5, the error of ln σ was 2e-11.

    Raises:
        ConfigurationError: There is no matrix, or a matrix is not square, has another width, is zero or is not finite.
    """
    product: GradedProduct | None = None
    spectra: list[Tensor] = []
    floors: list[bool] = []
    for number, matrix in enumerate(matrices):
        A = matrix.detach().cpu().double()
        width = len(A) if product is None else len(product.log_s)
        if A.shape != (width, width) or not width:
            raise ConfigurationError(f"matrix {number} has shape {tuple(A.shape)}: expected all square, of one width")
        if not A.isfinite().all() or not A.any():
            raise ConfigurationError(f"matrix {number} is zero or not finite")
        product = product or GradedProduct(width)
        product.multiply(A)
        spectra.append(product.log_s)
        floors.append(product.at_floor)
    if not spectra:
        raise ConfigurationError("matrices is empty: expected at least one")
    return ProductSpectrum(torch.stack(spectra), torch.tensor(floors, device="cpu"))


def effective_ranks(matrices: Iterable[Tensor], *, power: Power = 2) -> Tensor:
    """Return the effective rank of A_1, of A_2 A_1, and so on.

    Args:
        matrices: A_1, A_2, …, each ``(d, d)``.
        power: 2 for p = σ²/Σσ², as in 'The 1:1 Rule'; 1 for p = σ/Σσ (Roy and Vetterli, 2007).

    Returns:
        ``(layers,)``, float64, between 1 and d.

    Raises:
        ConfigurationError: As for :func:`product_spectrum`, or the power is not 1 or 2.
    """
    choice("power", power, (1, 2))
    return product_spectrum(matrices).effective_rank(power=power)

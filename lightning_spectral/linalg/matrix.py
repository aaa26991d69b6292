"""The one operator that reads matrices: nearly every byte that a solver moves is moved here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.linalg.halves import multiplied_in_parts, reads_halves
from lightning_spectral.linalg.operators import (
    LinearOperator,
    balanced_by_largest,
    check_weight,
    sum_dtype,
    vector_dtype,
)
from lightning_spectral.linalg.threads import all_threads

__all__ = ["Matrix"]

# Elements that are converted at a time for a weight that torch cannot multiply in place (16 bits, odd strides).
_PIECE_SIZE = 1 << 18
# Elements from which on a product takes more than one thread (benchmarks/busy.py). On two quiet cores a second thread
# makes smaller products up to 1.6 times as fast. Beside other work it makes them 2 to 70 times as slow.
_LARGE = 1 << 24
# Columns and rows of a product that CPUs multiply fastest.
_COLUMNS = 16
_ROWS = 1024


@final
class Matrix(LinearOperator):
    """A weight, read as ``(out_features, in_features)``, never copied.

    Args:
        weight: ``(m, n)`` with any strides, or ``(groups, rows, n)``, which is read as the ``(groups * rows, n)``
            matrix with the groups below each other. An example are the values in fused rows
            ``(heads, 3, head_dim, n)[:, 2]``. For groups of columns, take the :class:`Adjoint` of a Matrix. Weights of
            16 bits are multiplied as they lie on CUDA (see :mod:`~lightning_spectral.linalg.halves`), and elsewhere
            converted a few rows at a time.

    Raises:
        ConfigurationError: If the weight is on the meta device, quantized or integer, empty, or not 2-D or 3-D.
    """

    def __init__(self, weight: Tensor) -> None:
        check_weight(weight, "weight", dims=(2, 3))
        self.weight = weight  # as given, with its graph; products have no graph
        weight = weight.detach()
        self.shape = (weight.shape[:-1].numel(), weight.shape[-1])
        self.dtype = vector_dtype(weight)
        self.device = weight.device
        # A matrix that is stored by columns (Conv1D) is read as its transpose, with matmat and adjoint swapped.
        self._by_columns = weight.ndim == 2 and weight.stride(0) == 1 and weight.stride(1) != 1
        self._rows = weight.mT if self._by_columns else weight

    def matmat(self, X: Tensor) -> Tensor:
        """Multiply: ``(n, k) -> (m, k)``."""
        with self._threads():
            return self._down(X) if self._by_columns else self._across(X)

    def adjoint(self, Y: Tensor) -> Tensor:
        """Multiply by the transpose: ``(m, k) -> (n, k)``."""
        with self._threads():
            return self._across(Y) if self._by_columns else self._down(Y)

    def dense(self) -> Tensor:
        """Convert the weight."""
        return self.weight.detach().double().cpu().reshape(self.shape)

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out the power of two of the largest entry."""
        return balanced_by_largest(self, float(self.weight.detach().abs().amax()))

    def weighted_norm(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Return √Σ (rowsᵢ · weightᵢⱼ · columnsⱼ)², a few rows at a time.

        Args:
            rows: ``(m,)`` or ``None`` for ones.
            columns: ``(n,)`` or ``None`` for ones.
        """
        if self._by_columns:
            rows, columns = columns, rows
        # Squares of 1e-30 vanish in float32; only the Apple GPU has nothing wider.
        dtype = sum_dtype(self.device)
        lengths = []
        for piece in self._pieces(self.dtype, small=True):
            piece = piece.to(dtype)
            lengths.append(torch.linalg.vector_norm(piece if columns is None else piece * columns, dim=1))
        length = torch.cat(lengths)
        norm: Tensor = torch.linalg.vector_norm(length if rows is None else length * rows)
        return norm

    def _threads(self) -> AbstractContextManager[None]:
        return all_threads() if self.weight.numel() >= _LARGE else nullcontext()

    def _across(self, X: Tensor) -> Tensor:
        """Multiply the stored rows by a block: ``(p, k) -> (q, k)`` for stored rows ``(q, p)``."""
        parts = [_times(piece, X) for piece in self._pieces(X.dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _down(self, Y: Tensor) -> Tensor:
        """Multiply the transpose of the stored rows by a block: ``(q, k) -> (p, k)``."""
        rows = Y.mT
        result: Tensor | None = None
        row = 0
        for piece in self._pieces(Y.dtype):
            count = piece.shape[0]
            part = rows if count == rows.shape[1] else rows[:, row : row + count]
            if piece.dtype != Y.dtype:
                product = multiplied_in_parts(part, piece)
                result = product if result is None else result + product
            else:
                result = torch.mm(part, piece) if result is None else torch.addmm(result, part, piece)
            row += count
        assert result is not None
        return result.mT

    def _pieces(self, dtype: torch.dtype, small: bool = False) -> Iterator[Tensor]:
        """Yield the stored rows in order, in pieces that torch can multiply.

        Args:
            dtype: The dtype of the block that multiplies. A weight of another dtype or of odd strides is converted a
                few rows at a time, except where it can be multiplied as it lies.
            small: Whether every piece has to be small.
        """
        for block in self._rows if self._rows.ndim == 3 else (self._rows,):
            fits = block.dtype == dtype and block.stride(1) == 1
            if not small and (fits or reads_halves(block, dtype)):
                yield block
                continue
            for part in block.split(max(1, _PIECE_SIZE // block.shape[1])):
                yield part if fits else part.to(dtype, memory_format=torch.contiguous_format)


def _times(rows: Tensor, X: Tensor) -> Tensor:
    """Return ``rows @ X``, in the fastest of the equivalent forms.

    GB of weight read per second, float32, (512…4096) x (512…1024), MKL on two cores of a Xeon:

    ======================  =====  =====  =====  =====  =====  =====
    columns                     1      2      4      8     16     32
    ======================  =====  =====  =====  =====  =====  =====
    rows @ X                45-54  20-33  20-32  20-28  21-34  10-15
    linear(Xᵀ, rows)ᵀ       45-57  43-66  28-39  18-29   8-17   6-13
    rowsᵀ @ Y               40-55  11-15  11-14  11-15  10-14   7-12
    (Yᵀ @ rows)ᵀ            44-60  29-41  30-38  24-34  17-22  10-13
    ======================  =====  =====  =====  =====  =====  =====

    The same on one busy core of an EPYC, where 14 columns take longer than 16:

    ======================  ========  ========  =========
    columns                        6        14         16
    ======================  ========  ========  =========
    rows @ X                 3.2-8.4   2.5-3.3    4.0-5.4
    rows @ X, 1024 at once                        4.5-5.6
    linear(Xᵀ, rows)ᵀ        5.6-7.3   4.1-6.1    4.1-5.1
    (Yᵀ @ rows)ᵀ             5.5-7.8   4.4-6.2    4.4-6.0
    ======================  ========  ========  =========

    Hence ``linear`` up to 8 columns here, 16 columns for the 14 of the solver, and always the last form in ``_down``.
    12 to 16 columns take as long as 8 or little longer, and need fewer products.
    """
    k = X.shape[1]
    if rows.dtype != X.dtype:
        return multiplied_in_parts(X.mT, rows.mT).mT
    if k <= 8:
        return F.linear(X.mT, rows).mT
    if k >= _COLUMNS or rows.device.type != "cpu":
        return torch.mm(rows, X)
    padded = F.pad(X.mT, (0, 0, 0, _COLUMNS - k)).mT
    if rows.shape[0] <= _ROWS:
        return torch.mm(rows, padded)[:, :k]
    return torch.cat([torch.mm(part, padded) for part in torch.split(rows, _ROWS)])[:, :k]

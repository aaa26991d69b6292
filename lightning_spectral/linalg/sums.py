"""Sums of operators: a weight and the low-rank updates beside it."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.operators import LinearOperator, Scaled, dense_by_columns, largest_mesh

__all__ = ["Sum"]


@final
class Sum(LinearOperator):
    """A sum of operators, ``Sum(A, B).matmat(x) = A x + B x``. The sum is never formed.

    Args:
        operators: The terms.

    Raises:
        ConfigurationError: If there is no term, or their shapes differ.
    """

    def __init__(self, *operators: LinearOperator) -> None:
        shapes = {operator.shape for operator in operators}
        if len(shapes) != 1:
            found = " + ".join(str(operator.shape) for operator in operators) or "none"
            raise ConfigurationError(f"A Sum needs operators of one shape, got {found}.")
        self.operators = operators
        (self.shape,) = shapes
        wide = any(operator.dtype == torch.float64 for operator in operators)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = operators[0].device
        self.mesh = largest_mesh(operators)

    def matmat(self, X: Tensor) -> Tensor:
        """Add the images."""
        total = self.operators[0].matmat(X)
        for operator in self.operators[1:]:
            total = total + operator.matmat(X)
        return total

    def adjoint(self, Y: Tensor) -> Tensor:
        """Add the images under the transposes."""
        total = self.operators[0].adjoint(Y)
        for operator in self.operators[1:]:
            total = total + operator.adjoint(Y)
        return total

    def dense(self) -> Tensor:
        """Add the dense terms. With sharded terms, multiply unit vectors instead."""
        if self.mesh is not None:
            return dense_by_columns(self)
        total = self.operators[0].dense()
        for operator in self.operators[1:]:
            total = total + operator.dense()
        return total

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out the power of two of the largest term; the other terms are scaled down to it."""
        terms = [operator.balanced() for operator in self.operators]
        found = [term for term in terms if term is not None]
        if len(found) < len(terms):
            return None
        largest = max(exponent for _, exponent in found)
        # A term so small that its power of two rounds to zero is below the rounding error of the sum.
        return Sum(*(Scaled(item, math.ldexp(1.0, exponent - largest)) for item, exponent in found)), largest

"""Matrix-free linear operators: the form in which a solver sees a branch of a model.

An operator knows its shape, and multiplies a block of vectors by itself or by its transpose. It holds references to
weights and never copies a weight. :class:`LinearOperator` is abstract and every subclass is final: a new operator is
composed of the existing ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import pairwise
from typing import final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_spectral.errors import ConfigurationError

__all__ = [
    "Adjoint",
    "Diagonal",
    "Gather",
    "LinearOperator",
    "Product",
    "Scaled",
    "balanced_by_largest",
    "check_weight",
    "dense_by_columns",
    "largest_mesh",
    "sum_dtype",
    "vector_dtype",
]

# Unit vectors that are multiplied at a time.
_COLUMNS = 64


class LinearOperator(ABC):
    """A real linear map from n-vectors to m-vectors.

    Attributes:
        shape: ``(m, n)``.
        dtype: The dtype of the vectors: float64 where a weight is float64, else float32.
        device: Where the vectors live.
        mesh: The processes that a weight is spread over. All of them have to take part in every product. ``None`` if
            every process has all weights.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    mesh: DeviceMesh | None = None

    @abstractmethod
    def matmat(self, X: Tensor) -> Tensor:
        """Multiply a block of vectors: ``(n, k) -> (m, k)``."""

    @abstractmethod
    def adjoint(self, Y: Tensor) -> Tensor:
        """Multiply a block of vectors by the transpose: ``(m, k) -> (n, k)``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Form the ``(m, n)`` matrix in float64 on the CPU, for references and small operators."""

    @abstractmethod
    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out a power of two, so that products neither overflow nor underflow.

        This reads every weight once, so it is called only after a product has left the range of the dtype.

        Returns:
            ``(operator, e)`` with ``self = 2**e * operator``, or ``None`` if a weight is NaN or infinite.
        """


@final
class Diagonal(LinearOperator):
    """Multiplication by a vector, entry by entry: the gain of a norm.

    Args:
        gain: ``(n,)``, floating point.

    Raises:
        ConfigurationError: If ``gain`` is not a real floating-point vector with storage.
    """

    def __init__(self, gain: Tensor) -> None:
        check_weight(gain, "gain", dims=(1,))
        self.gain = gain
        self.shape = (len(gain), len(gain))
        self.dtype = vector_dtype(gain)
        self.device = gain.device

    def matmat(self, X: Tensor) -> Tensor:
        """Multiply row i of ``X`` by entry i of the gain."""
        return X * self.gain.detach().to(X.dtype).unsqueeze(-1)

    def adjoint(self, Y: Tensor) -> Tensor:
        """Do the same: a diagonal is its own adjoint."""
        return self.matmat(Y)

    def dense(self) -> Tensor:
        """Form the diagonal matrix."""
        return torch.diag(self.gain.detach().double().cpu())

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out the power of two of the largest entry."""
        return balanced_by_largest(self, float(self.gain.detach().abs().amax()))


@final
class Gather(LinearOperator):
    """Row selection: row i of the result is row ``index[i]`` of the input.

    Grouped-query attention repeats a value head to its query heads this way.

    Args:
        index: ``(m,)``, integers in ``[0, n)``; may repeat.
        n: Rows of the input.

    Raises:
        ConfigurationError: If ``index`` is not an integer vector.
    """

    def __init__(self, index: Tensor, n: int) -> None:
        if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ConfigurationError(
                f"index must be a vector of int32 or int64, got shape {tuple(index.shape)} and {index.dtype}."
            )
        self.index = index
        self.shape = (len(index), n)
        self.dtype = torch.float32
        self.device = index.device

    def matmat(self, X: Tensor) -> Tensor:
        """Pick rows."""
        return X.index_select(0, self.index)

    def adjoint(self, Y: Tensor) -> Tensor:
        """Add each row to the row it was picked from."""
        return Y.new_zeros(self.shape[1], Y.shape[1]).index_add_(0, self.index, Y)

    def dense(self) -> Tensor:
        """Form the 0/1 matrix."""
        return self.matmat(torch.eye(self.shape[1], dtype=torch.float64, device=self.device)).cpu()

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Return the operator itself."""
        return self, 0


@final
class Scaled(LinearOperator):
    """A multiple of an operator.

    Args:
        operator: The operator.
        c: The factor, a number or a tensor with one element (kept on its device until it is used).
    """

    def __init__(self, operator: LinearOperator, c: float | Tensor) -> None:
        self.operator = operator
        self.c = c.reshape(()) if isinstance(c, Tensor) else float(c)  # as given, with its graph
        self._value = self.c.detach() if isinstance(self.c, Tensor) else self.c
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.mesh = operator.mesh

    def matmat(self, X: Tensor) -> Tensor:
        """Scale, then multiply: in this order a small factor keeps a huge weight from overflowing."""
        return self.operator.matmat(X * self._value)

    def adjoint(self, Y: Tensor) -> Tensor:
        """Scale, then multiply by the transpose."""
        return self.operator.adjoint(Y * self._value)

    def dense(self) -> Tensor:
        """Form the matrix and scale it."""
        return self.operator.dense() * float(self._value)

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out the power of two of the operator and of the factor."""
        inner, c = self.operator.balanced(), float(self._value)
        if inner is None or not math.isfinite(c):
            return None
        mantissa, exponent = math.frexp(c)
        return Scaled(inner[0], mantissa), inner[1] + exponent


@final
class Adjoint(LinearOperator):
    """The transpose of an operator."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.shape = (operator.shape[1], operator.shape[0])
        self.dtype, self.device, self.mesh = operator.dtype, operator.device, operator.mesh

    def matmat(self, X: Tensor) -> Tensor:
        """Multiply by the transpose of the operator."""
        return self.operator.adjoint(X)

    def adjoint(self, Y: Tensor) -> Tensor:
        """Multiply by the operator."""
        return self.operator.matmat(Y)

    def dense(self) -> Tensor:
        """Form the transposed matrix."""
        return self.operator.dense().mT

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out the power of two of the operator."""
        inner = self.operator.balanced()
        return None if inner is None else (Adjoint(inner[0]), inner[1])


@final
class Product(LinearOperator):
    """A chain of operators, applied from right to left: ``Product(A, B).matmat(x) = A(B x)``. It is never formed.

    Args:
        operators: The factors, leftmost first.

    Raises:
        ConfigurationError: If there is no factor, or two neighbours do not fit.
    """

    def __init__(self, *operators: LinearOperator) -> None:
        if not operators:
            raise ConfigurationError("A Product needs at least one operator, got none.")
        for left, right in pairwise(operators):
            if left.shape[1] != right.shape[0]:
                shapes = " @ ".join(str(operator.shape) for operator in operators)
                raise ConfigurationError(f"The operators of a Product do not fit: {shapes}.")
        self.operators = operators
        self.shape = (operators[0].shape[0], operators[-1].shape[1])
        wide = any(operator.dtype == torch.float64 for operator in operators)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = operators[0].device
        self.mesh = largest_mesh(operators)

    def matmat(self, X: Tensor) -> Tensor:
        """Apply the factors, the last one first."""
        for operator in reversed(self.operators):
            X = operator.matmat(X)
        return X

    def adjoint(self, Y: Tensor) -> Tensor:
        """Apply the transposed factors, the first one first."""
        for operator in self.operators:
            Y = operator.adjoint(Y)
        return Y

    def dense(self) -> Tensor:
        """Multiply the dense factors. With sharded factors, multiply unit vectors instead."""
        if self.mesh is not None:
            return dense_by_columns(self)
        result = self.operators[0].dense()
        for operator in self.operators[1:]:
            result = result @ operator.dense()
        return result

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out the powers of two of all factors."""
        factors = [operator.balanced() for operator in self.operators]
        found = [factor for factor in factors if factor is not None]
        if len(found) < len(factors):
            return None
        return Product(*(operator for operator, _ in found)), sum(exponent for _, exponent in found)


def check_weight(weight: Tensor, word: str, *, dims: tuple[int, ...]) -> None:
    """Raise for a tensor that has no numbers to multiply with.

    Args:
        weight: The tensor.
        word: Its name in the message.
        dims: Accepted numbers of dimensions.

    Raises:
        ConfigurationError: If the tensor is on the meta device, not real floating point of 16 to 64 bits, has a wrong
            number of dimensions or no elements.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ConfigurationError(
            f"{word} must be float16, bfloat16, float32 or float64, got {weight.dtype}: dequantize it first."
        )
    if weight.is_meta:
        raise ConfigurationError(f"{word} is on the meta device and holds no numbers: materialize it first.")
    if weight.ndim not in dims or weight.numel() == 0:
        wanted = " or ".join(str(dim) for dim in dims)
        raise ConfigurationError(
            f"{word} must be non-empty with {wanted} dimension(s), got shape {tuple(weight.shape)}."
        )


def dense_by_columns(operator: LinearOperator) -> Tensor:
    """Form the ``(m, n)`` matrix in float64 on the CPU from its products with the unit vectors, a few at a time."""
    units = torch.eye(operator.shape[1], dtype=torch.float64, device=operator.device)
    return torch.cat([operator.matmat(block).cpu() for block in torch.split(units, _COLUMNS, dim=1)], dim=1)


def largest_mesh(operators: Iterable[LinearOperator]) -> DeviceMesh | None:
    """Return the mesh with the most processes.

    With sharding around tensor parallelism, the meshes of two operators differ, and the larger one contains the other.
    """
    meshes = [operator.mesh for operator in operators if operator.mesh is not None]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def vector_dtype(weight: Tensor) -> torch.dtype:
    """Return float64 for a float64 weight, else float32: the dtype of the vectors it multiplies."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of long sums: float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def balanced_by_largest(operator: LinearOperator, largest: float) -> tuple[LinearOperator, int] | None:
    """Balance an operator whose largest entry is known; see :meth:`LinearOperator.balanced`."""
    if not math.isfinite(largest):
        return None
    # The scale, and a vector multiplied by it, must stay normal numbers: 2**±126 in float32, 2**±1022 in float64.
    limit = 1000 if operator.dtype == torch.float64 else 120
    if largest == 0:
        return operator, -limit  # every exponent is right for 0, but a large one would drown other terms of a sum
    exponent = max(-limit, min(limit, math.frexp(largest)[1]))
    return (Scaled(operator, math.ldexp(1.0, -exponent)), exponent) if exponent else (operator, 0)

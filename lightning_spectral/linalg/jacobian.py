"""The derivative of a function at a point, as an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from lightning_spectral.linalg.operators import LinearOperator, Scaled

__all__ = ["Jacobian"]


@final
class Jacobian(LinearOperator):
    """The matrix J of partial derivatives ∂f/∂x at one point, both sides flattened. It is never formed.

    Jᵀu is a backward pass through a graph of ``f``, which is built once and kept. The map u ↦ Jᵀu is linear, and its
    derivative is Jᵀ. So a backward pass through the graph of this backward pass multiplies by J::

        x ──► f(x)               backward with u:    Jᵀu, as a function of u
        u ──► Jᵀu                backward with v:    (Jᵀ)ᵀv = Jv

    Forward-mode differentiation would do the same, but is missing for many kernels. Functions that cannot be
    differentiated twice are multiplied by central differences, of about ten digits in float64;
    ``finite_differences`` is then true.

    Args:
        function: Maps a tensor like ``x`` to another tensor; pure, and differentiable at ``x``.
        x: The point.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.x = x.detach()
        self.finite_differences = False
        self._function = function
        with torch.enable_grad():
            self._source = self.x.clone().requires_grad_()
            self._result = function(self._source)
        self._constant = not self._result.requires_grad
        self._transposed: tuple[Tensor, Tensor] | None = None
        self.shape = (self._result.numel(), self.x.numel())
        self.dtype, self.device = self.x.dtype, self.x.device

    @property
    def value(self) -> Tensor:
        """The function at the point."""
        return self._result.detach()

    def matmat(self, X: Tensor) -> Tensor:
        """Multiply column by column: ``(n, k) -> (m, k)``."""
        return torch.stack([self._product(v.reshape(self.x.shape)).flatten() for v in X.unbind(1)], dim=1)

    def adjoint(self, Y: Tensor) -> Tensor:
        """Multiply by the transpose, one backward pass per column: ``(m, k) -> (n, k)``."""
        if self._constant:
            return Y.new_zeros(self.shape[1], Y.shape[1])
        columns = [u.reshape(self._result.shape) for u in Y.unbind(1)]
        return torch.stack([_backward(self._result, self._source, u).flatten() for u in columns], dim=1)

    def dense(self) -> Tensor:
        """Form the matrix row by row."""
        unit = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return self.adjoint(unit).mT.cpu().double()

    def balanced(self) -> tuple[LinearOperator, int] | None:
        """Take out the power of two of the largest entry of J times a vector of random signs."""
        generator = torch.Generator().manual_seed(1)
        signs = torch.randint(0, 2, (self.shape[1], 1), generator=generator, device="cpu").mul(2).sub(1)
        largest = float(self.matmat(signs.to(self.device, self.dtype)).abs().amax())
        if not math.isfinite(largest):
            return None
        limit = 1000 if self.dtype == torch.float64 else 120
        exponent = max(-limit, min(limit, math.frexp(largest)[1]))
        return (Scaled(self, math.ldexp(1.0, -exponent)), exponent) if exponent else (self, 0)

    def difference(self, v: Tensor, precision: float | None = None) -> Tensor:
        """Return Jv by a central difference.

        Args:
            v: In the shape of ``x``.
            precision: Relative rounding error of the function, by default the machine epsilon of the dtype of ``x``.
        """
        length, size = torch.linalg.vector_norm(v), torch.linalg.vector_norm(self.x)
        if not length:
            return torch.zeros_like(self.value)
        # At the cube root of the rounding error, the errors of rounding and of truncation are equal.
        step: Tensor = (precision or torch.finfo(self.dtype).eps) ** (1 / 3) * (size if size else 1.0) / length
        with torch.no_grad():
            change: Tensor = self._function(self.x + step * v) - self._function(self.x - step * v)
        return change / (2 * step)

    def _product(self, v: Tensor) -> Tensor:
        """Return Jv, for v in the shape of ``x``. The first product builds the second graph."""
        if self._constant:
            return torch.zeros_like(self.value)
        if self._transposed is None and not self.finite_differences:
            self._transposed = self._by_source()
            self.finite_differences = self._transposed is None
        return self.difference(v) if self._transposed is None else _backward(*self._transposed, v)

    def _by_source(self) -> tuple[Tensor, Tensor] | None:
        """Return Jᵀu and u with the graph from u to Jᵀu; ``None`` if the graph is missing or wrong."""
        generator = torch.Generator().manual_seed(2)
        v, w = (torch.randn(like.shape, generator=generator, device="cpu").to(like) for like in (self.x, self._result))
        try:
            with torch.enable_grad():
                u = torch.zeros_like(self._result).requires_grad_()
                transposed = _backward(self._result, self._source, u, create_graph=True)
            image = _backward(transposed, u, v)
        except RuntimeError:  # some operation cannot be differentiated twice
            return None
        # Some operations do not raise, but are missing in the graph. Then ⟨w, Jv⟩ and ⟨Jᵀw, v⟩ differ.
        error = (w * image).sum() - (_backward(self._result, self._source, w) * v).sum()
        size = torch.linalg.vector_norm(w) * torch.linalg.vector_norm(image) + torch.finfo(self.dtype).tiny
        return None if error.abs() > torch.finfo(self.dtype).eps ** 0.5 * size else (transposed, u)


def _backward(result: Tensor, source: Tensor, u: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of ⟨result, u⟩ by the source, zero where there is no way between them."""
    (gradient,) = torch.autograd.grad(
        result, source, u, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return gradient

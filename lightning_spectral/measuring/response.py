"""The response of a branch to perturbations of the stream: the norm and the gains of its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.linalg import Jacobian, Solver, SpectralNorm

__all__ = ["Gains", "Response", "derivative_error", "gains", "response"]


@dataclass(frozen=True, slots=True)
class Gains:
    """Gains of a branch for random perturbations.

    Attributes:
        frobenius: ‖J‖_F.
        mean: ‖PJP‖_F / √rank P, where P is the mean over tokens: the root mean square by which a perturbation shared by
            all tokens of a sequence moves their mean. ``None`` if the dimensions of the tokens are unknown.
        deviation: ‖ΠJΠ‖_F / √rank Π with Π = I − P: the same for deviations of the tokens from their mean. ``None`` for
            a single token.
    """

    frobenius: float
    mean: float | None = None
    deviation: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """Everything that is measured of one branch.

    Attributes:
        norm: ‖J‖₂.
        gains: Gains for random perturbations.
        value: The update that the branch adds at the point of the derivative.
        finite_differences: Whether the products by J are differences (see :class:`Jacobian`).
    """

    norm: SpectralNorm
    gains: Gains
    value: Tensor
    finite_differences: bool


def response(J: Jacobian, token_dims: Sequence[int], solver: Solver, *, n_probes: int = 8, seed: int = 0) -> Response:
    """Measure one branch.

    Args:
        J: Jacobian of the branch.
        token_dims: See :func:`gains`.
        solver: Computes ‖J‖₂ from below, with a certified bound.
        n_probes: See :func:`gains`.
        seed: Seed of the probes for the gains.
    """
    (norm,), _ = solver.compute([J], solver.init([J]))
    answer = gains(J, token_dims, generator=torch.Generator().manual_seed(seed), n_probes=n_probes)
    return Response(norm, answer, J.value, J.finite_differences)


def gains(J: Jacobian, token_dims: Sequence[int], *, generator: torch.Generator, n_probes: int = 8) -> Gains:
    """Estimate the gains by Hutchinson's estimator, ‖A‖_F² = E‖Ag‖² over vectors g of random signs.

    The squares are unbiased. The relative standard deviation of a norm is at most √(1/(2 · n_probes · r)) with r the
    stable rank of the matrix.

    Args:
        J: The Jacobian of a branch, from the shape of the stream to the shape of the sum.
        token_dims: The dimensions of the tokens. Empty for no ``mean`` and ``deviation``.
        generator: Source of the signs. It must not be the generator of the input: the derivative of a function behind a
            norm vanishes along the input itself.
        n_probes: Number of random vectors. Each costs one product by J, or two with ``token_dims``.

    Returns:
        The gains.
    """
    split = len(token_dims) > 0 and J.value.shape == J.x.shape
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    for _ in range(n_probes):
        signs = torch.randint(0, 2, J.x.shape, generator=generator, device=generator.device)
        g = (2 * signs - 1).to(J.x)
        parts = [_mean(g, token_dims), g - _mean(g, token_dims)] if split else [g]
        images = [J.matmat(part.reshape(-1, 1)).reshape(J.value.shape) for part in parts]
        sums[0] += _square(images[0] + images[1] if split else images[0])
        if split:
            sums[1] += _square(_mean(images[0], token_dims))
            sums[2] += _square(images[1] - _mean(images[1], token_dims))
    norms = [math.sqrt(float(total) / n_probes) for total in sums]
    if not split:
        return Gains(norms[0])
    rank = J.x.numel() // math.prod(J.x.shape[dim] for dim in token_dims)
    rest = J.x.numel() - rank
    return Gains(norms[0], norms[1] / math.sqrt(rank), norms[2] / math.sqrt(rest) if rest else None)


def derivative_error(J: Jacobian, *, generator: torch.Generator, enough: float = 1e-3) -> float:
    """Return the relative error of the derivative along one random direction, against a difference of values.

    Automatic differentiation trusts the derivative that each operation declares. An operation from outside of torch may
    declare a wrong one, or on purpose another one (a straight-through estimator).

    Args:
        J: The Jacobian.
        generator: Source of the direction.
        enough: An error up to this ends the search; else a longer step of the difference is tried.
    """
    v = torch.randn(J.x.shape, generator=generator, dtype=torch.float64, device=generator.device).to(J.x)
    image = J.matmat(v.reshape(-1, 1))
    # Some operations compute with fewer digits than their input has. A derivative is still good then, but a difference
    # needs a longer step.
    error = _along(J, v, image, torch.finfo(J.dtype).eps)
    if error <= enough or J.finite_differences:
        return error
    return min(error, _along(J, v, image, torch.finfo(torch.float32).eps))


def _along(J: Jacobian, v: Tensor, image: Tensor, precision: float) -> float:
    try:
        change = J.difference(v, precision)
    except RuntimeError:  # a router chose other experts, and shapes depend on that
        return math.inf
    size = float(torch.linalg.vector_norm(change))
    if not size:
        return float(torch.linalg.vector_norm(image))
    u = change.reshape(-1, 1) / size
    # Through the transpose J^T, because all other products derive from it.
    return abs(float((J.adjoint(u).flatten() * v.flatten()).sum()) / size - 1)


def _mean(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.mean(tuple(dims), keepdim=True).expand_as(x)


def _square(x: Tensor) -> float:
    return float(x.square().sum())

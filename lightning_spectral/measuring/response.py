"""How a branch answers to perturbations of the stream: the norm and the gains of its Jacobian."""

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
    """How a branch answers to random perturbations.

    Attributes:
        frobenius: ‖J‖_F.
        mean: ‖PJP‖_F / √rank P with P the mean over tokens: how far a perturbation that all tokens of a sequence share
            moves their mean, root mean square. ``None`` where the tokens are not known.
        deviation: ‖ΠJΠ‖_F / √rank Π with Π = I − P: the same for what sets the tokens apart. ``None`` where there is
            only one token.
    """

    frobenius: float
    mean: float | None = None
    deviation: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """Everything that is measured of one branch.

    Attributes:
        norm: ‖J‖₂.
        gains: Of random perturbations.
        value: What the branch adds at the point itself.
        finite_differences: Whether the products by J are differences (see :class:`Jacobian`).
    """

    norm: SpectralNorm
    gains: Gains
    value: Tensor
    finite_differences: bool


def response(J: Jacobian, token_dims: Sequence[int], solver: Solver, *, n_probes: int = 8, seed: int = 0) -> Response:
    """Measure one branch.

    Args:
        J: Its Jacobian.
        token_dims: See :func:`gains`.
        solver: Computes ‖J‖₂, from below, with the bound that it certifies.
        n_probes: See :func:`gains`.
        seed: Of the probes of the gains.
    """
    (norm,), _ = solver.compute([J], solver.init([J]))
    answer = gains(J, token_dims, generator=torch.Generator().manual_seed(seed), n_probes=n_probes)
    return Response(norm, answer, J.value, J.finite_differences)


def gains(J: Jacobian, token_dims: Sequence[int], *, generator: torch.Generator, n_probes: int = 8) -> Gains:
    """Estimate the gains by Hutchinson's estimator, ‖A‖_F² = E‖Ag‖² over vectors g of random signs.

    Unbiased in the squares. The relative standard deviation of a norm is at most √(1/(2 · n_probes · r)) with r the
    stable rank of the matrix.

    Args:
        J: The Jacobian of a branch, from the shape of the stream to the shape of the sum.
        token_dims: The dimensions over which to take the mean; none to go without.
        generator: Source of the signs. It must not be the one that made the input: along the input itself, the
            derivative of anything behind a norm vanishes.
        n_probes: Random vectors; each costs one product by J, two with tokens.

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
    """Return how far the derivative along one random direction is from a difference of function values, relatively.

    Automatic differentiation believes what each operation says of its own derivative, which an operation from outside
    of torch may get wrong, or mean otherwise (a straight-through estimator).

    Args:
        J: The Jacobian.
        generator: Source of the direction.
        enough: Error at which no other step is tried.
    """
    v = torch.randn(J.x.shape, generator=generator, dtype=torch.float64, device=generator.device).to(J.x)
    image = J.matmat(v.reshape(-1, 1))
    # Some operations compute in fewer digits than they are given. Derivatives are content with those, differences need
    # a longer step.
    error = _along(J, v, image, torch.finfo(J.dtype).eps)
    if error <= enough or J.finite_differences:
        return error
    return min(error, _along(J, v, image, torch.finfo(torch.float32).eps))


def _along(J: Jacobian, v: Tensor, image: Tensor, precision: float) -> float:
    try:
        change = J.difference(v, precision)
    except RuntimeError:  # a router chose otherwise, and shapes depend on its choice
        return math.inf
    size = float(torch.linalg.vector_norm(change))
    if not size:
        return float(torch.linalg.vector_norm(image))
    u = change.reshape(-1, 1) / size
    # By the transpose, from which the other products derive, and where those are differences, against it.
    return abs(float((J.adjoint(u).flatten() * v.flatten()).sum()) / size - 1)


def _mean(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.mean(tuple(dims), keepdim=True).expand_as(x)


def _square(x: Tensor) -> float:
    return float(x.square().sum())

"""How a branch answers to perturbations of the stream: the norm and the gains of its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.linalg import Jacobian, Solver, SpectralNorm

__all__ = ["Gains", "Response", "derivative_error", "gains", "mixed_dims", "response"]


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
    sums = torch.zeros(3, dtype=torch.float64)
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


def mixed_dims(J: Jacobian, channel_dim: int, *, generator: torch.Generator) -> tuple[int, ...]:
    """Return the dimensions along which a branch mixes positions: those of the tokens, if it is an attention branch.

    One position along each dimension is perturbed; where others answer, the branch mixes along that dimension.

    Args:
        J: The Jacobian of the branch.
        channel_dim: The dimension of the channels, which is none of them.
        generator: Source of the perturbation.
    """
    shape, found = J.x.shape, []
    if J.value.shape != shape:
        return ()
    for dim in range(len(shape)):
        if dim == channel_dim or shape[dim] < 2:
            continue
        place = (shape[dim] - 1) // 2  # neither the first nor the last, which a causal mask may hide
        v = torch.zeros_like(J.x)
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=J.x.dtype).to(J.x)
        v.select(dim, place).copy_(noise.select(dim, place))
        moved = J.matmat(v.reshape(-1, 1)).reshape(shape).abs()
        others = [index for index in range(shape[dim]) if index != place]
        largest = float(moved.amax())
        if float(moved.index_select(dim, torch.tensor(others, device=moved.device)).amax()) > 1e-9 * largest:
            found.append(dim)
    return tuple(found)


def derivative_error(J: Jacobian, *, generator: torch.Generator) -> float:
    """Return how far the derivative along one random direction is from a difference of function values, relatively.

    Automatic differentiation believes what each operation says of its own derivative, which an operation from outside
    of torch may get wrong, or mean otherwise (a straight-through estimator).

    Args:
        J: The Jacobian.
        generator: Source of the direction.
    """
    v = torch.randn(J.x.shape, generator=generator, dtype=torch.float64).to(J.x)
    image = J.matmat(v.reshape(-1, 1))
    # Some operations compute in fewer digits than they are given. Derivatives are content with those, differences need
    # a longer step.
    precisions = [torch.finfo(J.dtype).eps, *([] if J.finite_differences else [torch.finfo(torch.float32).eps])]
    return min(_along(J, v, J.difference(v, precision), image) for precision in precisions)


def _along(J: Jacobian, v: Tensor, change: Tensor, image: Tensor) -> float:
    size = float(torch.linalg.vector_norm(change))
    if not size:
        return float(torch.linalg.vector_norm(image))
    u = change.reshape(-1, 1) / size
    # By the transpose, from which the other products derive, and where those are differences, against it.
    return abs(float((J.adjoint(u).flatten() * v.flatten()).sum()) / size - 1)


def _mean(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.mean(tuple(dims), keepdim=True).expand_as(x)


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())

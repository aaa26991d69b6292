"""Compare the products of the found factors with the linear part of the branch, and solve for their coefficients.

The linear part L of a branch maps the same vector u at every token to a row of ``Y``. Factors were read off the tape as
paths with products M₁ … M_p. At each token t there must be coefficients with L(u)ₜ = Σᵢ cₜᵢ Mᵢ u. Stack k vectors::

                    tokens                     paths          tokens
              ┌             ┐            ┌             ┐   ┌         ┐
    k · width │      Y      │  =  k·width│   Mᵢ u_j    │ · │    C    │ paths
              └             ┘            └             ┘   └         ┘

With k · width ≥ 2p the system is overdetermined, so a factor that is missing, permuted or wrong leaves a residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_spectral.discovery.chains.linear import LinearPart
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.probe import Prober
from lightning_spectral.records import Factor, Path

__all__ = ["agreed_paths"]

_TOLERANCE = 1e-5  # of the residual, relative
_ZERO = 1e-4  # smaller coefficients count as zero: the token does not take this path
_MOST_VECTORS = 8
_NORMS = ("inner_norm", "post_norm")


def agreed_paths(linear: LinearPart, prober: Prober, paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the paths, each with the number by which the branch multiplies it, checked on random vectors.

    The linear part of the branch makes y = Σᵢ cᵢ Mᵢ u of a vector u. In a dense branch the cᵢ are the same at all
    tokens; they contain minus signs, terms that are added twice, and means over parts. In a mixture of experts, cᵢ is 0
    at tokens that another expert takes.

    Args:
        linear: The linear part of the branch.
        prober: Remembers the numbers of each program.
        paths: The paths. Paths without an expert are added up.

    Raises:
        UnmeasurableError: The sum of the products is not what the branch does.
    """
    try:
        question = ("coefficients", len(paths), prober.channel_dim(linear.region))
        found = prober.once(linear.region, question, lambda: _coefficients(linear, prober, paths))
    except (RuntimeError, IndexError) as error:
        raise UnmeasurableError(f"its matrices do not fit together: {str(error).splitlines()[0]}") from None
    if isinstance(found, str):
        raise UnmeasurableError(found)
    return tuple(_times(path, number, len(paths)) for path, number in zip(paths, found, strict=True))


def _times(path: Path, number: float, count: int) -> Path:
    """Return a path multiplied by a number, one of ``count`` paths."""
    if abs(number - 1) <= _TOLERANCE:
        return path
    factor = Factor("scale", None, constant=number)
    if any(item.role in _NORMS for item in path.factors):
        # A number left of the norm was already read off the tape. A number right of the norm cancels in a single path,
        # and only weighs the terms of a sum against each other.
        return path if count == 1 else replace(path, factors=(*path.factors, factor))
    return replace(path, factors=(factor, *path.factors))


def _coefficients(linear: LinearPart, prober: Prober, paths: Sequence[Path]) -> list[float] | str:
    """Return one number per path, 1 for paths of experts that did not run; or the reason why there are none."""
    known = [place for place, path in enumerate(paths) if linear.knows(path.factors)]
    chosen = [number for number, place in enumerate(known) if paths[place].expert not in (None, "shared")]
    result = [1.0] * len(paths)
    channel = prober.channel_dim(linear.region)
    width = linear.tape.shape(linear.region.stream)[channel]
    if linear.tape.shape(linear.region.leaf)[linear.end_channel(channel)] != width:
        return "its channels do not stand in one dimension at its end"
    count = 1 + (2 * len(known) - 1) // width
    if count > _MOST_VECTORS and chosen:
        return result  # more experts than vectors of this width can tell apart
    found = _solved(*_equations(linear, channel, [paths[place].factors for place in known], min(count, _MOST_VECTORS)))
    numbers = found if isinstance(found, str) else _one_each(found, chosen)
    if isinstance(numbers, str):
        return numbers
    for place, number in zip(known, numbers, strict=True):
        result[place] = number
    return result


def _equations(
    linear: LinearPart, channel: int, chains: Sequence[tuple[Factor, ...]], count: int
) -> tuple[Tensor, Tensor]:
    """Return Y, what the branch makes of some vectors at every token, and what each product makes of them.

    Returns:
        ``(vectors · width, tokens)`` and ``(vectors · width, chains)``.
    """
    region, generator = linear.region, torch.Generator().manual_seed(15)
    like = linear.tape.filled(region.stream)
    shape = [1] * like.dim()
    shape[channel] = width = like.shape[channel]
    whole, parts = [], []
    for _ in range(count):
        u = torch.randn(width, generator=generator, dtype=torch.float64, device="cpu").to(like)
        y = linear.run(region.leaf, {region.stream: u.view(shape).expand(like.shape)})
        rows = y.movedim(linear.end_channel(channel), -1)
        whole.append(rows.flatten(end_dim=-2))
        parts.append(torch.stack([linear.product(chain, u) for chain in chains], dim=-1))
    return torch.cat(whole, dim=-1).mT.cpu(), torch.cat(parts).cpu()


def _solved(y: Tensor, products: Tensor) -> Tensor | str:
    """Solve Y = M C for the coefficients C, ``(paths, tokens)``, or return why there is no solution."""
    y = y[:, (y != 0).any(0)]  # zero tokens (padding, no expert) give no equation
    if not y.numel():
        return "nothing of the stream reaches its end when activations and gates are left out"
    # gelsd: where two products are equal (tied experts), the solution of smallest norm.
    numbers: Tensor = torch.linalg.lstsq(products, y, driver="gelsd").solution
    if not bool((products @ numbers - y).abs().max() <= _TOLERANCE * y.abs().max()):
        return "the product of its matrices is not what it does when its activations and gates are left out"
    return numbers


def _one_each(numbers: Tensor, chosen: Sequence[int]) -> list[float] | str:
    """Return one coefficient per path, or the reason why its coefficient is not the same at all tokens it reaches.

    Args:
        numbers: ``(paths, tokens)``.
        chosen: The rows whose path the data chooses: experts.
    """
    reached = numbers.abs() > _ZERO
    largest = [float(row[row.abs().argmax()]) for row in numbers]
    for row, fed, number in zip(numbers, reached, largest, strict=True):
        if bool(((row - number).abs() > _ZERO * max(1.0, abs(number)))[fed].any()):
            return "what it adds is not the same linear map at every token"
    summed = [place for place in range(len(numbers)) if place not in chosen]
    if not all(bool(reached[place].any()) for place in summed):
        return "a part of it cancels when its activations and gates are left out"
    # At the ends of a sequence a term may be missing (a shifted token), but not at half of the tokens.
    if summed and float(reached[summed].all(0).double().mean()) < 0.5:
        return "different tokens take different ways through it"
    return [number if abs(number) > _ZERO else 1.0 for number in largest]

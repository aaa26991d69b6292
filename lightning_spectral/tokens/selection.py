"""Selection of tokens and dimensions of X: masks, massive activations, centring, scaling against overflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_spectral._checks import number
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.operators import sum_dtype

__all__ = ["centred_tokens", "massive_activations", "select", "unit_scaled"]


def select(X: Tensor, mask: Tensor | None = None, *, massive: float | None = None) -> tuple[Tensor, Tensor]:
    """Return X in the working precision, with zeros for tokens and dimensions that are left out.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts. The values of other tokens, NaN included, have
            no influence.
        massive: Leave out the :func:`massive_activations` that exceed this multiple of the median.

    Returns:
        X in float64, or float32 on a device without float64, and the tokens that count, ``(..., tokens)``.

    Raises:
        ConfigurationError: X has no tokens or no width, the mask does not fit, or ``massive`` is not above 1.

    Example:
        >>> select(torch.ones(3, 4), torch.tensor([True, True, False]))[1]
        tensor([ True,  True, False])
    """
    if X.dim() < 2 or not X.shape[-1] or not X.shape[-2]:
        raise ConfigurationError(f"X has the shape {tuple(X.shape)}: expected (..., tokens, width), neither of them 0")
    if mask is not None and mask.shape != X.shape[:-1]:
        expected = tuple(X.shape[:-1])
        raise ConfigurationError(
            f"mask has the shape {tuple(mask.shape)}: expected {expected}, the shape of X without width"
        )
    X = X.to(sum_dtype(X.device))
    valid = X.new_ones(X.shape[:-1], dtype=torch.bool) if mask is None else mask.to(X.device, torch.bool)
    if mask is not None:
        X = X.masked_fill(~valid[..., None], 0.0)
    if massive is not None:
        tokens, dimensions = _massive(X, number("massive", massive, 1.0, math.inf, above=True))
        valid = valid & ~tokens
        # Products: a masked fill takes twice as long. What is massive is finite, so that 0 times it is 0.
        X = (X * (~tokens)[..., None]).mul_((~dimensions)[..., None, :])
    return X, valid


def massive_activations(X: Tensor, mask: Tensor | None = None, *, multiple: float = 100.0) -> tuple[Tensor, Tensor]:
    """Return the tokens and the dimensions that have massive activations.

    In healthy language models, a few fixed dimensions of a few tokens, above all of the first token, are up to 100 000
    times as large as the rest (Sun, Chen, Kolter and Liu, "Massive Activations in Large Language Models",
    arXiv:2402.17762). They bring every rank near 1 and hide the other tokens.

    The rule applies to each sequence alone. The peak of a token or of a dimension is its largest magnitude. A token is
    massive if its peak exceeds ``multiple`` times the median peak of the tokens. A dimension is massive if its peak
    exceeds ``multiple`` times the median peak of the dimensions. Tokens and dimensions of zeros do not count in the
    median. Hence at most half of the tokens and half of the dimensions are massive. A dimension that is large in every
    token is massive, and no token is. A token that is large in every dimension is massive, and no dimension is. A peak
    that is not finite is never massive: it is a fault, and stays visible.

    Args:
        X: ``(..., tokens, width)``.
        mask: ``(..., tokens)``, true or non-zero where a token counts.
        multiple: A number above 1. The default, 100, is a choice of this package.

    Returns:
        Massive tokens, ``(..., tokens)``, and massive dimensions, ``(..., width)``, both boolean.

    Raises:
        ConfigurationError: The shapes do not fit, or the multiple is not a number above 1.

    Example:
        >>> X = torch.ones(4, 8)
        >>> X[0, 3] = 1000
        >>> tokens, dimensions = massive_activations(X)
        >>> tokens.nonzero().flatten().tolist(), dimensions.nonzero().flatten().tolist()
        ([0], [3])
    """
    multiple = number("multiple", multiple, 1.0, math.inf, above=True)
    return _massive(select(X, mask)[0], multiple)


def _massive(X: Tensor, multiple: float) -> tuple[Tensor, Tensor]:
    tokens, dimensions = (_peaks(X.detach(), dim) for dim in (-1, -2))
    return _outliers(tokens, multiple), _outliers(dimensions, multiple)


def _peaks(X: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Return the largest magnitudes along dimensions, without a copy of X."""
    return torch.maximum(X.amax(dim), X.amin(dim).neg())


def _outliers(peaks: Tensor, multiple: float) -> Tensor:
    median = peaks.masked_fill(peaks == 0, math.nan).nanmedian(-1, keepdim=True).values
    return (peaks / multiple > median) & peaks.isfinite()


def centred_tokens(X: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return X minus the mean token, zero where a token does not count.

    The first token is subtracted before the mean is taken, so that equal tokens give exact zeros. Otherwise the
    rounding error of the mean would remain, and a rank would measure it.

    Args:
        X: ``(..., tokens, width)``, zero where a token does not count.
        valid: ``(..., tokens)``, boolean; all tokens count without it, which is cheaper.

    Returns:
        ``(..., tokens, width)``.
    """
    # In place from the first difference on: the memory of a copy costs more than what is done to it.
    if valid is None:
        X = X - X[..., :1, :]
        return X.sub_(X.mean(-2, keepdim=True))
    first = valid.to(torch.uint8).argmax(-1, keepdim=True)[..., None].expand(*X.shape[:-2], 1, X.shape[-1])
    present = valid[..., None].to(X.dtype)
    X = (X - X.gather(-2, first)).mul_(present)
    count = valid.sum(-1)[..., None, None].clamp(min=1)
    return X.addcmul_(X.sum(-2, keepdim=True) / count, present, value=-1)


def unit_scaled(X: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each matrix by its largest magnitude, so that squares neither overflow nor vanish.

    Args:
        X: ``(..., rows, columns)``.

    Returns:
        The scaled matrices, and whether each is measurable, ``(...)``. A matrix of zeros, or with a value that is not
        finite, is not measurable and comes back as zeros.
    """
    # Detached: results that are invariant to scale have no gradient along it.
    size = _peaks(X.detach(), (-2, -1))
    measurable = (size > 0) & size.isfinite()
    scale = torch.where(measurable, size, 1.0)[..., None, None]
    return (X / scale).masked_fill_(~measurable[..., None, None], 0.0), measurable

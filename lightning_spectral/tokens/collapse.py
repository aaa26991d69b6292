"""Distance of the tokens of a sequence, and of the samples of a batch, from being one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.tokens.selection import centred_tokens, select, unit_scaled

__all__ = ["relative_residual", "sample_residual", "token_residual", "token_similarity"]


def token_residual(X: Tensor, mask: Tensor | None = None, *, massive: float | None = None) -> Tensor:
    """Return ‖X − 1x̄ᵀ‖_F / ‖X‖_F, where x̄ is the mean token.

    The value is 0 if all tokens are one vector, and 1 if their mean is zero. x̄ minimizes ‖X − 1xᵀ‖_F over all x. Dong,
    Cordonnier and Loukas, "Attention is not all you need" (arXiv:2103.03404), define the residual.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts; the same as dropping the others.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)`` in float64 (float32 on a device without float64), from 0 to 1. NaN if all tokens are zero, no token
        counts, or a value is not finite. A single token gives 0.

    Raises:
        ConfigurationError: The shapes do not fit, or ``massive`` is not above 1.

    Example:
        >>> round(token_residual(torch.eye(2)).item(), 1)
        0.7
    """
    everything = mask is None and massive is None
    X, valid = select(X, mask, massive=massive)
    X, _ = unit_scaled(X)
    return relative_residual(X, None if everything else valid)


def relative_residual(X: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the token residual of tokens whose squares neither overflow nor vanish, as float32 in float64 does not.

    Args:
        X: ``(..., tokens, width)``, zero where a token does not count.
        valid: ``(..., tokens)``, boolean; all tokens count without it, which is cheaper.

    Returns:
        As :func:`token_residual`.
    """
    size = torch.linalg.vector_norm(X, dim=(-2, -1))
    residual = torch.linalg.vector_norm(centred_tokens(X, valid), dim=(-2, -1))
    measurable = (size.detach() > 0) & size.detach().isfinite()
    return torch.where(measurable, residual / torch.where(measurable, size, 1.0), math.nan)


def sample_residual(X: Tensor, *, massive: float | None = None) -> Tensor:
    """Return ‖X − X̄‖_F / ‖X‖_F, where X̄ is the mean over samples: the token residual with samples in place of tokens.

    The value is 0 if a network gives the same for every sample, whatever it gives for different tokens, and near
    √(1 − 1/n) for n samples that have nothing in common. Jing, Vincent, LeCun and Tian, "Understanding Dimensional
    Collapse in Contrastive Self-supervised Learning" (arXiv:2110.09348), call the value 0 complete collapse.

    Args:
        X: ``(..., samples, tokens, width)``, of any real dtype.
        massive: Leave out, in each sample, :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)`` in float64 (float32 on a device without float64), from 0 to 1. NaN if all samples are zero, there is
        only one, or a value is not finite.

    Raises:
        ConfigurationError: The shapes do not fit, or ``massive`` is not above 1.

    Example:
        >>> round(sample_residual(torch.ones(2, 3, 4)).item(), 1)
        0.0
    """
    if X.dim() < 3 or not X.shape[-3]:
        raise ConfigurationError(f"X has the shape {tuple(X.shape)}: expected (..., samples, tokens, width), none of 0")
    selected, _ = select(X, massive=massive)
    residual = token_residual(selected.flatten(-2))
    return residual if X.shape[-3] > 1 else torch.full_like(residual, math.nan)


def token_similarity(X: Tensor, mask: Tensor | None = None, *, massive: float | None = None) -> Tensor:
    """Return the mean cosine over all pairs of different tokens.

    With unit tokens uᵢ, the closed form is (‖Σuᵢ‖² − n) / (n(n − 1)). No n × n matrix is formed. Tokens that are zero
    have no direction and are left out.

    Args:
        X: ``(..., tokens, width)``, of any real dtype.
        mask: ``(..., tokens)``, true or non-zero where a token counts; the same as dropping the others.
        massive: Leave out :func:`massive_activations` above this multiple of the median.

    Returns:
        ``(...)`` in float64 (float32 on a device without float64), from −1/(n − 1) to 1. NaN if fewer than
        two tokens have a direction, or a value is not finite.

    Raises:
        ConfigurationError: The shapes do not fit, or ``massive`` is not above 1.

    Example:
        >>> round(token_similarity(torch.ones(3, 4)).item(), 1)
        1.0
    """
    X, _ = select(X, mask, massive=massive)
    finite = X.detach().isfinite().all(-1).all(-1)
    tokens, present = unit_scaled(X[..., None, :])
    length = torch.linalg.vector_norm(tokens[..., 0, :], dim=-1, keepdim=True)
    units = tokens[..., 0, :] / torch.where(present[..., None], length, 1.0)
    n = present.sum(-1)
    squares = units.square().sum((-2, -1))  # n, with the same rounding as the sum over all pairs
    pairs = torch.where(n > 1, n * (n - 1), 1)
    cosine = (units.sum(-2).square().sum(-1) - squares) / pairs
    return torch.where(finite & (n > 1), cosine, math.nan)

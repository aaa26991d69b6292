"""How large the logits of attention can be, from the weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.sharded import is_sharded
from lightning_spectral.measuring.linearize import linearize
from lightning_spectral.records import Branch, Factor, Path, Projection, Scores
from lightning_spectral.records.layout import arranged
from lightning_spectral.weights.protocol import Weights

__all__ = ["logit_bound"]


def logit_bound(weights: Weights, branches: Iterable[Branch]) -> float | None:
    """Return what no logit of attention exceeds in magnitude, the largest of all heads.

    A logit is scale · qᵀk. Let x be the normalized input of a token, of size ‖x‖₂ = √width, before the gain γ of the
    norm. Then q = W_q diag(γ) x and k = W_k diag(γ) x, for the rows W_q and W_k of one head, and

        |logit| ≤ scale · width · ‖diag(γ) W_qᵀ W_k diag(γ)‖₂          nothing between the matrices
        |logit| ≤ scale · width · ‖W_q diag(γ)‖₂ ‖W_k diag(γ)‖₂        rotary position codes, which preserve norms
        |logit| ≤ scale · ‖q‖₂ ‖k‖₂,  ‖q‖₂ ≤ √d · max |γ_q|             a norm of d channels behind W_q (QK-norm)

    Where a norm stands behind one of the two matrices, its size takes the place of √width · ‖W diag(γ)‖₂. The first is
    the quantity of Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (2023,
    arXiv:2303.06296). QK-Clip (arXiv:2507.20534) acts on the largest logit that is seen.

    Biases (of a projection, of a norm, of positions) are left out. Where no norm stands in front of the branch, the
    bound is for streams of size √width.

    Args:
        weights: Those of the model.
        branches: The attention of one block, as it was found.

    Returns:
        The bound, up to rounding; ``None`` where the logits were not understood (several matrices in a row, adapters),
        or W_q or W_k is sharded.
    """
    scores = [item for branch in branches for item in branch.scores]
    bounds = [_bound(weights, item) for item in scores]
    known = [bound for bound in bounds if bound is not None and math.isfinite(bound)]
    return max(known) if known and len(known) == len(bounds) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """The queries or the keys of some heads.

    Attributes:
        sizes: ``(heads,)``, the largest ‖q‖₂.
        matrices: ``(heads, d, width)``, √width · W_q diag(γ), ``None`` where a norm stands behind it.
    """

    sizes: Tensor
    matrices: Tensor | None


def _bound(weights: Weights, scores: Scores) -> float | None:
    queries, keys = zip(*scores.heads, strict=True)
    try:
        q = _side(weights, scores.query, queries, scores.width)
        k = _side(weights, scores.key, keys, scores.width)
    except (ConfigurationError, AttributeError, RuntimeError, IndexError):
        return None
    if q is None or k is None:
        return None
    if scores.rotated or q.matrices is None or k.matrices is None:
        return abs(scores.scale) * float((q.sizes * k.sizes).max())
    # σ₁(AᵀB)² is the largest eigenvalue of (AAᵀ)(BBᵀ), and of RᵀBBᵀR for AAᵀ = RRᵀ: matrices of d rows.
    values, vectors = torch.linalg.eigh(_gram(q.matrices))
    R = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return abs(scores.scale) * float(torch.linalg.eigvalsh(R.mT @ _gram(k.matrices) @ R).amax().clamp_min(0).sqrt())


def _side(weights: Weights, projection: Projection, starts: Sequence[int], width: int) -> _Side | None:
    if projection.size is not None:
        gain = _gain(weights, projection.factors)
        largest = 1.0 if gain is None else float(gain.abs().max())
        return _Side(torch.full((len(starts),), projection.size * largest, dtype=torch.float64, device="cpu"), None)
    matrix, *front = projection.factors
    assert matrix.parameter is not None
    with torch.no_grad(), weights.read(matrix.parameter) as weight:
        if is_sharded(weight):
            return None
        assert isinstance(weight, Tensor)
        rows = arranged(weight.detach(), matrix.layout)
        rows = rows.reshape(-1, rows.shape[-1])
        heads = torch.stack([rows[start : start + width] for start in starts])
    heads = (heads if heads.dtype == torch.float64 else heads.float()) * math.sqrt(heads.shape[-1])
    gain = _gain(weights, front)
    heads = heads if gain is None else heads * gain.to(heads)
    return _Side(torch.linalg.eigvalsh(_gram(heads))[:, -1].clamp_min(0).sqrt(), heads)


def _gram(matrices: Tensor) -> Tensor:
    """Return AAᵀ of every matrix, in float64 on the CPU."""
    return (matrices @ matrices.mT).cpu().double()


def _gain(weights: Weights, factors: Sequence[Factor]) -> Tensor | None:
    """Return the product of some gains and multipliers as a vector or a number, ``None`` where there is none."""
    product: Tensor | None = None
    for factor in factors:
        if factor.parameter is None:
            found = torch.tensor(factor.constant, device="cpu")
        else:
            diagonal = linearize(weights, Path((replace(factor, role="pre_norm"),)), "circuit").operator
            found = diagonal.matmat(torch.ones(diagonal.shape[1], 1, dtype=diagonal.dtype, device=diagonal.device))[
                :, 0
            ]
        product = found if product is None else product * found.to(product.device)
    return product

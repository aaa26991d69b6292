"""The zero-data iteration of 'The 1:1 Rule': the image of a sphere under the weights of a model alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_spectral import _checks
from lightning_spectral.analysis.covariance import product_spectrum
from lightning_spectral.discovery.find import asked_blocks
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.measuring.linearize import WeightLinearization, linearize
from lightning_spectral.records import Branch, ResidualBlock
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.protocol import Weights
from lightning_spectral.weights.scaled import with_scales

__all__ = ["CovarianceTrajectory", "covariance_trajectory"]


@dataclass(frozen=True, slots=True)
class CovarianceTrajectory:
    """The covariance C_ℓ ∝ P Pᵀ with P = A_ℓ … A_1, after each block ℓ. Every tuple has one entry per block.

    The numbers describe the weights, not the residual stream: A has no norm, no activation, no attention pattern and no
    cross term between its branches. The effective rank of any long product tends to 1.

    Attributes:
        names: Module paths of the blocks.
        linearization: The rule that turned branches into matrices. Never compare across rules.
        effective_rank: exp H(λ/Σλ) over the eigenvalues λ = σ² of C, as in the paper.
        effective_rank_sigma: exp H(σ/Σσ) over the singular values of P (Roy and Vetterli, 2007), which is larger.
        log_condition: ln of the condition number of C, which is twice the one of P. Published condition numbers near
            1e12 are not comparable: they are the threshold 1/(ε d) below which eigenvalues were dropped.
        at_floor: Whether ``log_condition`` is at a numerical floor, and so a lower bound.
        gain: ‖A‖₂ of each block alone.
        skipped: Names of the blocks that count as the identity because they have no weight linearization.
    """

    names: tuple[str, ...]
    linearization: WeightLinearization
    effective_rank: tuple[float, ...]
    effective_rank_sigma: tuple[float, ...]
    log_condition: tuple[float, ...]
    at_floor: tuple[bool, ...]
    gain: tuple[float, ...]
    skipped: tuple[str, ...] = ()


def covariance_trajectory(
    model: nn.Module,
    blocks: Sequence[ResidualBlock] | None = None,
    *,
    batch: Any = None,
    linearization: WeightLinearization = "circuit",
    missing: Literal["raise", "identity"] = "raise",
) -> CovarianceTrajectory:
    """Iterate C ← A C Aᵀ / ‖·‖₂ from C = I over the blocks, with A = I + W_mlp + W_attn ('The 1:1 Rule', unreviewed).

    The iteration runs on the singular values of the product instead of on C (see
    :mod:`lightning_spectral.analysis.covariance`), so that values below ε of the largest one are not lost. A missing
    branch adds nothing. Cross-attention does not occur in the paper and is left out. Mixtures of experts are refused,
    because their sum depends on the input. Encoder and decoder are two stacks: pass the blocks of one.

    Every A is formed, one at a time, in float64: a few factorizations of a width × width matrix per block.

    Args:
        model: Any module with residual blocks.
        blocks: The blocks, in the order of execution; found in the model by default.
        linearization: ``"paper"`` (W_mlp = W_down W_up; W_attn = W_o, or W_o W_oᵀ where W_o is not square) or
            ``"circuit"`` (W_attn = W_o W_v, with norm gains and residual multipliers).
        missing: Treatment of a block with a branch that has no matrix (state spaces, mixtures of experts, packed
            weights): ``"raise"``, or ``"identity"`` to leave the whole block out (see ``skipped``).
        batch: Example input for finding the blocks, as for :func:`~lightning_spectral.measure`.

    Returns:
        Effective ranks, condition numbers and gains, one per block.

    Raises:
        BlocksNotFoundError: The model has no residual block.
        ExampleInputError: The model could not be run on any example input.
        ConfigurationError: An argument is invalid, blocks differ in width, or, with ``missing="raise"``, blocks have no
            weight linearization; the message names all of them.

    Example:
        >>> trajectory = covariance_trajectory(model)
        >>> [round(rank) for rank in trajectory.effective_rank]
        [27, 22, 20]
    """
    _checks.linearization_of_weights(linearization, get_args(WeightLinearization))
    _checks.choice("missing", missing, ("raise", "identity"))
    blocks = with_scales(ModelWeights(model), asked_blocks(model, blocks, batch, "covariance_trajectory"))
    paths = (path for block in blocks for branch in block.branches for path in branch.paths)
    weights, _ = ModelWeights(model).gathered(paths)
    usable = [block for block in blocks if not _obstacle(weights, block, linearization)]
    skipped = [block for block in blocks if block not in usable]
    if not usable or (skipped and missing == "raise"):
        advice = (
            "pass the other blocks as `blocks`, or missing='identity' to leave these out" if usable else "all of them"
        )
        lines = [f"  {block.name}: {_obstacle(weights, block, linearization)}" for block in skipped]
        raise ConfigurationError("\n".join([f"blocks without a weight linearization ({advice}):", *lines]))
    return _trajectory(weights, blocks, skipped, linearization)


def _branches(block: ResidualBlock) -> Iterator[tuple[str, Branch]]:
    for word, branch in (("attention", block.attention), ("mlp", block.mlp)):
        if branch is not None:
            yield word, branch


def _obstacle(weights: Weights, block: ResidualBlock, linearization: WeightLinearization) -> str | None:
    """Return why a block has no matrix, ``None`` if it has one."""
    for word, branch in _branches(block):
        if len(branch.paths) > 1:
            return f"{word}: {len(branch.paths)} experts, whose sum is no single matrix"
        if not branch.paths:
            return f"{word}: {branch.reason or 'the branch has no factors'}"
        try:
            item = linearize(weights, branch.paths[0], linearization)
        except (ConfigurationError, AttributeError) as error:
            return f"{word}: {error}"
        if item.operator.balanced() is None:
            return f"{word}: weights are not finite (NaN or Inf)"
    return None if block.branches else "it has no branch"


def _trajectory(
    weights: Weights,
    blocks: Sequence[ResidualBlock],
    skipped: Sequence[ResidualBlock],
    linearization: WeightLinearization,
) -> CovarianceTrajectory:
    used = {
        block: linearize(weights, next(_branches(block))[1].paths[0], linearization).operator.shape[0]
        for block in blocks
        if block not in skipped
    }
    if len(set(used.values())) > 1:
        found = ", ".join(f"{block.name} {width}" for block, width in used.items())
        raise ConfigurationError(f"blocks must have one width, got {found}: pass `blocks` of one stack")
    (width,) = set(used.values())
    gains: list[float] = []

    def matrices() -> Iterator[Tensor]:
        for block in blocks:
            A = torch.eye(width, dtype=torch.float64, device="cpu")
            for _, branch in _branches(block) if block in used else ():
                A += _dense(weights, branch, linearization)
            gains.append(float(torch.linalg.matrix_norm(A, ord=2)))
            yield A

    spectrum = product_spectrum(matrices())
    return CovarianceTrajectory(
        names=tuple(block.name for block in blocks),
        linearization=linearization,
        effective_rank=tuple(spectrum.effective_rank(power=2).tolist()),
        effective_rank_sigma=tuple(spectrum.effective_rank(power=1).tolist()),
        log_condition=tuple(spectrum.log_condition.tolist()),
        at_floor=tuple(spectrum.at_floor.tolist()),
        gain=tuple(gains),
        skipped=tuple(block.name for block in skipped),
    )


def _dense(weights: Weights, branch: Branch, linearization: WeightLinearization) -> Tensor:
    """Return the matrix of a branch. A norm behind a matrix divides by the expected size of its input."""
    item = linearize(weights, branch.paths[0], linearization)
    matrix = item.operator.dense()
    if item.normalized is None:
        return matrix
    right = item.normalized.dense()
    return matrix * (math.sqrt(len(right)) / float(torch.linalg.matrix_norm(right)))

"""Whether a model was trained before: the weights of a fresh one have marks that training takes from them.

Those of a fresh model have constant norm gains, and matrices of independent or orthogonal entries, whose spectral norm
lies at the edge (√m + √n) · ‖W‖_F / √(mn) of random matrices or below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from lightning_spectral.linalg import LinearOperator, RandomizedSVD, Solver, frobenius_norm
from lightning_spectral.linalg.sharding.sharded import replicated
from lightning_spectral.measuring.linearize import linearize
from lightning_spectral.records import Factor, Path, ResidualBlock
from lightning_spectral.weights.protocol import Weights

__all__ = ["sign_of_training"]

_NORMS = ("pre_norm", "inner_norm", "post_norm")
_MATRICES = ("output", "value", "latent", "down", "up")
# ‖G‖₂ of m × n standard normal entries exceeds √m + √n + t with a probability below exp(−t²/2) (Davidson and Szarek);
# the factor is for entries of other distributions.
_DEVIATIONS, _SLACK = 5.0, 1.1


def sign_of_training(weights: Weights, blocks: Sequence[ResidualBlock], solver: Solver | None = None) -> str | None:
    """Say by what the branches of MLP and attention look trained; ``None`` where nothing does.

    A model looks trained where the gain of a norm on one of its paths is not constant, which takes one optimizer step
    in float32, or where a spectral norm exceeds 1.1 · (1 + 5 / (√m + √n)) times the edge of random matrices.

    Args:
        weights: Those of the model. All processes of a sharded one call this together.
        blocks: Its blocks.
        solver: How spectral norms are computed, :class:`RandomizedSVD` by default.
    """
    branches = (branch for block in blocks for branch in (*block.attention_branches, *block.mlp_branches))
    factors = dict.fromkeys(factor for branch in branches for factor in branch.factors)
    weights, _ = weights.gathered([Path(tuple(factors))])
    return _trained_gain(weights, factors) or _trained_matrix(weights, factors, solver)


def _trained_gain(weights: Weights, factors: Iterable[Factor]) -> str | None:
    for factor in factors:
        if factor.role not in _NORMS or factor.parameter is None:
            continue
        with weights.read(factor.parameter) as gain:
            low, high = map(float, replicated(gain).detach().aminmax())
        if low != high:
            return f"the norm gain {factor.parameter} is not constant ({(low + high) / 2:.4g} ± {(high - low) / 2:.1g})"
    return None


def _trained_matrix(weights: Weights, factors: Iterable[Factor], solver: Solver | None) -> str | None:
    matrices: dict[Factor, LinearOperator] = {}
    for factor in factors:
        if factor.role in _MATRICES:
            # A repeated row would double a singular value.
            rows = None if factor.rows is None else tuple(dict.fromkeys(factor.rows))
            once = replace(factor, rows=rows)
            matrices[once] = linearize(weights, Path((once,)), "circuit").operator
    solver = RandomizedSVD() if solver is None else solver
    operators = list(matrices.values())
    norms, _ = solver.compute(operators, solver.init(operators))
    for factor, operator, norm in zip(matrices, operators, norms, strict=True):
        size = float(frobenius_norm(operator, generator=torch.Generator().manual_seed(0), n_probes=128))
        left, right = map(math.sqrt, operator.shape)
        edge = (left + right) * size / (left * right)
        if norm.value is not None and norm.value > _SLACK * (1 + _DEVIATIONS / (left + right)) * edge:
            return (
                f"the spectral norm of {factor.parameter} is {norm.value / edge:.1f} times that of a random matrix of "
                "its size"
            )
    return None

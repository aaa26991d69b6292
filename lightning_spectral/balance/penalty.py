"""The balance penalty: a differentiable scalar that is positive where a spectral ratio has left the safe zone.

*The gradient.* The largest singular value of A(θ) has the derivative uᵀ(dA)v with fixed singular vectors u, v: to first
order, the change of the vectors does not change the value (the envelope theorem; Yoshida and Miyato, "Spectral Norm
Regularization for Improving the Generalizability of Deep Learning", 2017, use it for one matrix). So v comes from the
solver, without a graph, and the penalty differentiates ‖A(θ)v‖ at this v:

    d‖Av‖ = uᵀ(dA)v   with   u = Av/‖Av‖

The graph is a chain of products of matrices with one vector. It contains no decomposition, and no product of matrices
is formed, forward or backward. The gradient of each matrix is one outer product, of the size of the matrix.

*Several largest singular values.* If σ₁ = σ₂, there is no derivative. The result is a subgradient: every unit vector v
of the singular space gives one. The same holds for experts of equal norm.

*A norm behind a matrix* divides the branch by ‖R‖_F / √d, where R is the product to its right (see
:mod:`lightning_spectral.measuring.linearize`). This is differentiated too, as ‖RP‖_F. Up to a width of 512, P is the
identity and the norm is exact. Above, P holds the singular subspace V of the solver and 128 fixed random sign vectors
projected off V, the estimator of :func:`~lightning_spectral.linalg.frobenius_norm`. The norm then has an error of about
1 %. The gradient is coarser: 20 % off for random weights of rank 64 and width 600.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_spectral import _checks
from lightning_spectral.discovery import find_blocks
from lightning_spectral.discovery.asked import check_blocks, check_model
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import (
    Diagonal,
    LinearOperator,
    Matrix,
    RandomizedSVD,
    Solver,
    SolverState,
)
from lightning_spectral.linalg.leaves import Leaf, multiplied
from lightning_spectral.linalg.solvers import SolverChoice, solver_named
from lightning_spectral.measuring.linearize import Linearized, WeightLinearization, linearize_kind
from lightning_spectral.records import Branch, Path, ResidualBlock
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.protocol import Weights
from lightning_spectral.weights.scaled import with_scales

__all__ = ["balance_penalty"]

# As in measuring: the Frobenius norm is exact up to this width, and estimated by this many random signs above.
_EXACT_WIDTH, _PROBES = 512, 128
_ZERO = "the branch is zero"
# An error δ of the singular vector changes the value by O(δ²) but the gradient by O(δ). Hence tolerances far below the
# tolerances of measuring, and fewer columns to keep the cost down.
_SOLVER = RandomizedSVD(n_components=4, n_oversamples=4, tolerance=1e-6, warm_tolerance=1e-6)


_Kind = tuple[Branch, ...]  # the branches of one kind in a block; their operators are added up
_Terms = tuple[Path, ...]  # the paths whose sum is one operator


@dataclass(slots=True, eq=False)
class _Memory:
    """Memory of a model between calls, without weights: ``state`` is the warm start of ``solver`` for ``paths``."""

    found: tuple[ResidualBlock, ...] | None = None
    solver: SolverChoice = None
    paths: tuple[tuple[WeightLinearization, _Terms], ...] = ()
    state: SolverState | None = None


_MEMORIES: WeakKeyDictionary[nn.Module, _Memory] = WeakKeyDictionary()


def balance_penalty(
    model: nn.Module,
    blocks: Sequence[ResidualBlock] | None = None,
    *,
    safe_zone: tuple[float, float] = (0.5, 2.0),
    linearization: WeightLinearization = "circuit",
    solver: SolverChoice = None,
    batch: Any = None,
) -> Tensor:
    """Return a penalty on spectral ratios outside the safe zone, to be added to the loss.

    .. code-block:: python

        def training_step(self, batch, batch_idx):
            return self.loss(batch) + 0.1 * balance_penalty(self)

    The penalty is the mean of hinge(ln ρ)² over the measurable blocks. ρ is the spectral ratio, and hinge is the
    distance of ln ρ from the safe zone. Inside the safe zone the penalty is exactly 0, without gradient and without a
    backward pass. It depends only on the weights, so it need not be called in every step.

    The first call finds the blocks, in evaluation mode. Parameters, buffers, training flags and random streams are
    unchanged afterwards, so the call may stand in a training step, under autocast or ``torch.no_grad``. The blocks and
    the singular vectors are kept as long as the model exists, and the next call starts from them. With other blocks,
    another linearization or another solver, the start is cold. Copies of the model and checkpoints do not contain the
    vectors: the first call after a resume starts cold, and agrees with a warm start within the tolerance of the solver.

    Args:
        model: Any module with residual blocks; in a LightningModule usually ``self``.
        blocks: The blocks to balance; found in the model by default. If you replace modules or branches of the model
            later, pass the blocks that :func:`find_blocks` finds then.
        safe_zone: The interval of ratios without a penalty.
        linearization: ``"circuit"`` or ``"paper"``, as in :func:`measure`. The optimizer can lower a ``"paper"``
            penalty without changing the function (W_o times c, W_v divided by c); ``"circuit"`` is invariant to this.
        solver: How singular vectors are computed, by default a :class:`RandomizedSVD` with tolerances of 1e-6. The
            gradients of float32 GPTs of width 176 and 512, trained by AdamW from random weights, whose spectra have no
            gap, were within 5e-4 of exact ones in the first steps, and within 1e-4 after 30.
        batch: Example input for finding the blocks, if none can be guessed: a tensor, a tuple of positional arguments
            or a dict of keyword arguments. Used in the first call only.

    Returns:
        A scalar of at least 0 on the device of the weights, in float32, or in float64 if the weights are float64. It
        can be differentiated once.

    Raises:
        BlocksNotFoundError: The model has no residual block.
        ExampleInputError: The model could not be run on any example input.
        ConfigurationError: An argument is invalid, or no block has a ratio at the moment; the message gives the
            reasons.

    Example:
        >>> balance_penalty(model)  # every ratio is inside
        tensor(0., requires_grad=True)
        >>> balance_penalty(model, safe_zone=(1.5, 2.0)).item() > 0
        True
    """
    low, high = map(math.log, _checks.interval("safe_zone", safe_zone))
    _checks.linearization_of_weights(linearization, get_args(WeightLinearization))
    check_model(model, "balance_penalty")
    check_blocks(blocks, "balance_penalty(model, find_blocks(model))")
    memory = _MEMORIES.setdefault(model, _Memory())
    with _plain_arithmetic(model):
        weights = ModelWeights(model)
        if blocks is None:
            memory.found = blocks = memory.found or find_blocks(model, batch=batch)
        chosen = solver_named(solver, _SOLVER)
        log_ratios = _log_ratios(weights, with_scales(weights, blocks), linearization, chosen, memory)
        excesses = [torch.clamp(torch.maximum(low - value, value - high), min=0) for value in log_ratios]
        # A block inside the safe zone has no gradient. Leaving it out saves its backward pass.
        outside = [excess for excess in excesses if excess > 0]
        if not outside:
            return torch.zeros_like(excesses[0], requires_grad=torch.is_grad_enabled())
        return torch.stack([excess.to(outside[0].device) for excess in outside]).square().sum() / len(excesses)


@contextmanager
def _plain_arithmetic(model: nn.Module) -> Iterator[None]:
    """Without autocast and inference mode: the next training step may use singular vectors of a validation step."""
    graph = torch.is_grad_enabled()  # inference_mode(False) enables it
    with ExitStack() as stack, torch.inference_mode(False), torch.set_grad_enabled(graph):
        for kind in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _log_ratios(
    weights: Weights,
    blocks: Sequence[ResidualBlock],
    linearization: WeightLinearization,
    solver: Solver,
    memory: _Memory,
) -> list[Tensor]:
    """Return ln ρ of every measurable block, with a graph. Raise an error if no block is measurable."""
    kinds = dict.fromkeys(kind for block in blocks for kind in (block.attention_branches, block.mlp_branches) if kind)
    built = {kind: linearize_kind(weights, kind, linearization, differentiable=True) for kind in kinds}
    items = [(chosen.paths, item) for parts in built.values() if not isinstance(parts, str) for chosen, item in parts]
    norms = iter(_log_norms(items, linearization, solver, memory))
    values: dict[_Kind, Tensor | str] = {(): "the block has no such branch"}
    for kind, linearized in built.items():
        values[kind] = linearized if isinstance(linearized, str) else _largest([next(norms) for _ in linearized])
    ratios: list[Tensor] = []
    reasons: list[str] = []
    for block in blocks:
        over, under = values[block.mlp_branches], values[block.attention_branches]
        if isinstance(over, Tensor) and isinstance(under, Tensor):
            ratios.append(over - under.to(over.device))
        both = (("mlp", over), ("attention", under))
        reasons += [f"{block.name} {word}: {value}" for word, value in both if isinstance(value, str)]
    if not ratios:
        raise ConfigurationError(
            f"no block has a spectral ratio to balance ({'; '.join(reasons[:4]) or 'blocks is empty'}). Pass `blocks` "
            "whose attention and MLP branch can both be measured (`print(measure(model))` shows them), or leave the "
            "penalty out until branches that are initialized to zero have left it"
        )
    return ratios


def _log_norms(
    items: Sequence[tuple[_Terms, Linearized]], linearization: WeightLinearization, solver: Solver, memory: _Memory
) -> list[Tensor | str]:
    """Return ln ‖A‖₂ of every operator with a graph, or the reason for none. Equal operators start warm."""
    operators = [item.operator for _, item in items]
    paths = tuple((linearization, terms) for terms, _ in items)
    with torch.no_grad():
        if memory.state is None or memory.paths != paths or memory.solver != solver:
            memory.paths, memory.solver, memory.state = paths, solver, solver.init(operators)
        norms, memory.state = solver.compute(operators, memory.state)
    return [
        norm.reason or _ZERO if not norm.value or subspace is None else _log_norm(item, subspace)
        for (_, item), norm, subspace in zip(items, norms, memory.state.subspaces, strict=True)
    ]


def _largest(norms: Sequence[Tensor | str]) -> Tensor | str:
    """Return the largest norm of a kind (over the experts of a mixture), or the reason for a missing norm."""
    known = [norm for norm in norms if isinstance(norm, Tensor)]
    failed = [norm for norm in norms if isinstance(norm, str) and norm != _ZERO]
    if not all(norm.isfinite() for norm in known):
        failed.append("its products are outside the range of its dtype")
    if failed or not known:
        return failed[0] if failed else _ZERO
    return max(known, key=lambda norm: float(norm.detach()))


def _log_norm(item: Linearized, subspace: Tensor) -> Tensor:
    """Return ln ‖A‖₂ of a branch, with the division by a norm behind the matrix if there is one.

    Args:
        item: The operator.
        subspace: ``(n, p)``, right singular vectors, the dominant one first.
    """
    value = _log_length(multiplied(item.operator, subspace[:, :1], _with_graph))
    right = item.normalized
    if right is None:
        return value
    return (
        value + 0.5 * math.log(right.shape[0]) - _log_length(multiplied(right, _probes(right, subspace), _with_graph))
    )


def _log_length(X: Tensor) -> Tensor:
    """Return ln of the Frobenius norm, without overflow or underflow of the squares."""
    largest = X.detach().abs().amax()
    length: Tensor = torch.linalg.vector_norm(X / largest)
    return length.log() + largest.log()


def _probes(operator: LinearOperator, V: Tensor) -> Tensor:
    """Return P, ``(n, k)``, with E‖AP‖_F² = ‖A‖_F². For narrow operators P is the identity."""
    n = operator.shape[1]
    if n <= _EXACT_WIDTH:
        return torch.eye(n, dtype=operator.dtype, device=operator.device)
    signs = torch.randint(0, 2, (n, _PROBES), generator=torch.Generator().manual_seed(0), device="cpu")
    V, G = V.to(operator.dtype), (2 * signs - 1).to(operator.device, operator.dtype)
    return torch.cat([V, (G - V @ (V.mT @ G)) / math.sqrt(_PROBES)], dim=1)


def _with_graph(leaf: Leaf) -> Tensor:
    """Return the product of a leaf, with a graph that reaches its parameter."""
    match leaf.operator:
        case Diagonal():
            return leaf.X * leaf.operator.gain.to(leaf.X.dtype).unsqueeze(-1)
        case Matrix():
            weight = leaf.operator.weight
            arguments = (weight, leaf.X, leaf.operator, leaf.transposed)
            product: Tensor = _MatrixProduct.apply(*arguments)  # type: ignore[no-untyped-call]
            return product
        case _:  # holds no parameter
            return leaf.multiplied()


class _MatrixProduct(torch.autograd.Function):
    """WX or WᵀX with W in its stored layout and dtype, in pieces if needed, forward and backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, X: Tensor, matrix: Matrix, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight, X)  # autograd raises if the weight changes before the backward pass
        ctx.matrix, ctx.transposed = matrix, transposed
        return matrix.adjoint(X) if transposed else matrix.matmat(X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, X = ctx.saved_tensors
        of_weight = of_X = None
        with torch.autocast(G.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                left, right = (X, G) if ctx.transposed else (G, X)
                of_weight = (left @ right.mT).to(weight.dtype).reshape(weight.shape)
            if ctx.needs_input_grad[1]:
                of_X = ctx.matrix.matmat(G) if ctx.transposed else ctx.matrix.adjoint(G)
        return of_weight, of_X, None, None

"""Turn a branch, which holds names, into linear operators, which hold the weights of this moment.

``"circuit"``: the product of all factors from the site back to the stream. A norm *behind* a matrix divides by the
expected size of its input, ‖R‖_F / √d for everything R to its right and d channels: without that, the scale of R
would move the measured norm although it has no effect on the function. A scalar right of a norm divides out again, so
of several norms only the leftmost counts.

``"paper"``: the definition of 'The 1:1 Rule', number for number: W_down · W_up, and W_o, or W_o W_oᵀ where W_o is not
square, each times the residual multipliers.

An *adapter* adds its product to a matrix W when the model runs, such as α/r · BA for low-rank ones. What the network
computes with is the sum, so the sum is the matrix of the branch; neither it nor BA is formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_spectral.discovery.trace.surprises import SURPRISES, surprise
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import (
    Adjoint,
    Diagonal,
    LinearOperator,
    Matrix,
    Product,
    Scaled,
    Sharded,
    Sum,
    frobenius_norm,
    frobenius_norms_of_groups,
)
from lightning_spectral.linalg.rows import rows_of
from lightning_spectral.linalg.sharding.flattened import FlatShard
from lightning_spectral.linalg.sharding.sharded import is_sharded, replicated
from lightning_spectral.linalg.sharding.tiles import stand_in
from lightning_spectral.records import Alternative, Branch, Factor, Path, alternatives
from lightning_spectral.records.layout import arranged, is_arithmetic
from lightning_spectral.weights.protocol import Weights

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Adapters", "Linearized", "WeightLinearization", "linearize", "linearize_kind", "probes_of"]

WeightLinearization = Literal["circuit", "paper"]
Adapters = Literal["sum", "base", "delta"]

_PAPER = ("scale", "output", "down", "up")

_PROBES, _EXACT_WIDTH = 128, 512
"""Random vectors that estimate the Frobenius norm which a norm layer divides by; up to this width it is exact."""


@dataclass(frozen=True, slots=True, eq=False)
class Linearized:
    """A path as an operator.

    Attributes:
        operator: The product of the factors, ``(width, width)``, before normalization.
        normalized: What stands right of a norm behind a matrix; ``None`` without such a norm. The spectral norm of the
            path is ‖operator‖₂ · √d / ‖normalized‖_F with d the rows of ``normalized``.
        deviation: Relative standard deviation of the sizes that terms of the operator were divided by.
    """

    operator: LinearOperator
    normalized: LinearOperator | None = None
    deviation: float = 0.0


@dataclass(slots=True)
class _Chain:
    """Operators from left to right, collected factor by factor."""

    operators: list[LinearOperator] = field(default_factory=list)
    scalars: list[float | Tensor] = field(default_factory=list)
    norms: list[Factor] = field(default_factory=list)  # norms that wait for the matrix behind which they stand
    normalized_from: int | None = None
    grouped: dict[int, int] = field(default_factory=dict)  # groups of channels that a norm takes one by one, by place

    def finished(self, adapters: Adapters = "sum") -> Linearized:
        deviation = self._divide_groups()
        operator = Product(*self.operators) if adapters != "delta" else _difference(self.operators)
        for scalar in self.scalars:
            operator = Scaled(operator, scalar)
        if self.normalized_from is None:
            return Linearized(operator, None, deviation)
        return Linearized(operator, Product(*self.operators[self.normalized_from :]), deviation)

    def _divide_groups(self) -> float:
        """Divide by the expected size of every group that a norm takes by itself: a head, a group of channels."""
        deviation = 0.0
        for place, groups in sorted(self.grouped.items(), reverse=True):
            if torch.is_grad_enabled():
                raise ConfigurationError(
                    "a norm of single heads stands behind a matrix, through which no gradient goes"
                )
            right = Product(*self.operators[place:])
            probes, spread = probes_of(right)
            generator = torch.Generator().manual_seed(0)
            sizes = frobenius_norms_of_groups(right, groups, generator=generator, n_probes=probes)
            factors = torch.where(sizes > 0, math.sqrt(right.shape[0] / groups) / sizes, 0.0)
            self.operators.insert(place, Diagonal(factors.repeat_interleave(right.shape[0] // groups)))
            deviation += spread
        return deviation


def linearize(
    weights: Weights,
    path: Path,
    linearization: WeightLinearization,
    *,
    adapters: Adapters = "sum",
    differentiable: bool = False,
) -> Linearized:
    """Build the operator of one path of a branch from the weights as they are now.

    Nothing is copied: matrices are views of the parameters, products are never formed. Biases, activation derivatives
    and the attention pattern are not part of it.

    A weight that is sharded over processes is read where it lies (see :class:`~lightning_spectral.linalg.Sharded`).
    All processes have to call this together, with weights that are :meth:`gathered
    <lightning_spectral.weights.protocol.Weights.gathered>`.

    Args:
        weights: Where the factors of the path are read.
        path: A chain of factors.
        linearization: ``"circuit"`` or ``"paper"``.
        adapters: ``"sum"`` for the branch as it is, ``"base"`` for what it would be without adapters, ``"delta"`` for
            the first minus the second (behind a norm, both at the size that the norm gives to the first).
        differentiable: Whether the tensors that the operators hold keep their graphs, so that a caller can
            differentiate by the parameters. The products that the operators take themselves are never part of a graph.

    Returns:
        The operator, and what to divide its norm by.

    Raises:
        ConfigurationError: A weight holds no numbers (it is on the meta device, packed, or of an integer dtype), it has
            another shape than the one that the path was made for, or it is sharded in a way that cannot be read; or
            the difference is asked for and there is no adapter.
    """
    if adapters == "base":
        path = replace(path, factors=tuple(replace(factor, adapters=()) for factor in path.factors))
    if adapters == "delta" and not any(factor.adapters for factor in path.factors):
        raise ConfigurationError("it has no adapter")
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        chain = _circuit(weights, path) if linearization == "circuit" else _paper(weights, path)
        return chain.finished(adapters)


def linearize_kind(
    weights: Weights,
    branches: Sequence[Branch],
    linearization: WeightLinearization,
    *,
    adapters: Adapters = "sum",
    differentiable: bool = False,
) -> list[tuple[Alternative, Linearized]] | str:
    """Build the operators whose largest norm is that of the branches of one kind, or say why there are none.

    Args:
        weights: As in :func:`linearize`, and so are the others.
        branches: The branches, which are added up.
        linearization: ``"circuit"`` or ``"paper"``.
        adapters: A ``"delta"`` is of the experts and of the paths that have adapters.
        differentiable: Whether gradients will be asked for.
    """
    reason = next((branch.reason for branch in branches if branch.reason is not None), None)
    if reason is not None or not all(branch.paths for branch in branches):
        return reason or "the branch has no factors"
    build = partial(_summed, weights, linearization=linearization, adapters=adapters, differentiable=differentiable)
    try:
        chosen = alternatives(branches)
        if adapters == "delta":
            chosen = tuple(item for item in chosen if _adapted(item.paths)) or chosen
        return [(item, build(item.paths)) for item in chosen]
    except (ConfigurationError, AttributeError, ValueError) as error:
        return str(error)
    except SURPRISES as error:
        return surprise("its matrices could not be read", error)


def _summed(
    weights: Weights,
    paths: Sequence[Path],
    linearization: WeightLinearization,
    *,
    adapters: Adapters = "sum",
    differentiable: bool = False,
) -> Linearized:
    """Build the operator of paths that are added up.

    A norm behind a sum divides by the expected size of the sum: paths that begin alike, up to and including such a
    norm, are one product with a sum in it. Terms with norms of their own are divided before they are added.
    """
    if adapters == "delta":
        paths = _adapted(paths) or paths
    if linearization == "paper":
        seen = list(dict.fromkeys(map(_on_paper, paths)))
        if adapters == "delta" and _adapted(paths) and not _adapted(seen):
            raise ConfigurationError("its adapters are on matrices that the linearization leaves out")
        paths = seen
    if len(paths) == 1:
        return linearize(weights, paths[0], linearization, adapters=adapters, differentiable=differentiable)
    build = partial(_summed, weights, linearization=linearization, adapters=adapters, differentiable=differentiable)
    groups: dict[tuple[Factor, ...], list[Path]] = {}
    for path in paths:
        groups.setdefault(_head(path) if linearization == "circuit" else (), []).append(path)
    ((head, members), *others) = groups.items()
    if others or not head:
        parts = [build(group) for group in groups.values()] if others else [build([path]) for path in members]
        terms = [_divided(part, differentiable) for part in parts]
        return Linearized(Sum(*(term.operator for term in terms)), None, max(term.deviation for term in terms))
    if adapters == "delta":
        raise ConfigurationError("its adapters are in a sum with a norm behind it")
    inner = _divided(build([replace(path, factors=path.factors[len(head) :]) for path in members]), differentiable)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        chain = _circuit(weights, Path(head), inner.operator)
        whole = chain.finished()
        return replace(whole, deviation=whole.deviation + inner.deviation)


def _adapted(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if any(factor.adapters for factor in path.factors)]


def _on_paper(path: Path) -> Path:
    """Return what the paper's rule sees of a path: a whole output projection, whichever heads the path goes through."""
    factors = []
    for factor in path.factors:
        if factor.role == "output" and factor.layout and factor.layout[-1][:2] == ("narrow", 1):
            factor = replace(factor, layout=factor.layout[:-1])
        if factor.role in _PAPER:
            factors.append(factor)
    return Path(tuple(factors), path.expert)


def _head(path: Path) -> tuple[Factor, ...]:
    """Return the factors of a path up to and including its last norm behind a matrix; none without such a norm."""
    norms = [place for place, factor in enumerate(path.factors) if factor.role in ("post_norm", "inner_norm")]
    return path.factors[: norms[-1] + 1] if norms else ()


def _divided(item: Linearized, differentiable: bool) -> Linearized:
    """Carry out the normalization of a term of a sum."""
    right = item.normalized
    if right is None:
        return item
    if differentiable:
        raise ConfigurationError("it is a sum of terms with norms of their own, through which no gradient goes")
    probes, deviation = probes_of(right)
    size = frobenius_norm(right, generator=torch.Generator().manual_seed(0), n_probes=probes)
    return Linearized(Scaled(item.operator, math.sqrt(right.shape[0]) / float(size)), None, deviation + item.deviation)


def probes_of(operator: LinearOperator) -> tuple[int, float]:
    """Return how many probes estimate a Frobenius norm, and the largest relative standard deviation that is left."""
    exact = operator.shape[1] <= _EXACT_WIDTH
    probes = max(_PROBES, operator.shape[1] if exact else 0)
    return probes, 0.0 if exact else 1 / math.sqrt(2 * probes)


def _circuit(weights: Weights, path: Path, right: LinearOperator | None = None) -> _Chain:
    chain = _Chain()
    for factor in path.factors:
        if factor.role in ("post_norm", "inner_norm"):
            chain.norms.append(factor)
        elif factor.role in ("scale", "pre_norm"):
            _append_gain(weights, chain, factor)
        else:
            _append(weights, chain, _matrix(weights, factor))
    if right is not None:
        _append(weights, chain, [right])
    return chain


def _paper(weights: Weights, path: Path) -> _Chain:
    chain = _Chain()
    for factor in path.factors:
        if factor.role == "scale":
            _append_gain(weights, chain, factor)
        elif factor.role in _PAPER:
            chain.operators += _matrix(weights, factor)
    last = chain.operators[-1]
    if any(factor.role == "output" for factor in path.factors) and last.shape[0] != last.shape[1]:
        chain.operators.append(Adjoint(last))
    return chain


def _difference(operators: Sequence[LinearOperator]) -> LinearOperator:
    """Return the product of matrices with adapters minus that of the matrices alone.

    With Fᵢ = Wᵢ + Dᵢ, F₁F₂… - W₁W₂… = Σᵢ W₁…Wᵢ₋₁ Dᵢ Fᵢ₊₁…, where nothing cancels however small the adapters are.
    """
    without: list[LinearOperator] = []
    terms = []
    for i, operator in enumerate(operators):
        parts = _parts(operator)
        if len(parts) > 1:
            terms.append(Product(*without, Sum(*parts[1:]), *operators[i + 1 :]))
        without.append(parts[0])
    if not terms:
        raise ConfigurationError("its adapters are on matrices that the linearization leaves out")
    return Sum(*terms)


def _parts(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    """Return a matrix and its adapters."""
    if isinstance(operator, Adjoint):
        return tuple(map(Adjoint, _parts(operator.operator)))
    return operator.operators if isinstance(operator, Sum) else (operator,)


def _append_gain(weights: Weights, chain: _Chain, factor: Factor) -> None:
    """Append a norm's gain or a residual multiplier. Of a number right of a norm, nothing is left but its sign."""
    void = chain.normalized_from is not None or bool(chain.grouped) or bool(chain.norms)
    if factor.parameter is None:
        if factor.constant != 1.0 and not (void and factor.constant > 0):
            chain.scalars.append(-1.0 if void else factor.constant)
        return
    tensor = _tensor(weights, factor)
    if tensor.numel() > 1:
        _append(weights, chain, [Diagonal(tensor.flatten())])
    else:
        number = tensor.float() if tensor.dtype != torch.float64 else tensor
        chain.scalars.append(number.sign() if void else number)


def _append(weights: Weights, chain: _Chain, operators: list[LinearOperator]) -> None:
    """Append a matrix or a diagonal, behind the norms that wait for it."""
    for norm in chain.norms:
        # A norm over the repeated heads stands left of the repetition, one over the heads themselves right of it.
        place = 1 if len(operators) > 1 and norm.size != operators[0].shape[0] else 0
        if norm.parameter is not None:
            gain = _tensor(weights, norm).flatten()
            channels = operators[place].shape[0]
            operators.insert(place, Diagonal(gain.repeat(channels // len(gain))))
            place += 1
        groups = operators[place].shape[0] // (norm.size or operators[place].shape[0])
        if groups > 1:
            chain.grouped[len(chain.operators) + place] = groups
        elif chain.normalized_from is None:
            chain.normalized_from = len(chain.operators) + place
    chain.norms.clear()
    chain.operators += operators


def _matrix(weights: Weights, factor: Factor) -> list[LinearOperator]:
    """Return the matrix of a factor with its adapters, and the repetition of its rows where there is one."""
    *repetition, matrix = _stored(weights, factor)
    if not factor.adapters:
        return [*repetition, matrix]
    return [*repetition, Sum(matrix, *(_adapter(weights, chain, factor.rows) for chain in factor.adapters))]


def _adapter(weights: Weights, factors: Iterable[Factor], rows: tuple[range, ...] | None) -> LinearOperator:
    """Return an adapter of a matrix of which rows are picked, without their repetition."""
    chain = _Chain()
    for factor in factors:
        if factor.role == "scale":
            _append_gain(weights, chain, factor)
        elif chain.operators:
            chain.operators += _stored(weights, factor)
        else:
            chain.operators += _stored(weights, replace(factor, rows=rows))[-1:]
    return chain.finished().operator


def _stored(weights: Weights, factor: Factor) -> list[LinearOperator]:
    """Return the matrix that a parameter holds, and the repetition of its rows where there is one."""
    assert factor.parameter is not None
    with weights.read(factor.parameter) as weight:
        if is_sharded(weight):
            return _sharded(weight, factor)
        return rows_of(_arranged(replicated(weight), factor), factor.rows, Matrix)


def _sharded(weight: DTensor | FlatShard, factor: Factor) -> list[LinearOperator]:
    if torch.is_grad_enabled():
        raise ConfigurationError(f"{factor.parameter} is sharded: no gradient goes through its spectral norm")
    # Views say which entries are read, arithmetic is done to every entry: it does not matter which comes first.
    views = tuple(step for step in factor.layout if not is_arithmetic(step))
    arithmetic = [step for step in factor.layout if is_arithmetic(step)]
    view = _arranged(stand_in(weight.shape), replace(factor, layout=views))
    stored: Any = (
        replace(weight, entries=arranged(weight.entries, arithmetic))
        if isinstance(weight, FlatShard)
        else arranged(weight, arithmetic)
    )
    return rows_of(view, factor.rows, partial(Sharded, stored))


def _tensor(weights: Weights, factor: Factor) -> Tensor:
    """Return a gain or a multiplier, in one piece."""
    assert factor.parameter is not None
    with weights.read(factor.parameter) as tensor:
        return _picked(_arranged(replicated(tensor), factor), factor)


def _picked(gain: Tensor, factor: Factor) -> Tensor:
    """Return a gain with one entry for each channel that it multiplies, in their order."""
    if factor.rows is None:
        return gain
    return gain.flatten()[torch.tensor([row for run in factor.rows for row in run], device=gain.device)]


def _arranged(tensor: Tensor, factor: Factor) -> Tensor:
    """Make the matrix or the gain of a stored parameter."""
    try:
        tensor = arranged(tensor, factor.layout)
    except (RuntimeError, IndexError) as error:
        raise ConfigurationError(f"{factor.parameter} has not the shape it was found with: {error}") from None
    # A gain may have one entry per head and channel.
    height = tensor.numel() if factor.size is not None or not tensor.ndim else tensor.shape[0]
    if factor.rows is not None and max((run[-1] for run in factor.rows if run), default=0) >= height:
        raise ConfigurationError(f"{factor.parameter} has {height} rows, fewer than it was found with")
    return tensor

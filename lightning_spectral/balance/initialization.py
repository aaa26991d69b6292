"""Balanced initialization: scale the branches of every block once, to a given ratio and, if asked, a given norm."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_spectral import _checks
from lightning_spectral.control.ceiling import strength
from lightning_spectral.discovery.find import asked_blocks
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import Adjoint, Product, Scaled, Solver
from lightning_spectral.linalg.solvers import SolverChoice
from lightning_spectral.measuring.freshness import sign_of_training
from lightning_spectral.measuring.linearize import WeightLinearization, linearize
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.records import (
    Branch,
    LayerMeasurement,
    Linearization,
    Measurement,
    Path,
    ResidualBlock,
)
from lightning_spectral.scales.attach import ResidualScale
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.paths import resolve
from lightning_spectral.weights.protocol import Weights

__all__ = ["balance_init_"]

_WITHOUT = "Balance the other blocks: blocks=[block for block in find_blocks(model) if block.name not in {names}]"


@dataclass(frozen=True, slots=True)
class _Kind:
    """The branches of one kind in one block, and the factor by which their norm has to change."""

    block: ResidualBlock
    branches: tuple[Branch, ...]
    factor: float


@dataclass(frozen=True, slots=True)
class _Write:
    """One parameter to multiply: c · (offset + w) − offset."""

    parameter: str
    offset: float
    factor: float


def balance_init_(
    model: nn.Module,
    blocks: Sequence[ResidualBlock] | None = None,
    *,
    target: float = 1.0,
    gain: float | None = None,
    linearization: Linearization = "circuit",
    solver: SolverChoice = None,
    batch: Any = None,
    force: bool = False,
) -> Measurement:
    """Scale the branches of a freshly initialized model in place, so that every spectral ratio becomes the target.

    The ends of a branch are its last weights and biases, or the gain and bias of a norm behind it (see
    :class:`~lightning_spectral.records.End`). In every block with a ratio ρ, the ends of the MLP branch are multiplied
    by √(target/ρ), and the ends of the attention branch are divided by it. The geometric mean of the two norms stays.

    With ``gain=κ``, the geometric mean of every block becomes κ/√N: the MLP gets the norm √target · κ/√N, the attention
    κ/√N / √target. With ``target=1.0`` both norms are at the ceiling of :class:`~lightning_spectral.GainCeiling` with
    ``ceiling=κ``, and the ceiling law has nothing to lower.

    The measured ratio is the target up to rounding in the dtype of the weights. The true ratio differs from it by the
    error of the solver, by default at most 1 %. The same holds for the norms with ``gain``.

    N is the number of branches of ``blocks``, counted as the ceiling law counts them: every kind of branch of every
    block once. The branches of one kind, such as the two MLPs of a macaron block, get one factor, and the norm is the
    norm of their sum. The norm of a mixture of experts is the norm of its largest expert. Cross-attention counts in N
    and is not scaled. A module that runs in several layers (ALBERT) counts once.

    Blocks without a ratio (one branch, an unmeasured branch, weights that are not finite) are left alone. With
    ``gain``, a branch that is measured alone in its block gets the norm κ/√N, and the block still has no ratio. Blocks
    that failed their self-check are left alone, because their weights may belong to something else; a warning names
    them. They count in N.

    In a post-norm block, a norm follows the sum. The branch in front of the sum is measured and scaled like any other:
    a smaller branch lets more of the stream pass. If a norm stands behind the branch itself (Gemma 2, OLMo 2), its gain
    is scaled.

    Scaling a trained model would change the function that it has learned, so a model that looks trained is refused.
    A fresh model has constant norm gains, and matrices of independent or orthogonal entries, whose spectral norm is at
    most about the edge (√m + √n) · ‖W‖_F / √(mn) of random matrices. A model looks trained if the gain of a norm on one
    of its paths is not constant, which takes one optimizer step in float32, or if a spectral norm exceeds
    1.1 · (1 + 5 / (√m + √n)) times that edge. A model without trained gains, or with norms only behind the sums, is
    recognized once a matrix has grown a dominant direction (in the GPT of ``examples``, between steps 20 and 40).
    Before that, a weakly trained model counts as fresh.

    Args:
        model: The model. Its parameters are changed in place; their gradients and ``requires_grad`` stay.
        blocks: The blocks to balance; found in the model by default. A sharded model needs them, found before, and all
            processes have to call this together.
        target: The ratio that every block gets.
        gain: κ: the geometric mean of the two norms of every block becomes κ/√N. By default it does not change.
        linearization: The linearization of the measurement, ``"circuit"`` or ``"paper"``, as in :func:`measure`.
        solver: How spectral norms are computed, :class:`RandomizedSVD` by default.
        batch: Example input for finding the blocks, if none can be guessed: a tensor, a tuple of positional arguments
            or a dict of keyword arguments.
        force: Balance a model that looks trained.

    Returns:
        The measurement of the balanced model. A block that was left alone has its reason there.

    Raises:
        ConfigurationError: An argument cannot be used, a branch has no ends, two blocks share an end, or the model
            looks trained. The model is unchanged then.
        BlocksNotFoundError: The model has no residual block.
        ExampleInputError: The model could not be run on any example input.

    Example:
        >>> [round(layer.ratio, 2) for layer in balance_init_(model, target=1.0)]
        [1.0, 1.0, 1.0]
    """
    target = _checks.number("target", target, 0.0, math.inf, above=True)
    gain = None if gain is None else _checks.number("gain", gain, 0.0, math.inf, above=True)
    _checks.flag("force", force)
    blocks, weights = asked_blocks(model, blocks, batch, "balance_init_"), ModelWeights(model)
    meter = Meter(weights, list(dict.fromkeys(blocks)), linearization=linearization, solver=solver)
    trusted = _trusted(meter.blocks)
    size = None if gain is None else strength(gain, (len(block.kinds) for block in meter.blocks))
    layers = zip(meter.blocks, meter.measure(), strict=True)
    kinds = [kind for block, layer in layers if block in trusted for kind in _kinds(block, layer, target, size)]
    _check_ends(model, kinds)
    writes = [write for kind in kinds for write in _writes(weights, kind, meter.linearization)]
    if not force:
        _check_fresh(weights, list(dict.fromkeys(kind.block for kind in kinds)), meter.solver)
    with torch.no_grad():
        for write in writes:
            tensor = _stored(model, write.parameter)
            assert isinstance(tensor, Tensor)
            tensor.copy_((tensor.double() + write.offset) * write.factor - write.offset)
    return Meter(weights, blocks, linearization=linearization, solver=solver).measure()


def _trusted(blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """Return the blocks that passed their self-check or were described by hints, and warn of the others."""
    doubtful = [block for block in blocks if not block.verified and block.evidence != "hints"]
    if doubtful:
        names = "; ".join(f"{block.name} ({block.doubt})" for block in doubtful)
        warnings.warn(
            f"balance_init_ leaves {len(doubtful)} of {len(blocks)} blocks alone, because their self-check failed: "
            f"{names}. If their sites are right, pass dataclasses.replace(block, verified=True) in their place.",
            stacklevel=3,
        )
    return [block for block in blocks if block not in doubtful]


def _kinds(block: ResidualBlock, layer: LayerMeasurement, target: float, size: float | None) -> Iterator[_Kind]:
    """Yield the kinds of one block that get a new norm. A block with one kind gets one only with a given size."""
    sides = (
        (block.attention_branches, layer.attention_norm, 1 / math.sqrt(target)),
        (block.mlp_branches, layer.mlp_norm, math.sqrt(target)),
    )
    pair = bool(layer.ratio)
    if size is None and pair:
        # √a · √b instead of √(ab), which may overflow for the norms of a diverged model.
        size = math.prod(math.sqrt(norm) for _, norm, _ in sides if norm is not None)
    for branches, norm, share in sides:
        if size is not None and norm is not None and 0 < norm < math.inf:
            yield _Kind(block, branches, size * (share if pair else 1.0) / norm)


def _check_ends(model: nn.Module, kinds: Sequence[_Kind]) -> None:
    """Raise one error that lists all blocks that cannot be scaled."""
    problems: dict[str, str] = {}
    users: defaultdict[str, list[str]] = defaultdict(list)
    for kind in kinds:
        block = kind.block
        for branch in kind.branches:
            tensors = {end.parameter: _stored(model, end.parameter) for end in branch.ends}
            absent = [path for path, tensor in tensors.items() if tensor is None]
            if not branch.ends:
                reason = branch.ends_reason or "its ends are not known, so find the blocks anew"
                problems[block.name] = f"{block.name} ({branch.kind}: {reason})"
            elif absent:
                problems[block.name] = f"{block.name} ({branch.kind}: {absent[0]} is parametrized or not there)"
            for tensor in tensors.values():
                users[str(id(tensor))].append(block.name)
    if problems:
        raise ConfigurationError(
            f"{len(problems)} block(s) cannot be balanced: {'; '.join(problems.values())}. "
            + _WITHOUT.format(names=sorted(problems))
        )
    shared = next((names for names in users.values() if len(names) > 1), None)
    if shared is not None:
        raise ConfigurationError(
            f"{' and '.join(dict.fromkeys(shared))} end in the same parameter, so one scaling would undo the other: "
            "pass blocks= with one of them"
        )


def _stored(model: nn.Module, path: str) -> Tensor | None:
    """Return the stored tensor of a parameter, ``None`` if the value in use is not proportional to it."""
    owner, _, name = path.rpartition(".")
    try:
        module = resolve(model, owner) if owner else model
        if isinstance(module, nn.Module) and parametrize.is_parametrized(module, name):
            applied = resolve(module, f"parametrizations.{name}")
            assert isinstance(applied, nn.ModuleList)
            found = applied.original if all(isinstance(item, ResidualScale) for item in applied) else None
        else:
            found = getattr(module, name)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _writes(weights: Weights, kind: _Kind, linearization: WeightLinearization) -> Iterator[_Write]:
    """Yield the parameters of one kind to multiply."""
    for branch in kind.branches:
        degrees = {_degree(weights, path, branch, linearization) for path in branch.paths}
        if len(degrees) != 1 or degrees == {0}:
            raise ConfigurationError(
                f"linearization={linearization!r} does not see the size of {kind.block.name} ({branch.kind}), which "
                f"{branch.ends[0].parameter} sets: expected linearization='circuit', or blocks= without this block"
            )
        factor = kind.factor ** (1 / degrees.pop())
        yield from (_Write(end.parameter, end.offset, factor) for end in branch.ends)


def _degree(weights: Weights, path: Path, branch: Branch, linearization: WeightLinearization) -> int:
    """Return how often the ends of a branch are factors of the operator of a path: 2 for W_o W_oᵀ."""
    ends = {end.parameter for end in branch.ends}
    if linearization == "circuit":
        return sum(factor.parameter in ends for factor in path.factors)
    seen = [factor for factor in path.factors if factor.role in ("scale", "output", "down", "up")]
    operator = linearize(weights, path, linearization).operator
    while isinstance(operator, Scaled):
        operator = operator.operator
    squared = isinstance(operator, Product) and isinstance(operator.operators[-1], Adjoint)
    return sum(2 if squared and factor.role == "output" else 1 for factor in seen if factor.parameter in ends)


def _check_fresh(weights: Weights, blocks: Sequence[ResidualBlock], solver: Solver) -> None:
    """Raise an error if the weights look trained."""
    sign = sign_of_training(weights, blocks, solver)
    if sign is not None:
        raise ConfigurationError(
            f"the model looks trained: {sign}. Scaling its branches would change the function that it has learned: "
            "call balance_init_ before training, or pass force=True"
        )

"""Model, linearization and solver in, :class:`Measurement` out. No Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_spectral import _checks
from lightning_spectral.discovery.asked import check_blocks
from lightning_spectral.discovery.find import asked_blocks
from lightning_spectral.discovery.inputs import arguments_of
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import RandomizedSVD, SolverState, SpectralNorm
from lightning_spectral.linalg.operators import largest_mesh
from lightning_spectral.linalg.sharding.flattened import FlatShard
from lightning_spectral.linalg.sharding.sharded import agreed, in_one_piece
from lightning_spectral.linalg.solvers import SolverChoice, solver_named
from lightning_spectral.measuring.jacobians import measure_functions
from lightning_spectral.measuring.linearize import (
    Adapters,
    Linearized,
    WeightLinearization,
    linearize_kind,
)
from lightning_spectral.measuring.logit_bounds import logit_bound
from lightning_spectral.measuring.norm_sizes import NormSize, norm_sizes
from lightning_spectral.measuring.signals import NOTHING, SIGNALS, Signals, alignment, neighbours, signals_of
from lightning_spectral.records import (
    Alternative,
    Blocks,
    Branch,
    LayerMeasurement,
    Linearization,
    Measurement,
    Path,
    ResidualBlock,
    WeightSignals,
)
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.names import plain_name
from lightning_spectral.weights.protocol import Weights
from lightning_spectral.weights.scaled import common_scale, with_scales
from lightning_spectral.weights.stored import in_state_dict

__all__ = ["EMPTY_NORM", "Meter", "measure"]

EMPTY_NORM = "what enters the norm behind the branch is zero"

# Standard deviations that the error bound allows for, where the size that a norm layer divides by is estimated.
_DEVIATIONS = 3.0

Kind = tuple[Branch, ...]  # the branches of one kind in one block, which are added up


@dataclass(frozen=True, slots=True)
class _Value:
    """The norm of a branch: its value and bound, the expert that has it and its signals, or why there is none."""

    norm: float | None = None
    bound: float | None = None
    expert: int | str | None = None
    reason: str | None = None
    signals: Signals = NOTHING


def _kinds(block: ResidualBlock) -> list[Kind]:
    """Return the branches of attention and those of the MLP, without a kind that the block does not have."""
    return [kind for kind in (block.attention_branches, block.mlp_branches) if kind]


class Meter:
    """Measures one model again and again, each time starting from the singular subspaces of the last time.

    Args:
        weights: Those of the model that the blocks were found in, or of one of the same architecture.
        blocks: The blocks to measure.
        linearization: ``"circuit"`` or ``"paper"``.
        adapters: What is measured of branches with adapters; see :func:`measure`.
        solver: How spectral norms are computed, :class:`RandomizedSVD` by default.
        safe_zone: Passed on to the measurements.
        signals: What else to ask of the weights, names among :data:`~lightning_spectral.measuring.signals.SIGNALS`.
        among: All blocks of the model, where ``blocks`` are some of them: with these they may share branches.

    Raises:
        ConfigurationError: The linearization or a signal is unknown.
    """

    def __init__(
        self,
        weights: Weights,
        blocks: Sequence[ResidualBlock],
        *,
        linearization: Linearization = "circuit",
        adapters: Adapters = "sum",
        solver: SolverChoice = None,
        safe_zone: tuple[float, float] = (0.5, 2.0),
        signals: Collection[str] = (),
        among: Sequence[ResidualBlock] | None = None,
    ) -> None:
        self.weights = weights
        self.blocks = with_scales(weights, blocks)
        branches = (branch for block in self.blocks for kind in _kinds(block) for branch in kind)
        self._scales = {branch: path for branch in branches if (path := weights.log_scale(branch))}
        self.linearization: WeightLinearization = _checks.linearization_of_weights(
            linearization, get_args(WeightLinearization)
        )
        self.adapters: Adapters = _checks.choice("adapters", adapters, get_args(Adapters))
        self.solver = solver_named(solver)
        self.safe_zone = safe_zone
        self.signals = _checks.choices("signals", signals, SIGNALS)
        self.notes = blocks.notes if isinstance(blocks, Blocks) else ()
        self._shared = _shared(blocks if among is None else among)
        self._reasons: dict[Kind, str | None] = {}
        self._keys: tuple[str, ...] = ()
        self._state: SolverState | None = None
        self._sizes: list[NormSize | None] = []

    def measure(self, step: int = 0, share: tuple[int, int] = (0, 1)) -> Measurement:
        """Measure every block now, or a share of them.

        Args:
            step: The optimizer step that the measurement is labelled with.
            share: ``(r, w)``: measure only the blocks at the positions r, r + w, r + 2w, …, because w - 1 other
                processes measure the rest. No effect where weights are spread over the processes: then all of them
                take part in every product.

        Returns:
            One layer per block. A norm that cannot be computed is ``None`` with a reason; one that belongs to the
            share of another process is ``None``, with a reason only if there is no weight linearization.
        """
        start = time.perf_counter()
        kinds = [kind for block in self.blocks for kind in _kinds(block)]
        weights, cut = self.weights.gathered(path for kind in kinds for branch in kind for path in branch.paths)
        first, stride = share if cut is None else (0, 1)
        own = {kind for block in self.blocks[first::stride] for kind in _kinds(block)}
        pairs = self._pairs(first, stride)
        mine = own | {kind for pair in pairs.values() for kind in pair}
        built = {kind: self._linearized(kind, weights) if kind in mine else self._reason(kind) for kind in kinds}
        parts = [part for found in built.values() if isinstance(found, list) for part in found]
        mesh = largest_mesh(item.operator for _, item in parts)
        keys = tuple(_key(chosen.paths) for chosen, _ in parts)
        norms, signals = self._solve([item for _, item in parts], keys)
        solved = iter(zip(_agreed(norms, mesh), signals, strict=True))
        values = {
            kind: _largest([(chosen.expert, *next(solved)) for chosen, _ in found])
            if isinstance(found, list)
            else _Value(reason=found)
            for kind, found in built.items()
        }
        scales = _read_scales(self.weights, self._scales, mesh)
        aligned = {
            index: alignment(values[one].signals.output, values[other].signals.input)
            for index, (one, other) in pairs.items()
        }
        for kind in {kind for block in self.blocks for kind in _kinds(block)} - own:
            values[kind] = _Value(reason=self._reason(kind))
        bounds: dict[int, float | None] = {}
        if "logit_bound" in self.signals:
            found = self.blocks[first::stride]
            bounds = {block.index: logit_bound(weights, block.attention_branches) for block in found}
        layers = tuple(
            _layer(block, values, scales, self._shared, aligned.get(block.index), bounds.get(block.index))
            for block in self.blocks
        )
        seconds = time.perf_counter() - start
        return Measurement(step, self.linearization, layers, self.safe_zone, seconds, self.adapters, self.notes)

    def _reason(self, kind: Kind) -> str | None:
        """Return why a kind has no weight linearization, which does not depend on the values of its weights."""
        if kind not in self._reasons:
            found = self._linearized(kind, self.weights)
            self._reasons[kind] = found if isinstance(found, str) else None
        return self._reasons[kind]

    def _linearized(self, kind: Kind, weights: Weights) -> list[tuple[Alternative, Linearized]] | str:
        return linearize_kind(weights, kind, self.linearization, adapters=self.adapters)

    def _pairs(self, first: int, stride: int) -> dict[int, tuple[Kind, Kind]]:
        """Return, for each block of a share, which branches of it write last and which of the next block read first."""
        if "alignment" not in self.signals or self.linearization != "circuit":
            return {}
        mine = {block.index for block in self.blocks[first::stride]}
        pairs = {
            one.index: (self._kind(one, "mlp", "attention"), self._kind(other, "attention", "mlp"))
            for one, other in neighbours(self.blocks)
            if one.index in mine
        }
        return {index: kinds for index, kinds in pairs.items() if all(kinds)}

    def _kind(self, block: ResidualBlock, *words: str) -> Kind:
        """Return the branches of the first of some kinds that a block runs, though they may be listed in another."""
        for word in words:
            owner = self._shared.get((block.name, word), block.name)
            named = (other for other in self.blocks if other.name == owner)
            found = (other.mlp_branches if word == "mlp" else other.attention_branches for other in named)
            if kind := next(found, ()):
                return kind
        return ()

    def _solve(self, items: Sequence[Linearized], keys: tuple[str, ...]) -> tuple[list[SpectralNorm], list[Signals]]:
        """Return the spectral norms of the normalized operators, warm-started if they are the ones of last time."""
        operators = [item.operator for item in items]
        before, sizes = self._state, self._sizes
        if before is None or keys != self._keys or len(sizes) != len(items):
            before, sizes = self.solver.init(operators), [None] * len(items)
        before = replace(before, keeps_images="change" in self.signals)
        norms, self._state = self.solver.compute(operators, before)
        self._keys = keys
        # Other solvers are references: what they are compared with must not be carried on.
        rights, carry = [item.normalized for item in items], isinstance(self.solver, RandomizedSVD)
        self._sizes = norm_sizes(rights, self._state.subspaces, sizes, carry=carry)
        normalized = list(map(_normalized, norms, items, self._sizes))
        known = (operators, norms, before.memories, self._state.memories)
        return normalized, [signals_of(self.signals, *found) for found in zip(*known, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the warm start as plain values and tensors."""
        state = None if self._state is None else self._state.state_dict()
        sizes = [None if size is None else size.state_dict() for size in self._sizes]
        return {"linearization": self.linearization, "keys": list(self._keys), "solver": state, "sizes": sizes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the warm start of an earlier run; a state of another linearization or of other keys is dropped."""
        if state.get("linearization") != self.linearization or not state.get("solver"):
            return
        self._keys, self._state = tuple(state["keys"]), SolverState.from_state_dict(state["solver"])
        sizes = state.get("sizes") or [None] * len(self._keys)
        self._sizes = [None if size is None else NormSize.from_state_dict(size) for size in sizes]


def measure(
    model: nn.Module | Mapping[str, Tensor],
    blocks: Sequence[ResidualBlock] | None = None,
    *,
    batch: Any = None,
    linearization: Linearization = "circuit",
    solver: SolverChoice = None,
    safe_zone: tuple[float, float] = (0.5, 2.0),
    adapters: Adapters = "sum",
    signals: Collection[str] = (),
) -> Measurement:
    """Measure every residual block of a model once.

    The norm of a block with several branches of a kind, such as two MLPs of half a step, is that of the sum of their
    operators. To measure one of them by itself, pass a block with it alone: ``dataclasses.replace(block,
    branches=block.branches[1:2])``.

    Args:
        model: Any module with residual blocks; or a state dict, which needs ``blocks`` (``find_blocks`` of a model of
            the same architecture and size). Its names may have the prefix of a wrapper, such as ``module.``.
        blocks: The blocks to measure; found in the model by default. A module that several blocks share is measured
            once, in the first of them; the others have a reason that names it.
        linearization: The rule that turns branches into linear operators: ``"circuit"`` (W_o W_v against
            W_down W_up, norm gains and residual multipliers included), ``"paper"`` (W_o against W_down W_up, as in
            'The 1:1 Rule') or ``"jacobian"`` (the derivatives of both branches on ``batch``, which are dearer: see
            :func:`~lightning_spectral.measuring.jacobians.measure_functions`). Never compare across rules.
        adapters: What is measured of a branch whose matrices have adapters (W x + α/r · B(A(x))): ``"sum"``, which is
            what the network computes; ``"base"``, what the branch would be without them; or ``"delta"``, what they
            change, the operator of the sum minus that of the base. A branch without adapters has no delta.
        solver: How spectral norms are computed: ``"randomized"`` (the default), ``"exact"``, or a solver with settings
            of its own, :class:`RandomizedSVD` or :class:`ExactSVD`.
        safe_zone: The interval of ratios that counts as balanced.
        batch: Example input, if none can be guessed: a tensor, a tuple of positional arguments or a dict of keyword
            arguments. The blocks are found on it, and Jacobians measured; guessed tokens are random ones.
        signals: What else to ask of the weights, for ``layers[i].weights``
            (:class:`~lightning_spectral.records.WeightSignals`): ``"stable_rank"``, ``"alignment"`` and
            ``"logit_bound"``. A single measurement knows no ``"change"``.

    Returns:
        The measurement; ``print`` shows it as a table.

    Raises:
        BlocksNotFoundError: The model has no residual block.
        ExampleInputError: The model could not be run on any example input.
        ConfigurationError: The linearization is unknown, or it does not know the part of the adapters; or a state dict
            does not fit the blocks, or holds no numbers.

    Example:
        >>> print(measure(model))
        spectral ratio ‖mlp‖₂/‖attention‖₂, linearization='circuit', safe zone (0.5, 2)
              block                   mlp   attention     ratio
           0  transformer.h.0      0.6...      0.7...    0.8...
        ...
    """
    if linearization != "jacobian":
        _checks.choice("linearization", linearization, get_args(Linearization))
    elif _checks.choice("adapters", adapters, get_args(Adapters)) != "sum":
        raise ConfigurationError(f"adapters={adapters!r}: Jacobians are those of the model as it runs, expected 'sum'")
    zone = _checks.interval("safe_zone", safe_zone)
    if _checks.choices("signals", signals, SIGNALS) and linearization == "jacobian":
        raise ConfigurationError(f"signals={signals!r}: Jacobians have none, expected linearization='circuit'")
    check_blocks(blocks, "measure(model, find_blocks(model))")
    weights: Weights
    if isinstance(model, Mapping):
        if blocks is None or linearization == "jacobian":
            told = "linearization='jacobian', which runs a model: pass one, model.load_state_dict(state_dict)"
            if blocks is None:
                told = "no blocks, expected those of such a model: measure(state_dict, find_blocks(model))"
            raise ConfigurationError(f"measure got a state dict and {told}")
        weights, blocks = in_state_dict(model, blocks)
    else:
        blocks = asked_blocks(model, blocks, batch, "measure")
        if linearization == "jacobian":
            args, kwargs = arguments_of(batch)
            chosen = None if solver is None else solver_named(solver)
            return replace(measure_functions(model, blocks, args, kwargs, solver=chosen), safe_zone=zone)
        weights = ModelWeights(model)
    settings: dict[str, Any] = {"linearization": linearization, "adapters": adapters, "solver": solver}
    return Meter(weights, blocks, **settings, safe_zone=zone, signals=signals).measure()


def _key(paths: Iterable[Path]) -> str:
    """Name an operator by its parameters, so that a warm start is never taken for another one."""
    factors = ((item for factor in path.factors for item in factor.flat()) for path in paths)
    return "||".join("|".join(f"{item.parameter}{item.layout}{item.rows}" for item in chain) for chain in factors)


def _normalized(norm: SpectralNorm, item: Linearized, size: NormSize | None) -> SpectralNorm:
    """Divide by the expected size of what enters a norm behind a matrix."""
    if norm.value is None or (size is None and not item.deviation):
        return norm
    value, deviation = norm.value, item.deviation
    if item.normalized is not None and size is not None:
        if not size.size:
            return SpectralNorm(None, None, EMPTY_NORM, norm.iterations)
        value *= math.sqrt(item.normalized.shape[0]) / size.size
        deviation += size.deviation
    return SpectralNorm(value, (norm.error_bound or 0.0) + _DEVIATIONS * deviation, None, norm.iterations)


def _largest(norms: Sequence[tuple[int | str | None, SpectralNorm, Signals]]) -> _Value:
    """Return the largest norm of a kind (over the experts of a mixture)."""
    failed = next((norm.reason for _, norm, _ in norms if norm.value is None), None)
    if failed is not None:
        return _Value(reason=failed)
    expert, norm, signals = max(norms, key=lambda item: item[1].value or 0.0)
    return _Value(norm.value, norm.error_bound, expert, None, signals)


def _agreed(norms: Sequence[SpectralNorm], mesh: DeviceMesh | None) -> list[SpectralNorm]:
    """Return the norms as the first process has them: weights that are not sharded may differ by rounding errors."""
    if mesh is None:
        return list(norms)
    numbers = torch.tensor(
        [[norm.value or 0.0, norm.error_bound or 0.0] for norm in norms], dtype=torch.float64, device="cpu"
    )
    same = agreed([numbers], [mesh])[0].tolist()
    return [
        norm if norm.value is None else replace(norm, value=value, error_bound=bound)
        for norm, (value, bound) in zip(norms, same, strict=True)
    ]


def _read_scales(weights: Weights, paths: Mapping[Branch, str], mesh: DeviceMesh | None) -> dict[Branch, float]:
    """Return the residual scale of every branch that has one, read in a single transfer from the device."""
    tensors: dict[Branch, Tensor | FlatShard] = {}
    for branch, path in paths.items():
        # Whoever changes a model while it trains may have taken a branch out, and its scale with it.
        with suppress(AttributeError), weights.read(path) as log:
            tensors[branch] = log
    logs = [log.detach().double() for log in in_one_piece(list(tensors.values()))]
    if not logs:
        return {}
    (together,) = agreed([torch.cat([log.to(logs[0].device) for log in logs])], [mesh])
    return dict(zip(tensors, together.exp().tolist(), strict=True))


def _shared(blocks: Sequence[ResidualBlock]) -> dict[tuple[str, str], str]:
    """Return where a branch is listed that a block shares with an earlier one, by the block's name and the kind."""
    found = {}
    for block in blocks:
        for word, branches in (("attention", block.attention_branches), ("mlp", block.mlp_branches)):
            for alias in (alias for branch in branches for alias in branch.aliases):
                users = (other for other in blocks if other != block and alias.startswith(f"{other.name}."))
                found.update({(other.name, word): block.name for other in users})
    return found


def _left_out(block: ResidualBlock, word: str) -> str | None:
    """Say which branch is there in place of one that the block has not, ``None`` where there is none."""
    kind = "mixer" if word == "mlp" else "cross_attention"
    sites = [branch.site for branch in block.branches if branch.kind == kind and branch not in block.attention_branches]
    what = "mixes tokens and is not attention" if word == "mlp" else "is cross-attention"
    return f"{', '.join(sites)} {what}, which is not measured" if sites else None


def _layer(
    block: ResidualBlock,
    values: Mapping[Kind, _Value],
    scales: Mapping[Branch, float],
    shared: Mapping[tuple[str, str], str],
    aligned: float | None,
    bound: float | None,
) -> LayerMeasurement:
    def value(word: str, kind: Kind) -> _Value:
        if kind:
            return values[kind]
        owner = shared.get((block.name, word))
        return _Value(
            reason=_left_out(block, word) if owner is None else f"it is that of {owner}, where it is measured"
        )

    attention, mlp = value("attention", block.attention_branches), value("mlp", block.mlp_branches)
    bounds = [value.bound for value in (attention, mlp) if value.bound is not None]
    weights = WeightSignals(
        mlp_change=mlp.signals.change,
        attention_change=attention.signals.change,
        mlp_stable_rank=mlp.signals.stable_rank,
        attention_stable_rank=attention.signals.stable_rank,
        alignment=aligned,
        logit_bound=bound,
    )
    return LayerMeasurement(
        index=block.index,
        name=plain_name(block.name),
        mlp_norm=mlp.norm,
        attention_norm=attention.norm,
        mlp_scale=common_scale([scales.get(branch, 1.0) for branch in block.mlp_branches]),
        attention_scale=common_scale([scales.get(branch, 1.0) for branch in block.attention_branches]),
        mlp_expert=mlp.expert,
        mlp_reason=mlp.reason,
        attention_reason=attention.reason,
        error_bound=max(bounds, default=None),
        doubt=block.doubt,
        weights=None if weights == WeightSignals() else weights,
    )

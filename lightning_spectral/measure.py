"""Model, linearization and solver in, :class:`Measurement` out. No Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_spectral import settings
from lightning_spectral.discovery import find_blocks
from lightning_spectral.discovery.flattened import flattened
from lightning_spectral.discovery.inputs import arguments_of
from lightning_spectral.discovery.paths import module_at, resolve
from lightning_spectral.discovery.scaled import log_scale_path, with_scales
from lightning_spectral.discovery.tensors import small_tensors
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.functional import measure_functions
from lightning_spectral.linalg import RandomizedSVD, Solver, SolverState, SpectralNorm, frobenius_norm
from lightning_spectral.linalg.operators import largest_mesh
from lightning_spectral.linalg.sharded import agreed, in_one_piece, mesh_around
from lightning_spectral.linearize import Adapters, Linearized, WeightLinearization, linearize
from lightning_spectral.records import Branch, LayerMeasurement, Linearization, Measurement, Path, ResidualBlock

__all__ = ["EMPTY_NORM", "Meter", "measure"]

EMPTY_NORM = "what enters the norm behind the branch is zero"

# The Frobenius norm that a norm layer divides by: estimated with this many probes, exact up to this width; the error
# bound allows for three standard deviations of the estimate.
_PROBES, _EXACT_WIDTH, _DEVIATIONS = 128, 512, 3.0


@dataclass(frozen=True, slots=True)
class _Value:
    """The norm of a branch: its value and bound, the expert that has it, or why there is none."""

    norm: float | None = None
    bound: float | None = None
    expert: int | str | None = None
    reason: str | None = None


class Meter:
    """Measures one model again and again, each time starting from the singular subspaces of the last time.

    Args:
        model: The model that the blocks were found in.
        blocks: The blocks to measure.
        linearization: ``"circuit"`` or ``"paper"``.
        adapters: What is measured of branches with adapters; see :func:`measure`.
        solver: How spectral norms are computed, :class:`RandomizedSVD` by default.
        safe_zone: Passed on to the measurements.
        among: All blocks of the model, where ``blocks`` are some of them: with these they may share branches.

    Raises:
        ConfigurationError: The linearization is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[ResidualBlock],
        *,
        linearization: Linearization = "circuit",
        adapters: Adapters = "sum",
        solver: Solver | None = None,
        safe_zone: tuple[float, float] = (0.5, 2.0),
        among: Sequence[ResidualBlock] | None = None,
    ) -> None:
        self.model = model
        self.blocks = with_scales(model, blocks)
        branches = [branch for block in self.blocks for branch in (block.attention, block.mlp)]
        self._scales: dict[Branch | None, str] = {
            branch: path for branch in branches if branch and (path := log_scale_path(model, branch))
        }
        self.linearization = _checked(linearization)
        self.adapters: Adapters = settings.choice("adapters", adapters, get_args(Adapters))
        self.solver: Solver = RandomizedSVD() if solver is None else solver
        self.safe_zone = safe_zone
        self._shared = _shared(blocks if among is None else among)
        self._reasons: dict[Branch, str | None] = {}
        self._keys: tuple[str, ...] = ()
        self._state: SolverState | None = None

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
        cut = mesh_around(self.model)
        first, stride = share if cut is None else (0, 1)
        mine = {branch for block in self.blocks[first::stride] for branch in (block.attention, block.mlp)}
        branches = [branch for block in self.blocks for branch in (block.attention, block.mlp) if branch is not None]
        wanted = (path for branch in branches if branch in mine for path in branch.paths)
        small = {} if cut is None else small_tensors(self.model, wanted, cut)
        built = [
            self._linearized(branch, small) if branch in mine else ([], self._reason(branch)) for branch in branches
        ]
        operators = [(path, item) for paths, _ in built for path, item in paths]
        mesh = largest_mesh(item.operator for _, item in operators)
        keys = tuple(_key(path) for path, _ in operators)
        norms = iter(_agreed(self._solve([item for _, item in operators], keys), mesh))
        values = {
            branch: _largest([(path, next(norms)) for path, _ in paths], reason)
            if branch in mine
            else _Value(reason=reason)
            for branch, (paths, reason) in zip(branches, built, strict=True)
        }
        scales = _read_scales(self.model, self._scales, mesh)
        layers = tuple(_layer(block, values, scales, self._shared) for block in self.blocks)
        seconds = time.perf_counter() - start
        return Measurement(step, self.linearization, layers, self.safe_zone, seconds, self.adapters)

    def _reason(self, branch: Branch) -> str | None:
        """Return why a branch has no weight linearization, which does not depend on the values of its weights."""
        if branch not in self._reasons:
            self._reasons[branch] = self._linearized(branch, {})[1]
        return self._reasons[branch]

    def _linearized(
        self, branch: Branch, small: Mapping[str, Tensor]
    ) -> tuple[list[tuple[Path, Linearized]], str | None]:
        paths = branch.paths
        if self.adapters == "delta":  # of a mixture, some experts may have adapters
            paths = tuple(path for path in paths if any(factor.adapters for factor in path.factors)) or paths
        try:
            built = [
                linearize(self.model, path, self.linearization, adapters=self.adapters, small=small) for path in paths
            ]
            return list(zip(paths, built, strict=True)), branch.reason
        except (ConfigurationError, AttributeError) as error:
            return [], str(error)

    def _solve(self, items: Sequence[Linearized], keys: tuple[str, ...]) -> list[SpectralNorm]:
        """Return the spectral norms of the normalized operators, warm-started if they are the ones of last time."""
        operators = [item.operator for item in items]
        if self._state is None or keys != self._keys:
            self._state = self.solver.init(operators)
        norms, self._state = self.solver.compute(operators, self._state)
        self._keys = keys
        subspaces = self._state.subspaces
        return [_normalized(norm, item, subspace) for norm, item, subspace in zip(norms, items, subspaces, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the warm start as plain values and tensors."""
        state = None if self._state is None else self._state.state_dict()
        return {"linearization": self.linearization, "keys": list(self._keys), "solver": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the warm start of an earlier run; a state of another linearization or of other keys is dropped."""
        if state.get("linearization") != self.linearization or not state.get("solver"):
            return
        self._keys, self._state = tuple(state["keys"]), SolverState.from_state_dict(state["solver"])


def measure(
    model: nn.Module,
    blocks: Sequence[ResidualBlock] | None = None,
    *,
    linearization: Linearization = "circuit",
    adapters: Adapters = "sum",
    solver: Solver | None = None,
    batch: Any = None,
) -> Measurement:
    """Measure every residual block of a model once.

    A block with several branches of a kind, such as two MLPs of half a step, is measured by the first of them. To
    measure the others, pass blocks without the first: ``dataclasses.replace(block, branches=block.branches[1:])``.

    Args:
        model: Any module with residual blocks.
        blocks: The blocks to measure; found in the model by default. A module that several blocks share is measured
            once, in the first of them; the others have a reason that names it.
        linearization: The rule that turns branches into linear operators: ``"circuit"`` (W_o W_v against
            W_down W_up, norm gains and residual multipliers included), ``"paper"`` (W_o against W_down W_up, as in
            'The 1:1 Rule') or ``"jacobian"`` (the derivatives of both branches on ``batch``, which are dearer: see
            :func:`~lightning_spectral.functional.measure_functions`). Never compare across rules.
        adapters: What is measured of a branch whose matrices have adapters (W x + α/r · B(A(x))): ``"sum"``, which is
            what the network computes; ``"base"``, what the branch would be without them; or ``"delta"``, what they
            change, the operator of the sum minus that of the base. A branch without adapters has no delta.
        solver: How spectral norms are computed: :class:`RandomizedSVD` by default, or :class:`ExactSVD`.
        batch: Example input, if none can be guessed: a tensor, a tuple of positional arguments or a dict of keyword
            arguments. The blocks are found on it, and Jacobians measured; guessed tokens are random ones.

    Returns:
        The measurement; ``print`` shows it as a table.

    Raises:
        BlocksNotFoundError: The model has no residual block.
        ExampleInputError: The model could not be run on any example input.
        ConfigurationError: The linearization is unknown, or it does not know the part of the adapters.
    """
    if linearization != "jacobian":
        _checked(linearization, get_args(Linearization))
    elif settings.choice("adapters", adapters, get_args(Adapters)) != "sum":
        raise ConfigurationError(f"adapters={adapters!r}: Jacobians are those of the model as it runs, expected 'sum'")
    args, kwargs = arguments_of(batch)
    if blocks is None:
        blocks = find_blocks(model, *args, **kwargs)
    if linearization == "jacobian":
        return measure_functions(model, blocks, args, kwargs, solver=solver)
    return Meter(model, blocks, linearization=linearization, adapters=adapters, solver=solver).measure()


def _checked(linearization: Any, known: tuple[Any, ...] = get_args(WeightLinearization)) -> WeightLinearization:
    if linearization not in known:
        expected = " or ".join(map(repr, known))
        raise ConfigurationError(f"linearization={linearization!r}: expected {expected} in this version")
    return linearization  # type: ignore[no-any-return]


def _key(path: Path) -> str:
    """Name an operator by its parameters, so that a warm start is never taken for another one."""
    factors = (item for factor in path.factors for item in factor.flat())
    return "|".join(f"{factor.parameter}{factor.layout}{factor.rows}" for factor in factors)


def _normalized(norm: SpectralNorm, item: Linearized, subspace: Tensor | None) -> SpectralNorm:
    """Divide by the expected size of what enters a norm behind a matrix."""
    right = item.normalized
    if right is None or norm.value is None:
        return norm
    probes = max(_PROBES, right.shape[1] if right.shape[1] <= _EXACT_WIDTH else 0)
    size = float(frobenius_norm(right, generator=torch.Generator().manual_seed(0), n_probes=probes, subspace=subspace))
    if not size:
        return SpectralNorm(None, None, EMPTY_NORM, norm.iterations)
    value = norm.value * math.sqrt(right.shape[0]) / size
    deviation = 0.0
    if right.shape[1] > probes and subspace is not None:
        # Relative standard deviation of the estimate: at most 1 / √(2 · probes · r), r the stable rank.
        largest = float(torch.linalg.matrix_norm(right.matmat(subspace), ord=2))
        deviation = largest / size / math.sqrt(2 * probes)
    return SpectralNorm(value, (norm.error_bound or 0.0) + _DEVIATIONS * deviation, None, norm.iterations)


def _largest(norms: Sequence[tuple[Path, SpectralNorm]], reason: str | None) -> _Value:
    """Return the largest norm over the paths of a branch (the experts of a mixture)."""
    if not norms:
        return _Value(reason=reason or "the branch has no factors")
    failed = next((norm.reason for _, norm in norms if norm.value is None), None)
    if failed is not None:
        return _Value(reason=failed)
    path, norm = max(norms, key=lambda item: item[1].value or 0.0)
    return _Value(norm.value, norm.error_bound, path.expert)


def _agreed(norms: Sequence[SpectralNorm], mesh: DeviceMesh | None) -> list[SpectralNorm]:
    """Return the norms as the first process has them: weights that are not sharded may differ by rounding errors."""
    if mesh is None:
        return list(norms)
    numbers = torch.tensor([[norm.value or 0.0, norm.error_bound or 0.0] for norm in norms], dtype=torch.float64)
    same = agreed([numbers], [mesh])[0].tolist()
    return [
        norm if norm.value is None else replace(norm, value=value, error_bound=bound)
        for norm, (value, bound) in zip(norms, same, strict=True)
    ]


def _read_scales(
    model: nn.Module, paths: Mapping[Branch | None, str], mesh: DeviceMesh | None
) -> dict[Branch | None, float]:
    """Return the residual scale of every branch that has one, read in a single transfer from the device."""
    # Whoever changes a model while it trains may have taken a branch out, and its scale with it.
    paths = {branch: path for branch, path in paths.items() if module_at(model, path.rpartition(".")[0]) is not None}
    tensors: list[Any] = [flattened(model, path) or resolve(model, path) for path in paths.values()]
    logs = [log.detach().double() for log in in_one_piece(tensors)]
    if not logs:
        return {}
    (together,) = agreed([torch.cat([log.to(logs[0].device) for log in logs])], [mesh])
    return dict(zip(paths, together.exp().tolist(), strict=True))


def _shared(blocks: Sequence[ResidualBlock]) -> dict[tuple[str, str], str]:
    """Return where a branch is listed that a block shares with an earlier one, by the block's name and the kind."""
    found = {}
    for block in blocks:
        for kind, branch in (("attention", block.attention), ("mlp", block.mlp)):
            for alias in () if branch is None else branch.aliases:
                users = (other for other in blocks if other != block and alias.startswith(f"{other.name}."))
                found.update({(other.name, kind): block.name for other in users})
    return found


def _layer(
    block: ResidualBlock,
    values: Mapping[Branch, _Value],
    scales: Mapping[Branch | None, float],
    shared: Mapping[tuple[str, str], str],
) -> LayerMeasurement:
    def value(kind: str, branch: Branch | None) -> _Value:
        if branch is not None:
            return values[branch]
        owner = shared.get((block.name, kind))
        return _Value(reason=None if owner is None else f"it is that of {owner}, where it is measured")

    attention, mlp = value("attention", block.attention), value("mlp", block.mlp)
    bounds = [value.bound for value in (attention, mlp) if value.bound is not None]
    return LayerMeasurement(
        index=block.index,
        name=block.name,
        mlp_norm=mlp.norm,
        attention_norm=attention.norm,
        mlp_scale=scales.get(block.mlp, 1.0),
        attention_scale=scales.get(block.attention, 1.0),
        mlp_expert=mlp.expert,
        mlp_reason=mlp.reason,
        attention_reason=attention.reason,
        error_bound=max(bounds, default=None),
    )

"""Model and real inputs in, the Jacobians of its branches measured: ``linearization="jacobian"``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_spectral.errors import ExampleInputError
from lightning_spectral.linalg import Jacobian, RandomizedSVD, Solver
from lightning_spectral.measuring.branch_functions import BranchFunction, BranchSum, branch_functions
from lightning_spectral.measuring.response import Response, derivative_error, response
from lightning_spectral.measuring.updates import Update, UpdateWatch
from lightning_spectral.records import Branch, FunctionalMeasurement, LayerMeasurement, Measurement, ResidualBlock
from lightning_spectral.weights.model import refuse_lazy
from lightning_spectral.weights.scaled import common_scale, scale_module

__all__ = ["measure_functions", "update_ratios", "watch_updates"]

# A product by a Jacobian costs a pass through its branch, so the bound may be looser than that of a weight: a few
# columns, a few steps.
_SOLVER = RandomizedSVD(n_components=2, n_oversamples=4, tolerance=0.02, max_bound=0.1, max_iter=8)
# How far a branch run again in float64 may be from the recorded pass, in square roots of the recorded rounding error,
# which is never that of float64, because many norms and position codes are computed in float32 whatever the dtype;
# how far its derivative may be from a difference, which kinks and switches of an activation disturb.
_REPLAY_TOLERANCE, _DERIVATIVE_TOLERANCE = 4.0, 1e-3


def measure_functions(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    solver: Solver | None = None,
) -> Measurement:
    """Measure the Jacobian of every branch by the stream that it reads, ∂(s · B(x))/∂x, on real inputs.

    All of the branch is in it: norms, biases, activation, gate, attention pattern and mask, experts as routed, every
    residual multiplier. The operator acts on all positions of all sequences at once, so the norm of an attention branch
    grows with the length of the sequences: compare only measurements on batches of one shape.

    ``mlp_norm`` and ``attention_norm`` are Rayleigh values, below ‖J‖₂, and ``error_bound`` β claims ‖J‖₂ ≤ (1 + β) ·
    norm. By default the solver stops early, with bounds of about 0.1; pass another one for tighter bounds.

    Args:
        model: The model.
        blocks: Its blocks.
        args: Positional arguments of one forward pass on a small batch; guessed where there are no arguments.
        kwargs: Keyword arguments of that pass.
        solver: How the spectral norms are computed.

    Returns:
        The measurement. A branch that is not measured has a reason: it runs several times in one pass, it does not
        reach the stream in this pass, or it could not be differentiated.

    Raises:
        ExampleInputError: The model could not be run.
        ConfigurationError: A lazy layer has no weights yet.
    """
    refuse_lazy(model)
    start, layers = time.perf_counter(), []
    with torch.inference_mode(False), torch.autocast(_device(model).type, enabled=False):
        functions = _functions(model, blocks, args, kwargs)
        for block in blocks:
            layout = _layout(block, functions)
            mlp, attention = (
                _response(_of_kind(branches, functions), block.token_dims, layout, solver or _SOLVER)
                for branches in (block.mlp_branches, block.attention_branches)
            )
            layers.append(_layer(model, block, mlp, attention))
    return Measurement(0, "jacobian", tuple(layers), seconds=time.perf_counter() - start)


def update_ratios(
    model: nn.Module, blocks: Sequence[ResidualBlock], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[int, Update]:
    """Compare what the MLP and the attention branch of every block add to the stream: one forward pass, no derivative.

    Args:
        model: The model.
        blocks: Its blocks.
        args: Positional arguments of the pass; guessed where there are no arguments.
        kwargs: Its keyword arguments.

    Returns:
        By the index of the block; blocks without both branches, or called several times, are left out.

    Raises:
        ExampleInputError: The model could not be run.
        ConfigurationError: A lazy layer has no weights yet.
    """
    refuse_lazy(model)
    with torch.inference_mode(False):
        functions = _functions(model, blocks, args, kwargs)
        updates = {}
        for block in blocks:
            mlp, attention = (
                _of_kind(branches, functions) for branches in (block.mlp_branches, block.attention_branches)
            )
            if isinstance(mlp, BranchSum) and isinstance(attention, BranchSum):
                updates[block.index] = Update.of(mlp.recorded(), attention.recorded())
    return updates


def watch_updates(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    through: nn.Module | None = None,
) -> UpdateWatch:
    """Return a context that compares the updates of every block in the forward passes that run inside it.

    One pass is traced now, to see which constants follow the sites; the watch itself costs none. Left out are blocks
    with a branch that no module carries, that a learned multiplier outside of its site follows, or that runs several
    times in one pass: there the output of the site is not what is added.

    Args:
        model: The model.
        blocks: Its blocks.
        args: Positional arguments of the traced pass; guessed where there are no arguments.
        kwargs: Its keyword arguments.
        through: The module of the model that takes them, by default the model or what it wraps.

    Returns:
        The watch; after a pass inside it, ``updates`` has the comparisons by the index of the block.

    Raises:
        ExampleInputError: The model could not be run.
    """
    with torch.inference_mode(False):
        functions = _functions(model, blocks, args, kwargs, through)
    constants = {
        branch: function.behind
        for branch, function in functions.items()
        if isinstance(function, BranchFunction) and function.behind is not None
    }
    return UpdateWatch(model, blocks, constants)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _functions(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    through: nn.Module | None = None,
) -> dict[Branch, BranchFunction | str]:
    if not blocks:
        return {}
    # Tensors of inference mode cannot enter a graph, not even as constants.
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    try:
        return branch_functions(model, blocks, args, kwargs, through=through)
    except ExampleInputError as error:
        if args or kwargs:
            raise
        raise ExampleInputError(
            f"branches are measured as functions on real inputs, and none could be guessed: pass batch=... ({error})"
        ) from error


def _of_kind(branches: Sequence[Branch], functions: Mapping[Branch, BranchFunction | str]) -> BranchSum | str | None:
    """Return the branches of one kind as one function, or why there is none; ``None`` without a branch."""
    found = [functions[branch] for branch in branches]
    reason = next((item for item in found if isinstance(item, str)), None)
    if reason is not None or not found:
        return reason
    whole = [item for item in found if isinstance(item, BranchFunction)]
    if len({item.stream.shape for item in whole}) > 1:
        return "its branches read the stream in different shapes"
    return BranchSum(tuple(whole))


def _layout(block: ResidualBlock, functions: Mapping[Branch, BranchFunction | str]) -> torch.Size | None:
    """Return the shape in which the attention reads the stream, which is what the dimensions of the tokens refer to."""
    attention = None if block.attention is None else functions[block.attention]
    return attention.stream.shape if isinstance(attention, BranchFunction) else None


def _response(
    function: BranchSum | str | None,
    token_dims: tuple[int, ...],
    layout: torch.Size | None,
    solver: Solver,
) -> Response | str | None:
    """Return what is measured of a branch, or why nothing is."""
    if not isinstance(function, BranchSum):
        return function
    try:
        J = Jacobian(function, function.stream)
        return _problem(J, function) or response(J, token_dims if layout == J.x.shape else (), solver)
    except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # of whatever is in the branch
        return f"it cannot be differentiated: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        function.forget()


def _problem(J: Jacobian, function: BranchSum) -> str | None:
    """Check a function against the pass that it was taken from, and its two derivatives against each other."""
    recorded = function.recorded()
    if not bool(recorded.isfinite().all()):
        return "what it adds is not finite (NaN or Inf)"
    error = float(torch.linalg.vector_norm(J.value - recorded))
    if not error <= _REPLAY_TOLERANCE * max(function.precision(), torch.finfo(torch.float32).eps) ** 0.5 * float(
        torch.linalg.vector_norm(recorded)
    ):
        return f"run again in {J.dtype}, the branch gives something else (off by {error:.1e})"
    error = derivative_error(J, generator=torch.Generator().manual_seed(1))
    if not error <= _DERIVATIVE_TOLERANCE:
        return f"its derivative is not the one that its operations claim (relative error {error:.1e})"
    return None


def _layer(
    model: nn.Module, block: ResidualBlock, mlp: Response | str | None, attention: Response | str | None
) -> LayerMeasurement:
    bounds = [item.norm.error_bound for item in (mlp, attention) if isinstance(item, Response)]
    return LayerMeasurement(
        index=block.index,
        name=block.name,
        mlp_norm=mlp.norm.value if isinstance(mlp, Response) else None,
        attention_norm=attention.norm.value if isinstance(attention, Response) else None,
        mlp_scale=_scale(model, block.mlp_branches),
        attention_scale=_scale(model, block.attention_branches),
        mlp_reason=mlp.norm.reason if isinstance(mlp, Response) else mlp,
        attention_reason=attention.norm.reason if isinstance(attention, Response) else attention,
        error_bound=max((bound for bound in bounds if bound is not None), default=None),
        doubt=block.doubt,
        functional=_functional(mlp, attention),
    )


def _scale(model: nn.Module, branches: Sequence[Branch]) -> float:
    scales = [
        1.0 if module is None else float(module.get_parameter("log_scale").detach().double().exp())
        for module in (scale_module(model, branch) for branch in branches)
    ]
    return common_scale(scales)


def _functional(mlp: Response | str | None, attention: Response | str | None) -> FunctionalMeasurement:
    m = mlp if isinstance(mlp, Response) else None
    a = attention if isinstance(attention, Response) else None
    ratio = m.gains.frobenius / a.gains.frobenius if m and a and m.gains.frobenius and a.gains.frobenius else None
    update = Update.of(m.value, a.value) if m and a else Update()
    return FunctionalMeasurement(
        frobenius_ratio=ratio,
        update_ratio=update.ratio,
        update_cosine=update.cosine,
        mlp_gain_mean=m.gains.mean if m else None,
        mlp_gain_deviation=m.gains.deviation if m else None,
        attention_gain_mean=a.gains.mean if a else None,
        attention_gain_deviation=a.gains.deviation if a else None,
        finite_differences=any(item.finite_differences for item in (m, a) if item),
    )

"""Measure the Jacobians of a model's branches on real inputs: ``linearization="jacobian"``."""

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
from lightning_spectral.weights.names import plain_name
from lightning_spectral.weights.scaled import common_scale, scale_module

__all__ = ["measure_functions", "update_ratios", "watch_updates"]

# A product by a Jacobian costs a pass through its branch. So the solver takes fewer columns and steps than for weights,
# and accepts a looser bound.
_SOLVER = RandomizedSVD(n_components=2, n_oversamples=4, tolerance=0.02, max_bound=0.1, max_iter=8)
# Largest distance of a branch that is run again in float64 from the recorded pass, in units of √ε. ε is at least the
# one of float32, because many norms and position codes are computed in float32 in any model.
# Largest relative distance of its derivative from a difference; kinks of an activation disturb the difference.
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

    J contains the whole branch: norms, biases, activation, gate, attention pattern and mask, experts as routed, every
    residual multiplier. The operator acts on all positions of all sequences at once, so the norm of an attention branch
    grows with the length of the sequences. Compare only measurements on batches of one shape.

    ``mlp_norm`` and ``attention_norm`` are Rayleigh values, which are at most ‖J‖₂. ``error_bound`` is β with
    ‖J‖₂ ≤ (1 + β) · norm. The default solver stops early, with bounds of about 0.1. Pass another for tighter ones.

    Args:
        model: The model.
        blocks: Its blocks.
        args: Positional arguments of one forward pass on a small batch. Without any argument, an input is guessed.
        kwargs: Keyword arguments of that pass.
        solver: How the spectral norms are computed.

    Returns:
        The measurement. A branch without a norm has a reason: it runs several times in one pass, it does not reach the
        stream in this pass, or it cannot be differentiated.

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
    """Compare the updates that the MLP and the attention of every block add to the stream. Costs one forward pass.

    Args:
        model: The model.
        blocks: Its blocks.
        args: Positional arguments of the pass. Without any argument, an input is guessed.
        kwargs: Keyword arguments of the pass.

    Returns:
        The comparison of each block, by its index. Blocks without both branches, or called several times, are absent.

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

    One pass is traced now, to find the constants that multiply the outputs of the sites. The watch itself costs no
    pass. A block is left out if the output of a site is not the update: if no module carries a branch, if a learned
    multiplier follows the site, or if a branch runs several times in one pass.

    Args:
        model: The model.
        blocks: Its blocks.
        args: Positional arguments of the traced pass. Without any argument, an input is guessed.
        kwargs: Keyword arguments of the traced pass.
        through: The module of the model that takes the arguments; the model or the module it wraps by default.

    Returns:
        The watch. After a pass inside of its context, ``updates`` has the comparison of each block, by its index.

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
    # Clones, because tensors of inference mode cannot enter a graph, even as constants.
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
    """Return the branches of one kind as one function, or the reason for none; ``None`` if there is no branch."""
    found = [functions[branch] for branch in branches]
    reason = next((item for item in found if isinstance(item, str)), None)
    if reason is not None or not found:
        return reason
    whole = [item for item in found if isinstance(item, BranchFunction)]
    if len({item.stream.shape for item in whole}) > 1:
        return "its branches read the stream in different shapes"
    return BranchSum(tuple(whole))


def _layout(block: ResidualBlock, functions: Mapping[Branch, BranchFunction | str]) -> torch.Size | None:
    """Return the shape in which the attention reads the stream; ``token_dims`` are dimensions of this shape."""
    attention = None if block.attention is None else functions[block.attention]
    return attention.stream.shape if isinstance(attention, BranchFunction) else None


def _response(
    function: BranchSum | str | None,
    token_dims: tuple[int, ...],
    layout: torch.Size | None,
    solver: Solver,
) -> Response | str | None:
    """Return the response of a branch, or the reason for none."""
    if not isinstance(function, BranchSum):
        return function
    try:
        J = Jacobian(function, function.stream)
        return _problem(J, function) or response(J, token_dims if layout == J.x.shape else (), solver)
    except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # raised inside of the branch
        return f"it cannot be differentiated: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        function.forget()


def _problem(J: Jacobian, function: BranchSum) -> str | None:
    """Check a function against its recorded pass, and its derivative against a difference. Return the problem."""
    recorded = function.recorded()
    if not bool(recorded.isfinite().all()):
        return "its update is not finite (NaN or Inf)"
    error = float(torch.linalg.vector_norm(J.value - recorded))
    if not error <= _REPLAY_TOLERANCE * max(function.precision(), torch.finfo(torch.float32).eps) ** 0.5 * float(
        torch.linalg.vector_norm(recorded)
    ):
        return f"run again in {J.dtype}, the branch returns other values (off by {error:.1e})"
    error = derivative_error(J, generator=torch.Generator().manual_seed(1))
    if not error <= _DERIVATIVE_TOLERANCE:
        return f"its derivative differs from a difference of its values (relative error {error:.1e})"
    return None


def _layer(
    model: nn.Module, block: ResidualBlock, mlp: Response | str | None, attention: Response | str | None
) -> LayerMeasurement:
    bounds = [item.norm.error_bound for item in (mlp, attention) if isinstance(item, Response)]
    return LayerMeasurement(
        index=block.index,
        name=plain_name(block.name),
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

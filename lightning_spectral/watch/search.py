"""Which blocks are watched: those that the user names, else those of what the run trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.discovery import find_blocks
from lightning_spectral.discovery.find import blocks_in_calls
from lightning_spectral.errors import ExampleInputError
from lightning_spectral.records import ResidualBlock
from lightning_spectral.watch.first_forward import holds_any, trained_blocks
from lightning_spectral.watch.options import Wanted
from lightning_spectral.watch.outermost import Call
from lightning_spectral.weights.paths import module_at

__all__ = ["blocks_of", "guessed_blocks", "shown_blocks", "trained_parameters"]


def blocks_of(model: nn.Module, wanted: Wanted) -> tuple[ResidualBlock, ...]:
    """Return the blocks that a user has named, by hints or in the module's ``spectral_blocks``; else find them.

    Raises:
        ExampleInputError, BlocksNotFoundError, ConfigurationError: As :func:`find_blocks` does.
    """
    named = _named(model, wanted)
    return find_blocks(model, hints=wanted) if named is None else named  # type: ignore[arg-type]


def _named(model: nn.Module, wanted: Wanted) -> tuple[ResidualBlock, ...] | None:
    own: Sequence[ResidualBlock] | None = getattr(model, "spectral_blocks", None)
    chosen = own if wanted is None else wanted
    return None if chosen is None or isinstance(chosen, Mapping) else tuple(chosen)


def trained_parameters(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return what optimizers hold of a model or, where they hold nothing of it, what needs gradients."""
    own = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    held = [own[id(item)] for group in groups for item in group["params"] if id(item) in own]
    return [*(held or own.values())]


def guessed_blocks(model: nn.Module, wanted: Wanted, trained: Sequence[Tensor]) -> tuple[ResidualBlock, ...] | None:
    """Return the blocks before anything has run; ``None`` where the first real forward pass has to show them.

    Raises:
        BlocksNotFoundError, ConfigurationError: As :func:`find_blocks` does.
    """
    named = _named(model, wanted)
    if named is not None:
        return named
    try:
        blocks = blocks_of(model, wanted)
    except ExampleInputError:
        return None
    if wanted is not None:
        return blocks
    if not _has_forward(model) and not _trains_any(model, blocks, trained):
        return None  # some part of the module could be run, and the run may train another one
    return trained_blocks(model, blocks, trained)


def shown_blocks(
    model: nn.Module, wanted: Wanted, calls: Sequence[Call], trained: Sequence[Tensor]
) -> tuple[tuple[ResidualBlock, ...], Sequence[Call]]:
    """Return the blocks that the calls of a real training step show, and the calls as short as they can be.

    Raises:
        ExampleInputError, BlocksNotFoundError, ConfigurationError: As :func:`blocks_in_calls` does.
    """
    hints = wanted if isinstance(wanted, Mapping) else None
    try:
        used: Sequence[Call] = [call.shortened(2) for call in calls]
        blocks = _in_calls(model, used, hints)
    except ExampleInputError:  # a model that wants its batch whole
        used = calls
        blocks = _in_calls(model, used, hints)
    return blocks if wanted is not None else trained_blocks(model, blocks, trained), used


def _in_calls(model: nn.Module, calls: Sequence[Call], hints: Mapping[str, Any] | None) -> tuple[ResidualBlock, ...]:
    return blocks_in_calls(model, [(call.module, call.args, call.kwargs) for call in calls], hints)


def _trains_any(model: nn.Module, blocks: Sequence[ResidualBlock], trained: Sequence[Tensor]) -> bool:
    names = {factor.parameter for block in blocks for branch in block.branches for factor in branch.factors}
    held = set(map(id, trained))
    owners = {name.rpartition(".")[0].partition(".parametrizations")[0] for name in names if name is not None}
    modules = (module_at(model, owner) for owner in owners)
    return any(module is not None and holds_any(module, held) for module in modules)


def _has_forward(model: nn.Module) -> bool:
    """Whether the user has written a forward pass; that of a LightningModule raises an error."""
    owner = next(base for base in type(model).__mro__ if "forward" in vars(base))
    return owner.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")

"""A module that has only the weights of one block, under the names that they have in the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_spectral.checkpoints.files import plain_name
from lightning_spectral.records import Factor, Path, ResidualBlock
from lightning_spectral.weights.scaled import CHILD

__all__ = ["parameters_of", "skeleton", "stored_names", "unwrapped"]


class _Room(nn.Module):
    """A module without anything, so that any name is free."""


class _Scale(nn.Module):
    """A residual scale as the checkpoint has it."""

    def __init__(self, log_scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("log_scale", log_scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.exp(self.get_buffer("log_scale")).to(weight.dtype)  # as the model rounds it


def parameters_of(block: ResidualBlock) -> dict[str, None]:
    """Return the attribute paths of all factors of a block, in order."""
    factors = (factor for branch in block.branches for factor in branch.factors)
    return dict.fromkeys(factor.parameter for factor in factors if factor.parameter is not None)


def stored_names(path: str, names: Collection[str]) -> tuple[str, str | None] | None:
    """Return under which names a weight and the residual scale on it are stored, ``None`` where it is not.

    Args:
        path: Attribute path of the weight.
        names: The names of the checkpoint.
    """
    owner, _, name = path.rpartition(".")
    inner = f"{owner}.parametrizations.{name}" if owner else f"parametrizations.{name}"
    if path in names:
        return path, None
    # A scale on a weight is its only parametrization; what else may stand there is not understood.
    if f"{inner}.original" in names and f"{inner}.0.log_scale" in names and f"{inner}.1.log_scale" not in names:
        return f"{inner}.original", f"{inner}.0.log_scale"
    return None


def unwrapped(block: ResidualBlock) -> ResidualBlock:
    """Return a block of a compiled or wrapped model under the names that an opened checkpoint has.

    Args:
        block: A block that was found in the model.
    """

    def plain(factor: Factor) -> Factor:
        name = None if factor.parameter is None else plain_name(factor.parameter)
        return replace(factor, parameter=name, adapters=tuple(tuple(map(plain, chain)) for chain in factor.adapters))

    branches = tuple(
        replace(
            branch,
            site=plain_name(branch.site),
            aliases=tuple(map(plain_name, branch.aliases)),
            paths=tuple(Path(tuple(map(plain, path.factors)), path.expert) for path in branch.paths),
        )
        for branch in block.branches
    )
    return replace(block, name=plain_name(block.name), branches=branches)


def skeleton(block: ResidualBlock, names: Collection[str], read: Callable[[str], Tensor]) -> nn.Module:
    """Return a module with the weights of a block, and with the residual scales that belong to it.

    Args:
        block: The block.
        names: The names of the checkpoint.
        read: Reads a tensor by its name in the checkpoint.
    """
    model = _Room()
    for path in parameters_of(block):
        stored = stored_names(path, names)
        if stored is not None:
            _put(model, path, read(stored[0]), None if stored[1] is None else read(stored[1]))
    for branch in block.branches:
        scale = f"{branch.site}.{CHILD}.log_scale"
        if scale in names:
            _put(model, scale, read(scale), None)
    return model


def _put(model: nn.Module, path: str, tensor: Tensor, log_scale: Tensor | None) -> None:
    *owners, name = path.split(".")
    room = model
    for owner in owners:
        rooms: Mapping[str, nn.Module | None] = room._modules
        if rooms.get(owner) is None:
            room.add_module(owner, _Room())
        room = room.get_submodule(owner)
    room.register_buffer(name, tensor.detach())
    if log_scale is not None:
        parametrize.register_parametrization(room, name, _Scale(log_scale))

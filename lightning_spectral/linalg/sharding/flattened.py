"""Weights that ``FullyShardedDataParallel`` has flattened and cut: each process holds a range of the entries.

It lays the parameters of a module behind each other in one vector, and cuts the vector into as many parts as there are
processes. Of one parameter a process then holds a range of entries, counted by rows. The range may be empty, and may
begin and end within a row. So it is at most three rectangles of the matrix::

    . . . ┌─────┐           head: the end of a row
    ┌─────┴─────┤
    │           │           whole rows
    ├────┬──────┘
    └────┘ . . .            tail: the beginning of a row
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.presence import is_wrapped_by_fsdp

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._flat_param import FlatParamHandle

__all__ = ["FlatShard", "boxes", "flat_meshes", "flat_shard", "is_flattened"]


@dataclass(frozen=True, slots=True, eq=False)
class FlatShard:
    """The part of a flattened weight that one process holds.

    Attributes:
        entries: ``(count,)``, successive entries of the weight.
        shape: Shape of the whole weight.
        start: The place of the first entry in the weight, counted by rows.
        mesh: The processes that hold the ranges.
    """

    entries: Tensor
    shape: torch.Size
    start: int
    mesh: DeviceMesh


def is_flattened(model: torch.nn.Module) -> bool:
    """Whether the parameters of a model, or of a part of it, are flattened and cut."""
    return any(_handles(model))


def flat_meshes(model: torch.nn.Module) -> list[DeviceMesh]:
    """Return the processes that share the parameters, one mesh for every flattened part of a model."""
    return [_mesh(handle) for handle in _handles(model)]


def flat_shard(wrapper: FullyShardedDataParallel, parameter: object) -> FlatShard | None:
    """Return the part of a parameter that this process holds, ``None`` if every process now has it in one piece.

    Args:
        wrapper: The innermost wrapper around the parameter's module.
        parameter: The parameter as its module holds it.

    Raises:
        ConfigurationError: Parameters are no objects of their own in this wrapper.
    """
    handle = wrapper._handle
    if handle is None or not _is_cut(wrapper) or not handle.is_sharded(handle.flat_param):
        return None
    flat = handle.flat_param  # torch has no public name for the place of a parameter in it
    if flat._params is None:
        raise ConfigurationError(
            "the weight is part of a FlatParameter, in which it cannot be told from the others: expected "
            "FullyShardedDataParallel(use_orig_params=True)"
        )
    for candidate, info, shape in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):
        if candidate is parameter:
            start, first, count = info.intra_param_start_idx or 0, info.offset_in_shard or 0, info.numel_in_shard or 0
            entries = flat.detach()[first : first + count]
            return FlatShard(entries, shape, start, _mesh(handle))
    return None


def boxes(entries: Tensor, shape: torch.Size, start: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Cut a range of the entries of a tensor into boxes, as views of the range.

    Args:
        entries: ``(count,)``, successive entries.
        shape: Shape of the tensor.
        start: The place of the first entry, counted by rows.

    Yields:
        A box, and its indices along every dimension, as :func:`~lightning_spectral.linalg.sharding.tiles.held` returns
        them.
    """
    inner = shape[1:]
    size = inner.numel()
    head = min(-start % size, len(entries))  # up to the next whole row
    tail = head + (len(entries) - head) // size * size  # behind the last whole row
    for first, last in ((0, head), (tail, len(entries))):
        if first < last:
            row, place = divmod(start + first, size)
            for box, indices in boxes(entries[first:last], inner, place):
                yield box.unsqueeze(0), [torch.tensor([row], device="cpu"), *indices]
    if head < tail:
        row = (start + head) // size
        rows = torch.arange(row, row + (tail - head) // size, device="cpu")
        yield entries[head:tail].view(-1, *inner), [rows, *(torch.arange(length, device="cpu") for length in inner)]


def _is_cut(wrapper: FullyShardedDataParallel) -> bool:
    return wrapper._handle is not None and wrapper._handle.uses_sharded_strategy


def _handles(model: torch.nn.Module) -> Iterator[FlatParamHandle]:
    wrappers = (module for module in model.modules() if is_wrapped_by_fsdp(module))
    yield from (wrapper._handle for wrapper in wrappers if wrapper._handle is not None and _is_cut(wrapper))


def _mesh(handle: FlatParamHandle) -> DeviceMesh:
    return DeviceMesh.from_group(handle.process_group, handle.device.type)

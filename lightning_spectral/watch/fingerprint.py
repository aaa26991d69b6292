"""Whether weights are still those that were measured, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.flattened import FlatShard
from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.records import ResidualBlock
from lightning_spectral.weights.names import parameters_of
from lightning_spectral.weights.protocol import Weights

__all__ = ["bits", "fingerprint", "held", "same_weights"]

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDEST = 8  # entries of one byte in the widest integer


def fingerprint(weights: Weights, blocks: Iterable[ResidualBlock]) -> dict[str, tuple[bool, int]]:
    """Return the sum of the bit patterns of everything that a measurement of the blocks reads, in one transfer.

    The sum is exact in any order and on any device, and needs one pass over the weights.

    Args:
        weights: Those of the model that the blocks were found in.
        blocks: The blocks.

    Returns:
        By parameter: whether this process holds all of it or a shard, and the sum over what it holds. What cannot be
        read is left out.
    """
    found: dict[str, tuple[bool, Tensor]] = {}
    for name in parameters_of(blocks):
        # Unreadable weights are skipped here; their reasons are in the measurement.
        unreadable = suppress(AttributeError, ConfigurationError, RuntimeError, TypeError, ValueError)
        with unreadable, torch.no_grad(), weights.read(name) as tensor:
            part = held(tensor)
            found[name] = part is tensor, _sum(part)
    if not found:
        return {}
    first = next(total for _, total in found.values())
    sums = torch.stack([total.to(first.device) for _, total in found.values()]).tolist()
    return {name: (whole, total) for (name, (whole, _)), total in zip(found.items(), sums, strict=True)}


def same_weights(before: Mapping[str, tuple[bool, int]], after: Mapping[str, tuple[bool, int]]) -> bool:
    """Whether two fingerprints are of the same weights.

    Where weights are sharded, some are in one piece for a while (behind a validation, under FSDP2): a shard says
    nothing of the whole, and passes for unchanged.
    """
    return before.keys() == after.keys() and all(
        value == after[name] for name, value in before.items() if value[0] is after[name][0]
    )


def held(tensor: Tensor | FlatShard) -> Tensor:
    """Return what this process holds of a weight."""
    if isinstance(tensor, FlatShard):
        return tensor.entries
    return tensor.to_local() if is_dtensor(tensor) else tensor


def bits(tensor: Tensor) -> Tensor:
    """Return the entries of a tensor as a vector of integers with the same bits."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_WORDS[tensor.element_size()]).flatten()


def _sum(tensor: Tensor) -> Tensor:
    words = bits(tensor)
    if words.storage_offset() * words.element_size() % _WIDEST:
        return words.sum(dtype=torch.int64)
    # Read as the widest integers, which are added without being converted; sums wrap around, in any order alike.
    whole = words.numel() // _WIDEST * _WIDEST
    return words[:whole].view(torch.int64).sum() + words[whole:].sum(dtype=torch.int64)

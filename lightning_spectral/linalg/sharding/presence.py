"""Tell whether a value is sharded without importing ``torch.distributed.tensor``, which takes half a second.

A class whose module has not been imported has no instances, so the answer is then no.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

__all__ = ["is_dtensor", "is_fully_sharded", "is_wrapped_by_fsdp"]


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a ``DTensor``."""
    return _is_a(value, "torch.distributed.tensor", "DTensor")


def is_fully_sharded(module: object) -> TypeGuard[FSDPModule]:
    """Whether ``fully_shard`` was applied to a module (FSDP2)."""
    return _is_a(module, "torch.distributed.fsdp", "FSDPModule")


def is_wrapped_by_fsdp(module: object) -> TypeGuard[FullyShardedDataParallel]:
    """Whether a module is a ``FullyShardedDataParallel`` (FSDP1)."""
    return _is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def _is_a(value: object, home: str, name: str) -> bool:
    """Whether a value is an instance of a class, given by module and name, if the module has been imported."""
    kind = getattr(sys.modules.get(home), name, None)
    return kind is not None and isinstance(value, kind)

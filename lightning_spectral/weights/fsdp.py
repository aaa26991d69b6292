"""Parameters that ``FullyShardedDataParallel`` has flattened, found by their names."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.flattened import FlatShard, flat_shard, is_flattened
from lightning_spectral.linalg.sharding.presence import is_wrapped_by_fsdp

__all__ = ["flattened"]


def flattened(model: nn.Module, path: str) -> FlatShard | None:
    """Return what this process holds of a parameter, ``None`` if that is all of it or not flattened.

    Args:
        model: The outermost wrapper, if any: what is inside of it does not know it. Paths are those of the model that
            it wraps, which the wrappers pass on.
        path: Attribute path of the parameter.

    Raises:
        ConfigurationError: The weight is computed from flattened parameters.
    """
    *owners, name = path.split(".")
    value: object = model
    wrapper = None
    for owner in ("", *owners):
        value = getattr(value, owner) if owner else value
        wrapper = value if is_wrapped_by_fsdp(value) else wrapper
    if wrapper is None:
        return None
    assert isinstance(value, nn.Module)
    if parametrize.is_parametrized(value, name) and is_flattened(wrapper):
        raise ConfigurationError(f"{path} is computed from other parameters, and those are flattened and cut")
    return flat_shard(wrapper, getattr(value, name))

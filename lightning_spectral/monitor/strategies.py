"""The strategies under which a weight cannot be read, or is not what it seems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_spectral.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = ["check_strategy", "is_tensor_parallel"]

# By name, because there are two copies of each class, and because some need packages that may not be installed.
_UNREADABLE = {
    "FSDPStrategy": "flattens the weights of a module into one vector and cuts that into pieces, so that no process "
    "has a part of a matrix to multiply with. Use ModelParallelStrategy with fully_shard in configure_model (FSDP2)",
    "DeepSpeedStrategy": "partitions weights in ways that this package cannot read (ZeRO stage 3), and has not been "
    "tested with. Use DDPStrategy, or ModelParallelStrategy with fully_shard in configure_model (FSDP2)",
    "XLAFSDPStrategy": "shards weights in a way that this package cannot read, and has not been tested with",
}


def check_strategy(strategy: Strategy) -> None:
    """Check that weights can be read under a strategy.

    Raises:
        ConfigurationError: They cannot.
    """
    for base in type(strategy).__mro__:
        if base.__name__ in _UNREADABLE:
            raise ConfigurationError(
                f"SpectralMonitor cannot work under {base.__name__}: it {_UNREADABLE[base.__name__]}"
            )


def is_tensor_parallel(strategy: Strategy) -> bool:
    """Whether ``configure_model`` will cut layers into pieces, which has to come before scales are attached to them."""
    mesh = getattr(strategy, "device_mesh", None)
    return mesh is not None and "tensor_parallel" in mesh.mesh_dim_names and mesh["tensor_parallel"].size() > 1

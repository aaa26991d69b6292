"""The strategies under which a weight cannot be read, or is not what it seems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.flattened import is_flattened

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = ["brings_back_own_weights", "check_strategy", "is_tensor_parallel", "outermost", "will_shard"]

# By name, because there are two copies of each class, and because some need packages that may not be installed.
_UNREADABLE = {
    "DeepSpeedStrategy": "partitions weights in ways that this package cannot read (ZeRO stage 3), and has not been "
    "tested with. Use DDPStrategy, FSDPStrategy or ModelParallelStrategy",
    "XLAFSDPStrategy": "shards weights in a way that this package cannot read, and has not been tested with",
}


def check_strategy(strategy: Strategy) -> None:
    """Check that weights can be read under a strategy.

    Raises:
        ConfigurationError: They cannot.
    """
    for name in _names(strategy):
        if name in _UNREADABLE:
            raise ConfigurationError(f"SpectralMonitor cannot work under {name}: it {_UNREADABLE[name]}")


def will_shard(strategy: Strategy) -> bool:
    """Whether the model may be cut after callbacks were set up, and can no longer be run by them then."""
    return hasattr(strategy, "device_mesh") or "FSDPStrategy" in _names(strategy)


def outermost(strategy: Strategy, model: nn.Module) -> nn.Module:
    """Return what the strategy has put around a model, if that is needed to read its weights; else the model."""
    around = strategy.model
    return model if around is None or not is_flattened(around) else around


def is_tensor_parallel(strategy: Strategy) -> bool:
    """Whether ``configure_model`` will cut layers into pieces, which has to come before scales are attached to them."""
    mesh = getattr(strategy, "device_mesh", None)
    return mesh is not None and "tensor_parallel" in mesh.mesh_dim_names and mesh["tensor_parallel"].size() > 1


def brings_back_own_weights(strategy: Strategy) -> bool:
    """Whether the processes that train are started from the process of the user, which gets the weights of its module.

    What the module got in the other processes is left behind without a word.
    """
    return bool({"_MultiProcessingLauncher", "_XLALauncher"} & set(_names(strategy.launcher)))


def _names(item: object) -> list[str]:
    return [base.__name__ for base in type(item).__mro__]

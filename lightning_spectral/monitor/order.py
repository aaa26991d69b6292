"""The order of callbacks that matters to one that attaches parameters."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.monitor.framework import Callback

__all__ = ["check_order"]

_COPYING = {"WeightAveraging", "StochasticWeightAveraging"}


def check_order(callbacks: Sequence[Callback], monitor: Callback) -> None:
    """Check that no callback copies the model before a monitor attaches residual scales to it.

    Raises:
        ConfigurationError: One does; its copy would have fewer parameters than the model.
    """
    for callback in callbacks[: callbacks.index(monitor)]:
        if _COPYING & {base.__name__ for base in type(callback).__mro__}:  # by name: there are two copies of each class
            raise ConfigurationError(
                f"{type(callback).__name__} copies the model before SpectralMonitor attaches its residual scales: "
                "put SpectralMonitor before it in Trainer(callbacks=[...])"
            )

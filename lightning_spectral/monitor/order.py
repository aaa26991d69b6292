"""The other callbacks of a Trainer: which must not be there, and which must not come before a monitor."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.monitor.framework import Callback
from lightning_spectral.watch.options import Options

__all__ = ["check_order", "check_rivals"]

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


def check_rivals(options: Options, rivals: Sequence[Options]) -> None:
    """Check that several monitors of one Trainer do not get in each other's way.

    Args:
        options: The settings of one.
        rivals: The settings of the others.

    Raises:
        ConfigurationError: They would write the same keys, or move the same scales.
    """
    if any(other.prefix == options.prefix for other in rivals):
        raise ConfigurationError(
            f"two monitors in one Trainer would both write the keys '{options.prefix}/…'; "
            f"give one of them another prefix, such as prefix='{options.prefix}_{options.linearization}'"
        )
    if options.auto_rescale and any(other.auto_rescale for other in rivals):
        raise ConfigurationError("two monitors in one Trainer would both move the scales: let one of them only watch")

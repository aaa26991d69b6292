"""Which run a series of measurements belongs to. A run is not a number of steps, nor a monitor."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from lightning_spectral.runs.series import Series

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["remember", "remembered"]

# A Trainer that fits a module again goes on with its run, also with another monitor: configure_callbacks makes a new
# one for every fit.
_SERIES: weakref.WeakKeyDictionary[Trainer, dict[str, tuple[weakref.ref[LightningModule], Series]]]
_SERIES = weakref.WeakKeyDictionary()


def remember(trainer: Trainer, pl_module: LightningModule, key: str, series: Series) -> None:
    """Keep a series for as long as there is its Trainer.

    Args:
        trainer: The Trainer.
        pl_module: The module that it trains.
        key: Of the monitor in a checkpoint.
        series: The series.
    """
    _SERIES.setdefault(trainer, {})[key] = weakref.ref(pl_module), series


def remembered(trainer: Trainer, pl_module: LightningModule, key: str) -> Series | None:
    """Return the series of an earlier fit of the same module by the same Trainer."""
    module, series = _SERIES.get(trainer, {}).get(key, (None, None))
    return series if module is not None and module() is pl_module else None

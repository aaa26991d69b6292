"""Watch the spectral balance of MLP and attention in any Transformer while it trains.

.. code-block:: python

    Trainer(callbacks=[SpectralMonitor(every_n_steps=50)])                     # watch a run
    Trainer(callbacks=[SpectralMonitor(every_n_steps=50, auto_rescale=True)])  # watch and steer
    print(measure(model))                                                      # or measure once, without a Trainer

The other names stand in :mod:`lightning_spectral.analysis`, :mod:`~lightning_spectral.errors`,
:mod:`~lightning_spectral.hugging_face`, :mod:`~lightning_spectral.metrics`, :mod:`~lightning_spectral.records` and
:mod:`~lightning_spectral.scales`.
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_spectral.balance import balance_init_, balance_penalty
    from lightning_spectral.checkpoints import audit
    from lightning_spectral.control import GainCeiling, ResidualRescaler
    from lightning_spectral.discovery import find_blocks
    from lightning_spectral.errors import SpectralError
    from lightning_spectral.linalg import ExactSVD, RandomizedSVD
    from lightning_spectral.measuring import measure
    from lightning_spectral.monitor import SpectralMonitor
    from lightning_spectral.pages import report
    from lightning_spectral.records import Measurement, ResidualBlock
    from lightning_spectral.runs import History
    from lightning_spectral.scales import attach_scales, fuse_scales
    from lightning_spectral.watch import Watch

__version__ = "0.1.0.dev0"

__all__ = [
    "ExactSVD",
    "GainCeiling",
    "History",
    "Measurement",
    "RandomizedSVD",
    "ResidualBlock",
    "ResidualRescaler",
    "SpectralError",
    "SpectralMonitor",
    "Watch",
    "attach_scales",
    "audit",
    "balance_init_",
    "balance_penalty",
    "find_blocks",
    "fuse_scales",
    "measure",
    "report",
]

# Where each name lives. A room is loaded when a name of it is first used: torch, Lightning and the rest take seconds.
_ROOMS = {
    "balance": ("balance_init_", "balance_penalty"),
    "checkpoints": ("audit",),
    "control": ("GainCeiling", "ResidualRescaler"),
    "discovery": ("find_blocks",),
    "errors": ("SpectralError",),
    "linalg": ("ExactSVD", "RandomizedSVD"),
    "measuring": ("measure",),
    "monitor": ("SpectralMonitor",),
    "pages": ("report",),
    "records": ("Measurement", "ResidualBlock"),
    "runs": ("History",),
    "scales": ("attach_scales", "fuse_scales"),
    "watch": ("Watch",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
_PUBLIC_ROOMS = ("analysis", "errors", "hugging_face", "metrics", "records", "scales")
_MOVED = {
    **dict.fromkeys(("BlocksNotFoundError", "CheckpointError", "ConfigurationError", "ExampleInputError"), "errors"),
    **dict.fromkeys(("Branch", "LayerMeasurement"), "records"),
    **dict.fromkeys(("EffectiveRank", "SpectralRatio", "StableRank", "TokenResidual", "TokenSimilarity"), "metrics"),
    **dict.fromkeys(("covariance_trajectory", "lyapunov_exponents"), "analysis"),
    "ResidualScales": "scales",
}
_GONE = {
    "heatmap": "History.plot_heatmap()",
    "read_journal": "History.read(path).measurements",
    "read_events": "History.read(path).events",
    "read_actions": "History.read(path).actions",
}


def __getattr__(name: str) -> Any:
    """Return a public name, or one of the public rooms."""
    if name in _HOME:
        collects = gc.isenabled()
        gc.disable()  # what is imported stays, and looking through all of torch for garbage takes a third of the time
        try:
            value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        finally:
            if collects:
                gc.enable()
        return value
    if name in _PUBLIC_ROOMS:
        return import_module(f"{__name__}.{name}")
    where = f"it is lightning_spectral.{_MOVED[name]}.{name} now" if name in _MOVED else None
    where = f"use {_GONE[name]}" if name in _GONE else where
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}" + (f": {where}" if where else ""))


def __dir__() -> list[str]:
    """Return the public names, and the rooms that have more of them."""
    return sorted([*__all__, *_PUBLIC_ROOMS, "__version__"])

"""The one place that imports Lightning, whichever of its two names is installed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lightning_spectral.watch.telling import speak_like

__all__ = ["Callback", "overrides"]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import Callback

    FRAMEWORK: str
else:
    # `lightning` and `pytorch_lightning` are two copies of the same code. A callback that inherits from both is
    # accepted by either Trainer, also where types are checked (command line).
    try:
        from lightning.pytorch.callbacks import Callback
    except ModuleNotFoundError:
        from pytorch_lightning.callbacks import Callback

    FRAMEWORK = Callback.__module__.partition(".callbacks")[0]
    if "pytorch_lightning" in sys.modules and not Callback.__module__.startswith("pytorch_lightning"):
        from pytorch_lightning.callbacks import Callback as Twin

        Callback = type("Callback", (Callback, Twin), {})

speak_like(FRAMEWORK)


def overrides(pl_module: LightningModule, hook: str) -> bool:
    """Whether the user's class defines a hook of LightningModule (of either copy of the framework)."""
    return not _is_framework(next(base for base in type(pl_module).__mro__ if hook in vars(base)))


def _is_framework(base: type) -> bool:
    return base.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")

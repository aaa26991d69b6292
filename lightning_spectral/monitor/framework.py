"""The one place that imports Lightning, whichever of its two names is installed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__all__ = ["Callback", "overrides", "rank_zero_info", "rank_zero_warn"]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
else:
    # `lightning` and `pytorch_lightning` are two copies of the same code. A callback that inherits from both is
    # accepted by either Trainer, also where types are checked (command line).
    try:
        from lightning.pytorch.callbacks import Callback
        from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
    except ModuleNotFoundError:
        from pytorch_lightning.callbacks import Callback
        from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

    if "pytorch_lightning" in sys.modules and not Callback.__module__.startswith("pytorch_lightning"):
        from pytorch_lightning.callbacks import Callback as Twin

        Callback = type("Callback", (Callback, Twin), {})


def overrides(pl_module: LightningModule, hook: str) -> bool:
    """Whether the user's class defines a hook of LightningModule (of either copy of the framework)."""
    owner = next(base for base in type(pl_module).__mro__ if hook in vars(base))
    return owner.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")

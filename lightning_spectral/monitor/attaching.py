"""Before a fit: scales have to be on the module before it is sharded, copied or loaded, however late it is built."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch.utils.hooks import RemovableHandle

from lightning_spectral.control.steering import Steering
from lightning_spectral.errors import BlocksNotFoundError, ConfigurationError, ExampleInputError
from lightning_spectral.monitor.framework import Callback, overrides
from lightning_spectral.monitor.late import AfterHook
from lightning_spectral.monitor.strategies import is_tensor_parallel, will_shard
from lightning_spectral.records import ResidualBlock
from lightning_spectral.scales.loading import refuse_lost_scales
from lightning_spectral.watch.options import Wanted
from lightning_spectral.watch.search import blocks_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Attachment"]


class Attachment:
    """What a monitor has on a module from its setup to the start of training.

    Args:
        wanted: The blocks or the hints that the user has given.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._hook: RemovableHandle | None = None  # until a checkpoint is loaded
        self._late: list[AfterHook] = []
        self._modules: set[int] = set()  # those that the model had when scales were attached
        self.early: tuple[ResidualBlock, ...] | None = None  # found before the model was sharded

    def set_up(self, trainer: Trainer, pl_module: LightningModule, *, fits: bool) -> None:
        """Prepare a module that is only watched."""
        hook = pl_module.register_load_state_dict_pre_hook(refuse_lost_scales)  # type: ignore[no-untyped-call]
        self._hook, self.early = hook, None
        if fits and will_shard(trainer.strategy):
            try:
                self.early = blocks_of(pl_module, self._wanted)
            except (BlocksNotFoundError, ExampleInputError):
                return  # built in configure_model: it has found its blocks itself, or will say how to

    def set_up_scales(
        self, steering: Steering, trainer: Trainer, pl_module: LightningModule, others: Sequence[Callback]
    ) -> None:
        """Attach scales to a module, also to what it builds in its own hooks.

        Raises:
            ConfigurationError, ExampleInputError, BlocksNotFoundError: The blocks to steer cannot be found.
        """
        steering.set_up()
        if is_tensor_parallel(trainer.strategy):
            self._hook = steering.listen(pl_module)
            return
        # A model may be built in hooks that come later. What is sharded there is never attached to: see on_fit_start.
        hooks = [hook for hook in ("setup", "configure_model") if overrides(pl_module, hook)]
        later = [hook for hook in hooks if hook == "setup" or not will_shard(trainer.strategy)]
        attach = partial(self._attach, steering, pl_module, others)
        attach(may_fail=bool(hooks))
        for hook in later:
            self._late.append(AfterHook(pl_module, hook, partial(attach, may_fail=hook != hooks[-1])))

    def _attach(
        self, steering: Steering, pl_module: LightningModule, others: Sequence[Callback], *, may_fail: bool
    ) -> None:
        """Attach the scales, also to what was built since the last time."""
        if self._modules != set(map(id, pl_module.modules())):
            steering.scales = None
        try:
            steering.attach(pl_module, None if self._wanted is None else blocks_of(pl_module, self._wanted), others)
        except (BlocksNotFoundError, ExampleInputError, ConfigurationError):
            if not may_fail:
                raise
        self._modules = set(map(id, pl_module.modules()))
        if self._hook is not None:
            self._hook.remove()
        self._hook = steering.listen(pl_module)

    def release(self) -> None:
        """Leave no hook behind."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        while self._late:
            self._late.pop().remove()

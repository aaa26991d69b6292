"""What a monitor does to a module around its training: scales, and whatever must not lose them.

Scales have to be on the module before it is sharded, copied or loaded, however late it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import RemovableHandle

from lightning_spectral.control.explain import explanation
from lightning_spectral.control.steering import Steering
from lightning_spectral.errors import BlocksNotFoundError, ConfigurationError, ExampleInputError
from lightning_spectral.monitor.framework import Callback, overrides
from lightning_spectral.monitor.late import AfterHook
from lightning_spectral.monitor.strategies import brings_back_own_weights, is_tensor_parallel, will_shard
from lightning_spectral.records import ResidualBlock
from lightning_spectral.scales.loading import lost_scales, refuse_lost_scales, restore_unsaved, saved_sites
from lightning_spectral.watch.options import Options
from lightning_spectral.watch.search import blocks_of
from lightning_spectral.watch.telling import inform

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Attachment"]


class Attachment:
    """A monitor's hold on a module, from its setup to its teardown.

    Args:
        options: The settings of the monitor.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.steering = None if options.law is None else Steering(options.law, options.safe_zone)
        self._hook: RemovableHandle | None = None  # until a checkpoint is loaded
        self._late: list[AfterHook] = []
        self._modules: set[int] = set()  # those that the model had when scales were attached
        self._early: tuple[ResidualBlock, ...] | None = None  # found before the model was sharded

    @property
    def blocks(self) -> tuple[ResidualBlock, ...] | None:
        """The blocks, ``None`` where they are still to be found."""
        return self._early if self.steering is None else self.steering.blocks

    def set_up(self, trainer: Trainer, pl_module: LightningModule, others: Sequence[Callback], *, fits: bool) -> None:
        """Prepare a module.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            others: The other callbacks, which may hold copies of the module.
            fits: Whether it will be trained.

        Raises:
            ConfigurationError, ExampleInputError, BlocksNotFoundError: The blocks to steer cannot be found.
        """
        if self.steering is not None:
            if not self.steering.is_of(pl_module):
                self.steering = Steering(self.steering.rescaler, self._options.safe_zone)  # another model, another run
            self._set_up_scales(self.steering, trainer, pl_module, others)
            return
        hook = pl_module.register_load_state_dict_pre_hook(refuse_lost_scales)  # type: ignore[no-untyped-call]
        self._hook, self._early = hook, None
        if fits and will_shard(trainer.strategy):
            self._find(pl_module)
            if self._early is None and overrides(pl_module, "configure_model"):
                self._late.append(AfterHook(pl_module, "configure_model", partial(self._find, pl_module)))

    def _find(self, pl_module: LightningModule) -> None:
        """Find the blocks while weights are in one piece, or are cut in a way that leaves them their shapes."""
        with suppress(BlocksNotFoundError, ExampleInputError):  # not built yet, or to be found in its first batch
            self._early = blocks_of(pl_module, self._options.blocks)

    def _set_up_scales(
        self, steering: Steering, trainer: Trainer, pl_module: LightningModule, others: Sequence[Callback]
    ) -> None:
        """Attach scales to a module, also to what it builds in its own hooks."""
        steering.set_up()
        if is_tensor_parallel(trainer.strategy):
            self._hook = steering.listen(pl_module)
            return
        # A model may be built in hooks that come later. What is sharded there is never attached to: see `begin`.
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
        wanted = self._options.blocks
        try:
            steering.attach(pl_module, None if wanted is None else blocks_of(pl_module, wanted), others)
        except (BlocksNotFoundError, ExampleInputError, ConfigurationError):
            if not may_fail:
                raise
        self._modules = set(map(id, pl_module.modules()))
        if self._hook is not None:
            self._hook.remove()
        self._hook = steering.listen(pl_module)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimizers train the scales.

        Raises:
            ConfigurationError: They do not, or the model was built in ``configure_model`` without scales.
        """
        steering = self.steering
        if steering is None:
            return
        if steering.scales is None:
            steering.adopt(pl_module, blocks_of(pl_module, self._options.blocks))
        if brings_back_own_weights(trainer.strategy):
            steering.check_foldable()
        steering.begin(trainer.optimizers)
        for told in (steering.held_still(), *steering.doubts):
            if told is not None:
                inform(told)

    def start(self, trainer: Trainer) -> None:
        """Leave no hook behind that was for loading; watch from the first step on whether every scale is alive."""
        self.release()
        if self.steering is not None:
            self.steering.start(trainer.optimizers)

    def explain(self, exception: BaseException, pl_module: LightningModule) -> None:
        """Add to an exception what the scales may have to do with it."""
        attached = self.steering is not None and self.steering.has_attached
        if attached and (told := explanation(exception, pl_module)):
            exception.add_note(told)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Mark a checkpoint that has residual scales."""
        if self.steering is not None:
            self.steering.mark(checkpoint)

    def load(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to lose scales (a sharded checkpoint is loaded without a word); say where there were none.

        Raises:
            ConfigurationError: The checkpoint has scales that the model does not have, or names some without values.
        """
        sites = saved_sites(checkpoint)
        message = lost_scales(pl_module, sites)
        if message is not None:
            raise ConfigurationError(message)
        restore_unsaved(pl_module, checkpoint)
        if not sites and self.steering is not None and not self.steering.rescaler.dry_run:
            inform("SpectralMonitor: the checkpoint has no residual scales; they start at 1")

    def fold(self, trainer: Trainer) -> None:
        """Fold the scales into the weights where the main process gets only weights that its module has already."""
        if self.steering is None or not brings_back_own_weights(trainer.strategy):
            return
        if count := self.steering.fold():
            inform(
                f"SpectralMonitor folded {count} residual scales into the weights, because the main process gets back "
                f"only weights that its module has. To keep them as scales, call {self.steering.call('module')} before "
                "trainer.fit(module)"
            )

    def release(self) -> None:
        """Leave no hook behind."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        while self._late:
            self._late.pop().remove()
        if self.steering is not None:
            self.steering.release()

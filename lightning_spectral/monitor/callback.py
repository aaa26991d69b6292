"""The callback: when to measure, when to steer, what to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.hooks import RemovableHandle

from lightning_spectral import _checks
from lightning_spectral.alarms import Event
from lightning_spectral.control import GainCeiling, ResidualRescaler
from lightning_spectral.control.explain import explanation
from lightning_spectral.control.law import Law
from lightning_spectral.control.steering import Steering
from lightning_spectral.errors import BlocksNotFoundError, ConfigurationError, ExampleInputError
from lightning_spectral.linalg import Solver
from lightning_spectral.monitor.framework import Callback, overrides, rank_zero_info
from lightning_spectral.monitor.late import AfterHook
from lightning_spectral.monitor.order import check_order
from lightning_spectral.monitor.remembered import new_series, remember, remembered
from lightning_spectral.monitor.search import blocks_of
from lightning_spectral.monitor.session import Session
from lightning_spectral.monitor.strategies import (
    brings_back_own_weights,
    check_strategy,
    is_tensor_parallel,
    will_shard,
)
from lightning_spectral.records import ResidualBlock
from lightning_spectral.runs.series import Series
from lightning_spectral.scales.loading import lost_scales, refuse_lost_scales, restore_unsaved, saved_sites

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SpectralMonitor"]


class SpectralMonitor(Callback):
    """Measures the spectral ratio of MLP to attention of every residual block while a model trains.

    The first measurement is taken before the first step, then one whenever ``every_n_steps`` optimizer steps have
    passed, and one at the end of fit. Training is bitwise the same with and without a monitor that only watches.

    With ``auto_rescale``, every branch gets a residual scale (:func:`attach_scales`), and after a measurement the
    scales of branches that are too strong are lowered (:class:`GainCeiling` has the law, :class:`ResidualRescaler`
    another). The model then has parameters that are saved with it; :func:`fuse_scales` folds them into the weights.

    To every logger, with the number of stepped batches as index (the optimizer step, where there is one optimizer):

    ========================================  =====  ===================================================
    key                                       unit   meaning
    ========================================  =====  ===================================================
    ``spectral/ratio_min, _median, _max``     1      the spectral ratio ρ over the blocks
    ``spectral/in_zone``                      1      fraction of the measurable blocks inside the zone
    ``spectral/worst_layer``                  index  block farthest outside the zone, or nearest its edge
    ``spectral/mlp_norm_max``                 1      largest spectral norm of an MLP branch
    ``spectral/attention_norm_max``           1      largest spectral norm of an attention branch
    ``spectral/unmeasured``                   count  branches that exist but could not be measured
    ``spectral/seconds``                      s      wall time of the measurement
    ``spectral/drifting``                     count  blocks outside that drift away from where they had settled
    ``spectral/alarm``                        1      1 while an alarm is on, else 0
    ``spectral/scale_min, _max``              1      with ``auto_rescale``: the residual scales at the measurement
    ``spectral/rescaled``                     count  with ``auto_rescale``: blocks whose scales were moved after it
    ``spectral/token_residual_min``           1      with ``geometry``: smallest token residual of a block's output
    ``spectral/effective_rank_min``           1      with ``geometry``: smallest effective rank (of σ²) of one
    ``spectral/ratio/07`` and so on           1      with ``per_layer``: all of these for every block
    ========================================  =====  ===================================================

    The same keys are in ``trainer.callback_metrics`` on all ranks, the summary keys also as ``spectral_ratio_max`` and
    so on, for ``ModelCheckpoint`` and ``EarlyStopping``. The run's log directory gets ``spectral.jsonl`` with every
    block of every measurement and every action and, with matplotlib, ``spectral.png``, which loggers that take pictures
    get as well.

    What is new is said on the console once, and written to ``spectral.jsonl``: a block that leaves the zone (info) or
    that stays outside and drifts away from where this run had settled (warning), and an alarm when a second witness
    agrees: the token residual of the last block falls toward collapse, over depth or over training. So alarms need
    ``geometry``.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        auto_rescale: Whether to steer: ``True``, or the settings of a law, :class:`GainCeiling` (``True`` is its
            defaults) or :class:`ResidualRescaler`.
        linearization: The rule that turns branches into linear operators.
        safe_zone: The interval of ratios that counts as balanced.
        blocks: The blocks to measure, or hints for finding them. By default those that the LightningModule has as
            ``spectral_blocks`` (a model that is sharded in ``configure_model`` finds them there, before), else those
            that are found in the model.
        solver: How spectral norms are computed; by default randomized, warm-started from measurement to measurement.
        geometry: Whether to measure the tokens at every block's output too, and the updates that both branches make,
            on the training batch of measured steps. By default in runs that are steered or that an alarm shall act on.
            Nothing is added to other steps, and nothing to compiled blocks.
        per_layer: Whether to log every block, besides the summary.
        on_alarm: What to do at an alarm beyond logging it: nothing, ``"stop"`` the run as early stopping does, or call
            ``on_alarm(trainer, pl_module, event)`` (:class:`~lightning_spectral.alarms.Event`), whose exceptions are
            not caught.
        on_error: What to do when a measurement fails: warn and train on, or raise. What fails in writing, logging,
            drawing or showing is always a warning.
        prefix: First part of every key and file name. Two monitors in one Trainer need two of them.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        auto_rescale: bool | GainCeiling | ResidualRescaler = False,
        *,
        linearization: Literal["circuit", "paper"] = "circuit",
        safe_zone: tuple[float, float] = (0.5, 2.0),
        blocks: Sequence[ResidualBlock] | Mapping[str, Any] | None = None,
        solver: Solver | None = None,
        geometry: bool | None = None,
        per_layer: bool = False,
        on_alarm: Literal["log", "stop"] | Callable[[Trainer, LightningModule, Event], object] = "log",
        on_error: Literal["warn", "raise"] = "warn",
        prefix: str = "spectral",
    ) -> None:
        super().__init__()
        self.every_n_steps = _checks.steps("every_n_steps", every_n_steps)
        self.auto_rescale = auto_rescale
        self.linearization = _checks.choice("linearization", linearization, ("circuit", "paper"))
        self.safe_zone = _checks.interval("safe_zone", safe_zone)
        law = _law(auto_rescale)
        self._steering = None if law is None else Steering(law, self.safe_zone)
        self.blocks = blocks
        self.solver = solver
        self.on_alarm = on_alarm if callable(on_alarm) else _checks.choice("on_alarm", on_alarm, ("log", "stop"))
        wanted = bool(auto_rescale) or on_alarm != "log"
        self.geometry = wanted if geometry is None else _checks.flag("geometry", geometry)
        if on_alarm != "log" and not self.geometry:
            raise ConfigurationError(
                f"on_alarm={on_alarm!r} with geometry=False: an alarm needs the tokens as its second witness, so none "
                "can come; leave geometry out"
            )
        self.per_layer = per_layer
        self.on_error = _checks.choice("on_error", on_error, ("warn", "raise"))
        self.prefix = _checks.name("prefix", prefix)
        self._series = Series(self.linearization)
        self._restored: Series | None = None  # from the checkpoint that a fit goes on from
        self._stage: str | None = None
        self._load_hook: RemovableHandle | None = None
        self._late: list[AfterHook] = []
        self._modules: set[int] = set()  # those that the model had when scales were attached
        self._early: tuple[ResidualBlock, ...] | None = None  # found before the model was sharded
        self._session: Session | None = None  # between on_train_start and on_fit_end

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: one per prefix and linearization, so that other settings may change."""
        return self._generate_state_key(prefix=self.prefix, linearization=self.linearization)

    # When: Lightning's hooks, in the order in which they are called.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the residual scales, in every stage, so that checkpoints fit; refuse what cannot work.

        Raises:
            ConfigurationError: Another monitor in this Trainer has the same prefix or steers as well, a callback that
                copies the model comes before this one, or weights cannot be read under the Trainer's strategy.
            ExampleInputError, BlocksNotFoundError: The blocks to steer cannot be found.
        """
        self._stage, self._early = stage, None
        if stage == "fit":  # what is saved before the first measurement is not of an earlier run
            self._series = remembered(trainer, pl_module, self.state_key) or Series(self.linearization)
        if self._steering is not None and not self._steering.is_of(pl_module):
            self._steering = Steering(self._steering.rescaler, self.safe_zone)  # another model, another run
        check_strategy(trainer.strategy)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not declared
        self._check_rivals([other for other in callbacks if isinstance(other, SpectralMonitor) and other is not self])
        shards = will_shard(trainer.strategy)
        if self._steering is None:
            hook = pl_module.register_load_state_dict_pre_hook(refuse_lost_scales)  # type: ignore[no-untyped-call]
            self._load_hook = hook
            if stage == "fit" and shards:
                self._early = _found(pl_module, self.blocks)
            return
        check_order(callbacks, self)
        self._steering.set_up()
        if is_tensor_parallel(trainer.strategy):
            self._load_hook = self._steering.listen(pl_module)
            return
        # A model may be built in hooks that come later. What is sharded there is never attached to: see on_fit_start.
        hooks = [hook for hook in ("setup", "configure_model") if overrides(pl_module, hook)]
        later = [hook for hook in hooks if hook == "setup" or not shards]
        attach = partial(self._attach, self._steering, pl_module, [item for item in callbacks if item is not self])
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
            steering.attach(pl_module, None if self.blocks is None else blocks_of(pl_module, self.blocks), others)
        except (BlocksNotFoundError, ExampleInputError, ConfigurationError):
            if not may_fail:
                raise
        self._modules = set(map(id, pl_module.modules()))
        if self._load_hook is not None:
            self._load_hook.remove()
        self._load_hook = steering.listen(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimizers train the scales.

        Raises:
            ConfigurationError: They do not, or the model was built in ``configure_model`` without scales.
        """
        if self._steering is None:
            return
        if self._steering.scales is None:
            self._steering.adopt(pl_module, blocks_of(pl_module, self.blocks))
        if brings_back_own_weights(trainer.strategy):
            self._steering.check_foldable()
        self._steering.begin(trainer.optimizers)
        for told in (self._steering.held_still(), self._steering.doubt):
            if told is not None:
                rank_zero_info(told)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks and measure them for the first time; on resume, publish what was measured last."""
        self._session = None
        self._remove_hooks()
        if self._steering is not None:
            self._steering.start(trainer.optimizers)
        if trainer.barebones:
            rank_zero_info("SpectralMonitor is off, because the Trainer is barebones")
            return
        restored, self._restored = self._restored, None
        known = restored or remembered(trainer, pl_module, self.state_key)
        goes_on = known is not None and (known.measured_step is None or known.reaches(trainer.global_step))
        self._series = known if known is not None and goes_on else new_series(trainer, self.linearization)
        remember(trainer, pl_module, self.state_key, self._series)
        blocks = self._early if self._steering is None else self._steering.blocks
        self._session = Session(self, self._series, self._steering, blocks, trainer, pl_module, goes_on=goes_on)
        self._session.begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Have measured the weights that the batch will use, and listen to its forward pass if they were."""
        if self._session is not None:
            self._session.begin_batch(batch)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """See whether the weights that the forward pass has used are those that were measured."""
        # Behind a forward pass some sharded weights are whole for a while. Before the step they are shards again.
        if self._session is not None and not will_shard(trainer.strategy):
            self._session.in_use()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check once that every scale is alive."""
        if self._steering is not None:
            self._steering.check_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Write the measurement of the weights that the optimizer is about to change, and steer."""
        if self._session is not None:
            self._session.before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is due, and bring the progress bar up to date."""
        if self._session is not None:
            self._session.end_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish what is true of the weights that are validated, unless they are averaged ones."""
        if self._session is not None:
            self._session.refresh()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish what is true of the weights, for callbacks that save or stop by it at the end of an epoch."""
        if self._session is not None:
            self._session.refresh()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights."""
        if self._session is not None:
            self._session.end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the final weights have been exchanged; draw the run and print the last measurement."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing of the monitor behind in the model; say where the scales may be the cause."""
        if self._steering is not None and self._steering.has_attached and (told := explanation(exception, pl_module)):
            exception.add_note(told)
        if self._session is not None:
            session, self._session = self._session, None
            session.abandon()
        self._restored = None
        self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook of the monitor behind; the scales stay, since the model shall go on computing what it did.

        Where the main process gets nothing but weights that its module has already, they are folded into these.
        """
        self._remove_hooks()
        if self._steering is None or stage != "fit" or not brings_back_own_weights(trainer.strategy):
            return
        if count := self._steering.fold():
            rank_zero_info(
                f"SpectralMonitor folded {count} residual scales into the weights, because the main process gets back "
                "only weights that its module has. To keep them as scales, call attach_scales(module) before "
                "trainer.fit(module)"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark a checkpoint that has residual scales."""
        if self._steering is not None:
            self._steering.mark(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to lose scales (a sharded checkpoint is loaded without a word); say where there were none.

        Scales that the checkpoint names and the user's code has left out of it get the values that they had.

        Raises:
            ConfigurationError: The checkpoint has scales that the model does not have, or names some without values.
        """
        sites = saved_sites(checkpoint)
        message = lost_scales(pl_module, sites)
        if message is not None:
            raise ConfigurationError(message)
        restore_unsaved(pl_module, checkpoint)
        if not sites and self._steering is not None and not self._steering.rescaler.dry_run:
            rank_zero_info("SpectralMonitor: the checkpoint has no residual scales; they start at 1")

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, as copies of plain values and tensors."""
        return self._series.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier state; what is unknown or missing in it does no harm."""
        self._series = Series(self.linearization)
        self._series.load_state_dict(state_dict)
        # A test loads a checkpoint too, perhaps an older one, and a fit after it does not go on from there.
        self._restored = self._series if self._stage in (None, "fit") else None

    def _check_rivals(self, rivals: Sequence[SpectralMonitor]) -> None:
        if any(other.prefix == self.prefix for other in rivals):
            raise ConfigurationError(
                f"two monitors in one Trainer would both write the keys '{self.prefix}/…'; "
                f"give one of them another prefix, such as prefix='{self.prefix}_{self.linearization}'"
            )
        if self.auto_rescale and any(other.auto_rescale for other in rivals):
            raise ConfigurationError(
                "two monitors in one Trainer would both move the scales: let one of them only watch"
            )

    def _remove_hooks(self) -> None:
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None
        while self._late:
            self._late.pop().remove()
        self._stage = None
        if self._steering is not None:
            self._steering.release()


def _found(
    pl_module: LightningModule, blocks: Sequence[ResidualBlock] | Mapping[str, Any] | None
) -> tuple[ResidualBlock, ...] | None:
    """Find the blocks of a model that ``configure_model`` may shard, and that is no longer readable then."""
    try:
        return blocks_of(pl_module, blocks)
    except (BlocksNotFoundError, ExampleInputError):  # built there: it has found its blocks itself, or will say how to
        return None


def _law(auto_rescale: bool | GainCeiling | ResidualRescaler) -> Law | None:
    if isinstance(auto_rescale, GainCeiling | ResidualRescaler):
        return auto_rescale
    if not isinstance(auto_rescale, bool):
        raise ConfigurationError(
            f"auto_rescale={auto_rescale!r}: expected True, False, a GainCeiling(...) or a ResidualRescaler(...)"
        )
    return GainCeiling() if auto_rescale else None

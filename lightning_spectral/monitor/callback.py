"""The callback: when to measure, when to steer, what to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from lightning_spectral import _checks
from lightning_spectral.alarms import Event
from lightning_spectral.control import GainCeiling, ResidualRescaler
from lightning_spectral.linalg.solvers import SolverChoice
from lightning_spectral.monitor.attaching import Attachment
from lightning_spectral.monitor.framework import Callback
from lightning_spectral.monitor.order import check_order, check_rivals
from lightning_spectral.monitor.remembered import remember, remembered
from lightning_spectral.monitor.strategies import check_strategy, will_shard
from lightning_spectral.monitor.trainer_host import LightningHost
from lightning_spectral.records import ResidualBlock
from lightning_spectral.runs.series import Series
from lightning_spectral.watch.options import OnAlarm, Options
from lightning_spectral.watch.session import Session
from lightning_spectral.watch.telling import inform

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
    ``spectral/in_zone``                      1      fraction of the measurable blocks inside the safe zone
    ``spectral/mlp_norm_max``                 1      largest spectral norm of an MLP branch
    ``spectral/attention_norm_max``           1      largest spectral norm of an attention branch
    ``spectral/scale_min, _max``              1      with ``auto_rescale``: the residual scales at the measurement
    ``spectral/rescaled``                     count  with ``auto_rescale``: blocks whose scales were moved after it
    ``spectral/token_residual_min``           1      with ``geometry``: smallest token residual of a block's output
    ``spectral/effective_rank_min``           1      with ``geometry``: smallest effective rank (of σ²) of one
    ``spectral/sample_residual_min``          1      with ``geometry``: smallest sample residual of one
    ``spectral/attention_logit_max``          1      with ``geometry``: largest attention logit of a few samples
    ``spectral/output_residual``              1      with ``geometry``: sample residual of the model's output
    ``spectral/pooled_residual``              1      with ``geometry``: sample residual of what the output is made of
    ``spectral_health/alarm``                 1      1 while a failure is on, else 0
    ``spectral_health/drifting``              count  blocks outside that drift away from where they had settled
    ``spectral_health/unmeasured``            count  branches that exist but could not be measured
    ``spectral_health/seconds``               s      wall time of the measurement
    ``spectral_blocks/ratio/07`` and so on    1      with ``per_layer``: the numbers of every block
    ========================================  =====  ===================================================

    Loggers fold keys by what stands in front of the first ``/``. The same keys are in ``trainer.callback_metrics`` on
    all ranks. What a callback or a scheduler names with ``_`` for ``/``, as in
    ``ModelCheckpoint(monitor="spectral_ratio_max")``, is there by that name too. The run's log directory gets
    ``spectral.jsonl`` with every block of every measurement and every action and, with matplotlib, ``spectral.png``,
    drawn anew every few minutes, which loggers that take pictures get as well.

    What is new is said once and written to ``spectral.jsonl`` (:class:`~lightning_spectral.records.Event`): failures
    (something is not finite, all tokens or all samples are one, nothing moves), warnings (signals that came before
    failures in this project's benchmark) and notes (a block that leaves the safe zone), which the console has with
    ``verbose`` only. The console also has one line at the start, and at the end, however the run ends, the table of the
    last measurement and where the files are.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        auto_rescale: Whether to steer: ``True``, or the settings of a law, :class:`GainCeiling` (``True`` is its
            defaults) or :class:`ResidualRescaler`.
        linearization: The rule that turns branches into linear operators.
        safe_zone: The interval of ratios that counts as balanced.
        blocks: The blocks to measure, or hints for finding them. By default those that the LightningModule has as
            ``spectral_blocks``, else those that are found in the model.
        solver: How spectral norms are computed; by default randomized, warm-started from measurement to measurement.
        geometry: Whether to look at the batch of measured steps too: at tokens and samples behind every block, at the
            updates of both branches, at attention logits and at the output. A few samples run in evaluation mode in
            front of the real pass. Nothing is added to other steps. A tuple chooses among ``"tokens"`` (of
            blocks and output, with the samples), ``"updates"`` and ``"logits"``.
        signals: What else to ask of the weights: ``"change"`` since the last measurement, ``"stable_rank"``,
            ``"alignment"`` of neighbouring blocks, ``"logit_bound"`` of the attention
            (:class:`~lightning_spectral.records.WeightSignals`). ``"change"`` costs no product; ``"stable_rank"`` one
            by 64 vectors; ``"logit_bound"`` the products W_q W_qᵀ and W_k W_kᵀ of every head; ``"alignment"`` one by a
            vector, and in several processes up to half of the measurement more, because each of them then measures a
            branch of the next block too.
        per_layer: Whether to log every block, besides the summary.
        on_alarm: What to do at a failure beyond telling it: nothing, ``"checkpoint"``, which saves the run in a folder
            of its own, ``"stop"``, which ends the run as early stopping does, or call
            ``on_alarm(trainer, pl_module, event)`` (:class:`~lightning_spectral.records.Event`), whose exceptions are
            not caught.
        on_error: What to do when a measurement fails: warn and train on, or raise. What fails in writing, logging,
            drawing or showing is always a warning.
        prefix: First part of every key and file name. Two monitors in one Trainer need two of them.
        verbose: Whether the console is told of every ratio that crosses an edge of the safe zone or drifts.
            ``spectral.jsonl`` has these notes in any case.
        progress_bar: Whether the Trainer's progress bar shows ρ, the median of the ratios.

    Raises:
        ConfigurationError: An argument cannot be used.

    Example:
        >>> SpectralMonitor(every_n_steps=10, auto_rescale=True)
        SpectralMonitor(every_n_steps=10, auto_rescale=True)
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        auto_rescale: bool | GainCeiling | ResidualRescaler = False,
        *,
        linearization: Literal["circuit", "paper"] = "circuit",
        safe_zone: tuple[float, float] = (0.5, 2.0),
        blocks: Sequence[ResidualBlock] | Mapping[str, Any] | None = None,
        solver: SolverChoice = None,
        geometry: bool | Sequence[str] = True,  # no Collection: jsonargparse knows it only from 4.53 on
        signals: Sequence[str] = (),
        per_layer: bool = False,
        on_alarm: OnAlarm | Callable[[Trainer, LightningModule, Event], object] = "log",
        on_error: Literal["warn", "raise"] = "warn",
        prefix: str = "spectral",
        verbose: bool = False,
        progress_bar: bool = True,
    ) -> None:
        super().__init__()
        self.options = Options(
            every_n_steps=every_n_steps,
            auto_rescale=auto_rescale,
            linearization=linearization,
            safe_zone=safe_zone,
            blocks=blocks,
            solver=solver,
            geometry=geometry,
            signals=signals,
            per_layer=per_layer,
            on_alarm=on_alarm,
            on_error=on_error,
            prefix=prefix,
            verbose=verbose,
        )
        self.progress_bar = _checks.flag("progress_bar", progress_bar)
        self._attachment = Attachment(self.options)
        self._series = Series(self.options.linearization)
        self._restored: Series | None = None  # from the checkpoint that a fit goes on from
        self._stage: str | None = None
        self._session: Session | None = None  # between on_train_start and on_fit_end

    def __repr__(self) -> str:
        """Return the call that makes such a monitor."""
        bar = "" if self.progress_bar else ", progress_bar=False"
        return f"{type(self).__name__}({self.options.changed()}{bar})"

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: one per prefix and linearization, so that other settings may change."""
        return self._generate_state_key(prefix=self.options.prefix, linearization=self.options.linearization)

    # When: Lightning's hooks, in the order in which they are called.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the residual scales, in every stage, so that checkpoints fit; refuse what cannot work.

        Raises:
            ConfigurationError: Another monitor in this Trainer has the same prefix or steers as well, a callback that
                copies the model comes before this one, or weights cannot be read under the Trainer's strategy.
            ExampleInputError, BlocksNotFoundError: The blocks to steer cannot be found.
        """
        self._stage = stage
        if stage == "fit":  # what is saved before the first measurement is not of an earlier run
            self._series = remembered(trainer, pl_module, self.state_key) or Series(self.options.linearization)
        check_strategy(trainer.strategy)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not declared
        others = [item for item in callbacks if item is not self]
        check_rivals(self.options, [item.options for item in others if isinstance(item, SpectralMonitor)])
        if self.options.auto_rescale:
            check_order(callbacks, self)
        self._attachment.set_up(trainer, pl_module, others, fits=stage == "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimizers train the scales.

        Raises:
            ConfigurationError: They do not, or the model was built in ``configure_model`` without scales.
        """
        self._attachment.begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks and measure them for the first time; on resume, publish what was measured last."""
        self._session, self._stage = None, None
        self._attachment.start(trainer)
        if trainer.barebones:
            inform("SpectralMonitor is off, because the Trainer is barebones")
            return
        restored, self._restored = self._restored, None
        known = restored or remembered(trainer, pl_module, self.state_key)
        goes_on = known is not None and (known.measured_step is None or known.reaches(trainer.global_step))
        self._series = known if known is not None and goes_on else Series.begin(self.options.linearization)
        remember(trainer, pl_module, self.state_key, self._series)
        host = LightningHost(trainer, pl_module, self._series, self.options, progress_bar=self.progress_bar)
        held = self._attachment.steering, self._attachment.blocks
        self._session = Session(self.options, self._series, *held, host, self.should_measure, goes_on=goes_on)
        self._session.begin()

    def should_measure(self, step: int) -> bool:
        """Whether to measure at an optimizer step; a subclass may decide otherwise, but alike in all processes."""
        return self._series.due(step, self.options.every_n_steps)

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
        if self._attachment.steering is not None:
            self._attachment.steering.check_gradients()

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
        """See whether the final weights have been exchanged; print the last measurement and draw the run."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print and draw the run so far, also at Ctrl-C and SIGTERM; say where the scales may be the cause.

        Nothing of the monitor is left behind in the model.
        """
        self._attachment.explain(exception, pl_module)
        if self._session is not None:
            session, self._session = self._session, None
            session.abandon()
        self._restored = self._stage = None
        self._attachment.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook of the monitor behind; the scales stay, since the model shall go on computing what it did.

        Where the main process gets nothing but weights that its module has already, they are folded into these.
        """
        self._stage = None
        self._attachment.release()
        if stage == "fit":
            self._attachment.fold(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark a checkpoint that has residual scales."""
        self._attachment.save(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to lose scales (a sharded checkpoint is loaded without a word); say where there were none.

        Scales that the checkpoint names and the user's code has left out of it get the values that they had.

        Raises:
            ConfigurationError: The checkpoint has scales that the model does not have, or names some without values.
        """
        self._attachment.load(pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, as copies of plain values and tensors."""
        return self._series.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier state; what is unknown or missing in it does no harm."""
        self._series = Series(self.options.linearization)
        self._series.load_state_dict(state_dict)
        # A test loads a checkpoint too, perhaps an older one, and a fit after it does not go on from there.
        self._restored = self._series if self._stage in (None, "fit") else None


for _name in Options.__slots__:  # every setting is an attribute of the monitor, which nobody can set
    setattr(SpectralMonitor, _name, property(attrgetter(f"options.{_name}")))

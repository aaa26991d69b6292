"""The callback: when to measure, when to steer, what to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral import settings
from lightning_spectral.alarms import Event, falling_tokens
from lightning_spectral.control.actions import news
from lightning_spectral.control.fuse import MARKER, lost_scales, refuse_lost_scales, scale_keys
from lightning_spectral.control.law import Action, ResidualRescaler
from lightning_spectral.control.steering import Steering
from lightning_spectral.discovery import find_blocks
from lightning_spectral.discovery.paths import is_compiled
from lightning_spectral.errors import BlocksNotFoundError, ConfigurationError, ExampleInputError, SpectralError
from lightning_spectral.first_forward import FirstForward
from lightning_spectral.journal import described
from lightning_spectral.linalg import Solver
from lightning_spectral.measure import Meter
from lightning_spectral.monitor.batch import BatchWatch
from lightning_spectral.monitor.framework import Callback, overrides, rank_zero_info, rank_zero_warn
from lightning_spectral.monitor.order import check_order
from lightning_spectral.monitor.outlets import Outlets
from lightning_spectral.records import Measurement, ResidualBlock
from lightning_spectral.report import one_screen
from lightning_spectral.series import Series, logged_values

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SpectralMonitor"]

PATIENCE = 3  # failures in a row after which the monitor switches itself off


class SpectralMonitor(Callback):
    """Measures the spectral ratio of MLP to attention of every residual block while a model trains.

    The first measurement is taken before the first step, then one whenever ``every_n_steps`` optimizer steps have
    passed, and one at the end of fit. Training is bitwise the same with and without a monitor that only watches.

    With ``auto_rescale``, every branch gets a learnable residual scale (:func:`attach_scales`), and after a measurement
    the scales of blocks whose ratio has left the safe zone are moved (:class:`ResidualRescaler` has the law). The model
    then has parameters that are saved with it; :func:`fuse_scales` folds them into the weights.

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
        auto_rescale: Whether to steer the ratios: ``True``, or a :class:`ResidualRescaler` with settings.
        linearization: The rule that turns branches into linear operators.
        safe_zone: The interval of ratios that counts as balanced.
        blocks: The blocks to measure, or hints for finding them; by default they are found in the model.
        solver: How spectral norms are computed; by default randomized, warm-started from measurement to measurement.
        geometry: Whether to measure the tokens at every block's output too, and the updates that both branches make,
            on the training batch of measured steps. By default in runs that are steered or that an alarm shall act on.
            Nothing is added to other steps, and nothing to compiled blocks.
        per_layer: Whether to log every block, besides the summary.
        on_alarm: What to do at an alarm beyond logging it: nothing, ``"stop"`` the run as early stopping does, or call
            ``on_alarm(trainer, pl_module, event)`` (:class:`~lightning_spectral.alarms.Event`), whose exceptions are
            not caught.
        on_error: What to do when a measurement fails: warn and train on, or raise.
        prefix: First part of every key and file name. Two monitors in one Trainer need two of them.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        auto_rescale: bool | ResidualRescaler = False,
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
        self.every_n_steps = settings.steps("every_n_steps", every_n_steps)
        self.auto_rescale = auto_rescale
        self.linearization = settings.choice("linearization", linearization, ("circuit", "paper"))
        self.safe_zone = settings.interval("safe_zone", safe_zone)
        rescaler = _rescaler(auto_rescale)
        self._steering = None if rescaler is None else Steering(rescaler, self.safe_zone)
        self.blocks = blocks
        self.solver = solver
        self.on_alarm = on_alarm if callable(on_alarm) else settings.choice("on_alarm", on_alarm, ("log", "stop"))
        wanted = bool(auto_rescale) or on_alarm != "log"
        self.geometry = wanted if geometry is None else settings.flag("geometry", geometry)
        if on_alarm != "log" and not self.geometry:
            raise ConfigurationError(
                f"on_alarm={on_alarm!r} with geometry=False: an alarm needs the tokens as its second witness, so none "
                "can come; leave geometry out"
            )
        self.per_layer = per_layer
        self.on_error = settings.choice("on_error", on_error, ("warn", "raise"))
        self.prefix = settings.name("prefix", prefix)
        self._series = Series(self.linearization)
        self._load_hook: RemovableHandle | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop whatever belongs to one call of fit."""
        self._active = False  # between on_train_start and on_train_end
        self._rehearses = False  # fast_dev_run: measure once, write no files
        self._meter: Meter | None = None
        self._outlets = Outlets(self.prefix)
        self._resume_step: int | None = None
        self._awaits_forward = False  # no input could be guessed: the first real forward pass will show one
        self._first_forward: FirstForward | None = None
        self._latest: Measurement | None = None
        self._batch_watch: BatchWatch | None = None
        self._alarms: list[Event] = []  # not acted on yet
        self._failures = 0  # in a row

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: one per prefix and linearization, so that other settings may change."""
        return self._generate_state_key(prefix=self.prefix, linearization=self.linearization)

    # When: Lightning's hooks, in the order in which they are called.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the residual scales, in every stage, so that checkpoints fit; refuse what cannot work.

        Raises:
            ConfigurationError: Another monitor in this Trainer has the same prefix or steers as well, or a callback
                that copies the model comes before this one.
            ExampleInputError, BlocksNotFoundError: The blocks to steer cannot be found.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not declared
        self._check_rivals([other for other in callbacks if isinstance(other, SpectralMonitor) and other is not self])
        if self._steering is None:
            hook = pl_module.register_load_state_dict_pre_hook(refuse_lost_scales)  # type: ignore[no-untyped-call]
            self._load_hook = hook
            return
        check_order(callbacks, self)
        if trainer.world_size > 1:  # one decision for all processes is not made yet
            raise ConfigurationError(
                f"auto_rescale with {trainer.world_size} processes: each would decide for itself, and the scales could "
                "drift apart. Train on one device, or only watch, in this version"
            )
        try:
            self._steering.attach(pl_module, None if self.blocks is None else self._blocks_of(pl_module))
        except (BlocksNotFoundError, ExampleInputError):
            if not overrides(pl_module, "configure_model"):
                raise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimizers train the scales.

        Raises:
            ConfigurationError: They do not, or the model was built in ``configure_model`` without scales.
        """
        if self._steering is None:
            return
        if self._steering.scales is None:
            self._steering.adopt(pl_module, self._blocks_of(pl_module))
        self._steering.begin(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks and measure them for the first time; on resume, publish what was measured last."""
        self._forget()
        self._remove_hooks()
        if trainer.barebones:
            rank_zero_info("SpectralMonitor is off, because the Trainer is barebones")
            return
        self._active = True
        self._rehearses = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # public, but not declared
        step = trainer.global_step
        if self._series.reaches(step):
            self._resume_step = step
            self._outlets.publish(trainer, pl_module, self._series.values)
        else:  # a new run, even if this object has watched another one before
            batches = step // max(len(trainer.optimizers), 1)
            self._series = Series(self.linearization, seen_step=step, batches=batches)
        self._guard("finding the blocks", self._find, trainer, pl_module)
        self._measure_if_due(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the forward pass, if it is the first one or one whose tokens are to be measured."""
        if self._awaits_forward:
            self._awaits_forward, self._first_forward = False, FirstForward(pl_module, batch)
        if self._batch_watch is not None:
            step = trainer.global_step + len(trainer.optimizers)  # after this batch, if it steps
            if self._series.due(step, self.every_n_steps):
                self._batch_watch.start()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check once that every scale is alive."""
        if self._steering is not None:
            self._steering.check_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is due, steer, and bring the progress bar up to date."""
        if not self._active:
            return
        self._series.end_batch(trainer.global_step)
        if self._batch_watch is not None:
            self._batch_watch.stop()
        if self._first_forward is not None:
            self._guard("finding the blocks", self._find_late, trainer, self._first_forward)
            self._first_forward = None
        self._measure_if_due(trainer, pl_module, steer=True)
        self._answer(trainer, pl_module)
        self._outlets.show(pl_module, self._series.values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, draw the run and print the last measurement."""
        if not self._active:
            return
        if not self._rehearses and self._series.measured_step != trainer.global_step:
            self._guard("measuring", self._measure, trainer, pl_module)
        self._guard("drawing", self._outlets.draw, trainer, self._series.batches)
        if self._latest is not None:
            rank_zero_info(one_screen(self._latest))
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook of the monitor behind in the model."""
        self._release()
        self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook of the monitor behind; the scales stay, since the model shall go on computing what it did."""
        self._remove_hooks()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark a checkpoint that has residual scales."""
        if self._steering is not None:
            self._steering.mark(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to lose scales (a sharded checkpoint is loaded without a word); say where there were none.

        Raises:
            ConfigurationError: The checkpoint has scales and the model has none.
        """
        message = lost_scales(pl_module, checkpoint.get(MARKER, {}).get("scales", []))
        if message is not None:
            raise ConfigurationError(message)
        if self._steering is not None and MARKER not in checkpoint and not scale_keys(checkpoint.get("state_dict", {})):
            rank_zero_info("SpectralMonitor: the checkpoint has no residual scales; they start at 1")

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, as copies of plain values and tensors."""
        self._keep_warm_start()
        return self._series.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier state; what is unknown or missing in it does no harm."""
        self._series = Series(self.linearization)
        self._series.load_state_dict(state_dict)

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

    # What: each of these may fail without harm to the training run.

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steering is not None and self._steering.scales is not None:
            self._watch(trainer, pl_module, self._steering.scales.blocks)
            return
        try:
            self._watch(trainer, pl_module, self._blocks_of(pl_module))
        except ExampleInputError:
            self._awaits_forward = True

    def _find_late(self, trainer: Trainer, first_forward: FirstForward) -> None:
        first_forward.stop()
        call = first_forward.call()
        try:
            short = call.shortened()
            blocks = self._blocks_of(call.module, *short.args, **short.kwargs)
        except ExampleInputError:  # a model that wants its batch whole
            blocks = self._blocks_of(call.module, *call.args, **call.kwargs)
        self._watch(trainer, call.module, blocks, *call.args, **call.kwargs)

    def _blocks_of(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[ResidualBlock, ...]:
        if self.blocks is None or isinstance(self.blocks, Mapping):
            return find_blocks(model, *args, hints=self.blocks, **kwargs)
        return tuple(self.blocks)

    def _watch(
        self, trainer: Trainer, model: nn.Module, blocks: tuple[ResidualBlock, ...], *args: Any, **kwargs: Any
    ) -> None:
        zone, rule = self.safe_zone, self.linearization
        self._meter = Meter(model, blocks, linearization=rule, solver=self.solver, safe_zone=zone)
        if self.geometry:
            self._listen(model, blocks, args, kwargs)
        if self._series.warm_start:
            self._meter.load_state_dict(self._series.warm_start)
        if not self._rehearses:
            header = {"linearization": rule, "safe_zone": zone, "every_n_steps": self.every_n_steps}
            header["rescaler"] = None if self._steering is None else asdict(self._steering.rescaler)
            header["blocks"] = [described(block) for block in blocks]
            self._outlets.open(trainer, header, self._resume_step)

    def _listen(
        self, model: nn.Module, blocks: Sequence[ResidualBlock], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        compiled = [block.name for block in blocks if is_compiled(model, block.name)]
        if compiled:
            rank_zero_info(f"SpectralMonitor: no token geometry, because {compiled[0] or 'the model'} is compiled")
        else:
            self._batch_watch = BatchWatch(model, blocks, args, kwargs)

    def _measure_if_due(self, trainer: Trainer, pl_module: LightningModule, *, steer: bool = False) -> None:
        step = trainer.global_step
        if self._meter is None or (self._rehearses and self._latest is not None):
            return
        if self._series.due(step, self.every_n_steps):
            self._series.scheduled_step = step
            self._guard("measuring", self._measure, trainer, pl_module, steer)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, steer: bool = False) -> None:
        if self._meter is None:
            return
        measurement = self._meter.measure(trainer.global_step)
        if self._batch_watch is not None:
            measurement = self._batch_watch.add_to(measurement)
        events = self._series.observe(measurement)
        memory, rescaled = self._series.memory, None
        actions: tuple[Action, ...] = ()
        if self._steering is not None:
            if steer:
                law, falling = self._series.law, falling_tokens(memory)
                actions, self._series.law = self._steering.act(measurement, law, trainer.optimizers, falling)
            rescaled = sum(action.moves for action in actions)
        self._latest = measurement
        self._alarms += [event for event in events if event.level == "alarm"]
        self._series.values = logged_values(
            measurement, memory, self.prefix, per_layer=self.per_layer, rescaled=rescaled
        )
        self._outlets.write(trainer, pl_module, self._series, measurement, events, actions)
        if self._steering is not None and (told := news(actions, measurement, self._steering.rescaler)):
            rank_zero_info(told)

    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do at an alarm what the user asked for; what the user's own function raises is not telemetry that failed."""
        alarms, self._alarms = self._alarms, []
        for event in alarms:
            if callable(self.on_alarm):
                self.on_alarm(trainer, pl_module, event)
            elif self.on_alarm == "stop":
                trainer.should_stop = True

    def _guard(self, what: str, action: Callable[..., None], *args: Any) -> None:
        """Run one piece of telemetry; a failure stops training only if asked to, or if the user can mend it."""
        if self._failures >= PATIENCE:
            return
        try:
            action(*args)
        except SpectralError:
            raise
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._failures += 1
            end = "it is switched off now" if self._failures == PATIENCE else "training goes on"
            rank_zero_warn(f"SpectralMonitor failed in {what} ({type(error).__name__}: {error}); {end}")
        else:
            self._failures = 0

    def _keep_warm_start(self) -> None:
        if self._meter is not None:
            self._series.warm_start = self._meter.state_dict()

    def _remove_hooks(self) -> None:
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None
        if self._steering is not None:
            self._steering.release()

    def _release(self) -> None:
        """Let go of the model, keep the state."""
        self._keep_warm_start()
        if self._first_forward is not None:
            self._first_forward.stop()
        if self._batch_watch is not None:
            self._batch_watch.stop()
        self._forget()


def _rescaler(auto_rescale: bool | ResidualRescaler) -> ResidualRescaler | None:
    if isinstance(auto_rescale, ResidualRescaler):
        return auto_rescale
    if not isinstance(auto_rescale, bool):
        raise ConfigurationError(f"auto_rescale={auto_rescale!r}: expected True, False or a ResidualRescaler(...)")
    return ResidualRescaler() if auto_rescale else None

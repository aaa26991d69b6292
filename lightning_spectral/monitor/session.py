"""One call of fit: find the blocks, measure when it is due, act on it. What fails here does no harm to the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_spectral.alarms import Event, falling_tokens
from lightning_spectral.control.actions import news
from lightning_spectral.control.law import Action
from lightning_spectral.control.steering import Steering
from lightning_spectral.discovery import find_blocks
from lightning_spectral.discovery.paths import is_compiled
from lightning_spectral.discovery.plain import to_plain
from lightning_spectral.errors import ExampleInputError, SpectralError
from lightning_spectral.first_forward import FirstForward
from lightning_spectral.journal import described
from lightning_spectral.measure import Meter
from lightning_spectral.monitor.batch import BatchWatch
from lightning_spectral.monitor.framework import rank_zero_info, rank_zero_warn, warn
from lightning_spectral.monitor.outlets import Outlets
from lightning_spectral.monitor.peers import Peers
from lightning_spectral.monitor.strategies import outermost
from lightning_spectral.records import Measurement, ResidualBlock
from lightning_spectral.series import Series, logged_values

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_spectral.monitor.callback import SpectralMonitor

__all__ = ["Session", "blocks_of"]

PATIENCE = 3  # failures in a row after which the monitor switches itself off


class Session:
    """What a monitor knows and does between the start and the end of one call of fit.

    Args:
        monitor: Its settings.
        series: The series of measurements that the session goes on with.
        steering: What moves the residual scales, ``None`` in a run that is only watched.
        blocks: The blocks, ``None`` where they are to be found.
        trainer: The trainer.
        pl_module: The module that it trains.
        resume_step: Optimizer step from which a run goes on, ``None`` for a new run.
    """

    def __init__(
        self,
        monitor: SpectralMonitor,
        series: Series,
        steering: Steering | None,
        blocks: tuple[ResidualBlock, ...] | None,
        trainer: Trainer,
        pl_module: LightningModule,
        resume_step: int | None,
    ) -> None:
        self._monitor, self.series, self._steering, self._blocks = monitor, series, steering, blocks
        self._trainer, self._module, self._resume_step = trainer, pl_module, resume_step
        self._rehearses = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # public, but not declared
        self.peers, self.outlets = Peers(trainer, pl_module), Outlets(monitor.prefix)
        self.meter: Meter | None = None
        self._batch_watch: BatchWatch | None = None
        self._awaits_forward = False  # no input could be guessed: the first real forward pass will show one
        self._first_forward: FirstForward | None = None
        self._share: Measurement | None = None  # of this process
        self._latest: Measurement | None = None  # of all processes
        self._alarms: list[Event] = []  # not acted on yet
        self._failures = 0  # in a row
        self._step = trainer.global_step  # before the batch
        self._stride = len(trainer.optimizers)  # the most steps that one batch has made

    # When.

    def begin(self) -> None:
        """Find the blocks and measure for the first time; on resume, publish what was measured last."""
        if self._resume_step is not None:
            self.outlets.publish(self._trainer, self._module, self.series.values)
        self._search(self._find)
        self._measure_if_due()

    def begin_batch(self, batch: Any) -> None:
        """Listen to the forward passes of a batch, if they are the first or their tokens are to be measured."""
        self._step = self._trainer.global_step
        if self._awaits_forward:
            self._awaits_forward, self._first_forward = False, FirstForward(self._module, batch)
        # After this batch, if it steps. To listen in vain costs a few hooks.
        if self._batch_watch is not None and self.series.due(self._step + self._stride, self._monitor.every_n_steps):
            self._batch_watch.start()

    def end_batch(self) -> None:
        """Measure if it is due, and act on it."""
        step = self._trainer.global_step
        self.series.end_batch(step)
        self._stride = max(self._stride, step - self._step)
        if self._batch_watch is not None:
            self._batch_watch.stop()
        if self._first_forward is not None:
            self._search(self._find_late, self._first_forward)
            self._first_forward = None
        self._measure_if_due(steer=True)
        self._answer()
        self.outlets.show(self._module, self.series.values)

    def end(self) -> None:
        """Measure the final weights, draw the run and print the last measurement."""
        if not self._rehearses and self.series.measured_step != self._trainer.global_step:
            self._measure()
        self.outlets.draw(self._trainer, self.series.batches)
        if self._latest is not None:
            self.outlets.print(self._latest)

    def release(self) -> None:
        """Leave no hook in the model, and the warm start in the series."""
        self.outlets.close()
        self.keep_warm_start()
        for listener in (self._first_forward, self._batch_watch):
            if listener is not None:
                listener.stop()

    def keep_warm_start(self) -> None:
        """Let the series know where the next measurement would start from."""
        if self.meter is not None:
            self.series.warm_start = self.meter.state_dict()

    # Finding the blocks.

    def _search(self, action: Callable[..., None], *args: Any) -> None:
        if not self._guard("finding the blocks", action, *args):
            self.meter = None  # in all processes, if one of them has found none

    def _find(self) -> None:
        if self._blocks is not None:
            self._watch(self._module, self._blocks)
            return
        try:
            self._watch(self._module, blocks_of(self._module, self._monitor.blocks))
        except ExampleInputError:
            self._awaits_forward = True

    def _find_late(self, first_forward: FirstForward) -> None:
        first_forward.stop()
        call = first_forward.call()
        short, wanted = call.shortened(), self._monitor.blocks
        try:
            blocks = blocks_of(call.module, wanted, *short.args, **short.kwargs)
        except ExampleInputError:  # a model that wants its batch whole
            blocks = blocks_of(call.module, wanted, *call.args, **call.kwargs)
        self._watch(call.module, blocks, *call.args, **call.kwargs)

    def _watch(self, model: nn.Module, blocks: tuple[ResidualBlock, ...], *args: Any, **kwargs: Any) -> None:
        monitor, zone = self._monitor, self._monitor.safe_zone
        rule = monitor.linearization
        read = outermost(self._trainer.strategy, model)
        self.meter = Meter(read, blocks, linearization=rule, solver=monitor.solver, safe_zone=zone)
        self.series.blocks = to_plain(blocks)
        if monitor.geometry:
            self._batch_watch = _listening(model, blocks, args, kwargs)
        if self.series.warm_start:
            self.meter.load_state_dict(self.series.warm_start)
        if not self._rehearses:
            header = {"linearization": rule, "safe_zone": zone, "every_n_steps": monitor.every_n_steps}
            header["rescaler"] = None if self._steering is None else asdict(self._steering.rescaler)
            header["blocks"] = [described(block) for block in blocks]
            self.outlets.open(self._trainer, header, self._resume_step)

    # Measuring.

    def _measure_if_due(self, *, steer: bool = False) -> None:
        step = self._trainer.global_step
        if self.meter is None or (self._rehearses and self._latest is not None):
            return
        if self.series.due(step, self._monitor.every_n_steps):
            self.series.scheduled_step = step
            self._measure(steer=steer)

    def _measure(self, *, steer: bool = False) -> None:
        """Measure, together with the other processes, and act on it; called at the same steps in all of them."""
        if self.meter is None or not self._guard("measuring", self._take_part, self.meter):
            return
        assert self._share is not None
        measurement, alike = self.peers.combined(self._share)
        if not alike and self._steering is not None and not self._steering.disarmed:
            self._steering.disarmed = True
            rank_zero_warn(
                f"SpectralMonitor found residual scales that differ between processes at step {measurement.step}: "
                "something else has changed them in one process. It steers no more in this run"
            )
        if self._guard("writing", self._note, measurement, steer):
            self._failures = 0

    def _take_part(self, meter: Meter) -> None:
        """Measure the share of this process."""
        measurement = meter.measure(self._trainer.global_step, (self.peers.rank, self.peers.count))
        self._share = measurement if self._batch_watch is None else self._batch_watch.add_to(measurement)

    def _note(self, measurement: Measurement, steer: bool) -> None:
        """Draw the consequences of a measurement that all processes have."""
        events = self.series.observe(measurement)
        memory, rescaled = self.series.memory, None
        actions: tuple[Action, ...] = ()
        if self._steering is not None:
            if steer:
                law, optimizers = self.series.law, self._trainer.optimizers
                for notice in self._steering.notices(optimizers):
                    rank_zero_warn(f"SpectralMonitor, step {measurement.step}: {notice}")
                actions, self.series.law = self._steering.act(measurement, law, optimizers, falling_tokens(memory))
            rescaled = sum(action.moves for action in actions)
        self._latest = measurement
        self._alarms += [event for event in events if event.level == "alarm"]
        self.series.values = logged_values(
            measurement, memory, self._monitor.prefix, per_layer=self._monitor.per_layer, rescaled=rescaled
        )
        self.outlets.write(self._trainer, self._module, self.series, measurement, events, actions)
        if self._steering is not None and (told := news(actions, measurement, self._steering.rescaler)):
            rank_zero_info(told)

    def _answer(self) -> None:
        """Do at an alarm what the user asked for; what the user's own function raises is no telemetry that failed."""
        alarms, self._alarms = self._alarms, []
        for event in alarms:
            if callable(self._monitor.on_alarm):
                self._monitor.on_alarm(self._trainer, self._module, event)
            elif self._monitor.on_alarm == "stop":
                self._trainer.should_stop = True

    def _guard(self, what: str, action: Callable[..., None], *args: Any) -> bool:
        """Run one piece of telemetry and return whether it went well, in all processes.

        A failure stops training only if asked to, or if the user can mend it, before anything was measured. All
        processes count the failures of each, so that all of them skip, raise and give up alike.
        """
        if self._failures >= PATIENCE:
            return False
        error = _error_of(action, *args)
        if self.peers.agree(error is None):
            return True
        mendable = isinstance(error, SpectralError) and self._latest is None
        if not self.peers.agree(error is None or not (mendable or self._monitor.on_error == "raise")):
            raise error or SpectralError(f"SpectralMonitor failed in {what} in another process, whose error says why")
        failure = None if error is None else f"{type(error).__name__}: {error}"
        self._failures += 1
        end = "it is switched off now" if self._failures == PATIENCE else "training goes on"
        told = f"SpectralMonitor failed in {what} ({failure or 'in another process'}); {end}"
        if failure is None or self.peers.rank == 0:
            rank_zero_warn(told)
        else:  # the process that knows why
            warn(told)
        return False


def _error_of(action: Callable[..., None], *args: Any) -> Exception | None:
    try:
        action(*args)
    except Exception as error:
        return error
    return None


def blocks_of(
    model: nn.Module, blocks: Sequence[ResidualBlock] | Mapping[str, Any] | None, *args: Any, **kwargs: Any
) -> tuple[ResidualBlock, ...]:
    """Return the blocks that a user has named, by hints or in the module's ``spectral_blocks``; else find them.

    Raises:
        ExampleInputError, BlocksNotFoundError, ConfigurationError: As :func:`find_blocks` does.
    """
    own: Sequence[ResidualBlock] | None = getattr(model, "spectral_blocks", None)
    if blocks is None and own is not None:
        return tuple(own)
    if blocks is None or isinstance(blocks, Mapping):
        return find_blocks(model, *args, hints=blocks, **kwargs)
    return tuple(blocks)


def _listening(
    model: nn.Module, blocks: Sequence[ResidualBlock], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> BatchWatch | None:
    compiled = [block.name for block in blocks if is_compiled(model, block.name)]
    if compiled:
        rank_zero_info(f"SpectralMonitor: no token geometry, because {compiled[0] or 'the model'} is compiled")
        return None
    return BatchWatch(model, blocks, args, kwargs)

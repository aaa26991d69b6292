"""The core of a watched run: find the blocks, measure when it is due, act on it. What fails does no harm to the run.

The weights of step k are measured when step k is done, and looked at again when they are next about to be used: the
user's code and other callbacks may have changed them meanwhile. Nothing follows from a measurement before the
forward pass that uses these weights has run: its tokens belong to them too. Then, before the optimizer steps, the
measurement is written, and the law acts. So a checkpoint between two batches is one of a run that has not measured yet,
wherever the callback stands that saves it, and a run that goes on from there measures and acts first thing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_spectral.alarms import Event, Memory, falling_tokens, observe
from lightning_spectral.control.actions import news
from lightning_spectral.control.law import Action
from lightning_spectral.control.steering import Steering
from lightning_spectral.errors import SpectralError
from lightning_spectral.measuring.freshness import sign_of_training
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.records import Measurement, ResidualBlock
from lightning_spectral.records.plain import to_plain
from lightning_spectral.runs.journal import described, described_model
from lightning_spectral.runs.series import Series, logged_values
from lightning_spectral.watch.batch import BatchWatch
from lightning_spectral.watch.fingerprint import fingerprint, same_weights
from lightning_spectral.watch.first_forward import FirstForward
from lightning_spectral.watch.host import Host
from lightning_spectral.watch.moved import copied_blocks, told_of_copies, trained_names, with_moved
from lightning_spectral.watch.opening import doubts, found, is_lazy, nothing_to_compare
from lightning_spectral.watch.options import Options
from lightning_spectral.watch.outermost import Call
from lightning_spectral.watch.outlets import Outlets
from lightning_spectral.watch.peers import Peers
from lightning_spectral.watch.rebuilt import told_of_rebuilt, weighted_modules
from lightning_spectral.watch.search import guessed_blocks, shown_blocks
from lightning_spectral.watch.telling import inform, warn, warn_here
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.names import parameters_of

__all__ = ["Session"]

PATIENCE = 3  # failures in a row after which the monitor switches itself off


@dataclass(frozen=True, slots=True)
class _Look:
    """A measurement that nothing has followed from yet.

    Attributes:
        measurement: Of all processes.
        index: Where loggers will put it.
        meter: The meter before it, to take it anew from there.
        settled: Whether the weights have come to be used.
    """

    measurement: Measurement
    index: int
    meter: Meter
    settled: bool = False


class Session:
    """What is known and done between the start and the end of a run, or of one call of fit.

    Args:
        options: Its settings.
        series: The series of measurements that the session goes on with.
        steering: What moves the residual scales, ``None`` in a run that is only watched.
        blocks: The blocks, ``None`` where they are to be found.
        host: The loop around it.
        should_measure: Whether to measure at a step.
        goes_on: Whether the series was begun by an earlier session.
    """

    def __init__(
        self,
        options: Options,
        series: Series,
        steering: Steering | None,
        blocks: tuple[ResidualBlock, ...] | None,
        host: Host,
        should_measure: Callable[[int], bool],
        *,
        goes_on: bool,
    ) -> None:
        self._options, self.series, self._steering, self._blocks = options, series, steering, blocks
        self._host, self._should_measure, self._goes_on = host, should_measure, goes_on
        self.peers = Peers(*host.processes, host.model)
        self.outlets = Outlets(host.name, options.prefix, host.outlets, verbose=options.verbose)
        if not goes_on:
            series.run = self.peers.same(series.run)
        self.meter: Meter | None = None
        self._batch_watch: BatchWatch | None = None
        self._awaits_forward = False  # no input could be guessed: the first real forward pass will show one
        self._first_forward: FirstForward | None = None
        self._share: Measurement | None = None  # of this process
        self._look: _Look | None = None
        self._latest: Measurement | None = None  # of all processes
        self._introduced = False
        self._weights: dict[str, tuple[bool, int]] = {}  # fingerprint of those that were measured last
        self._trained: frozenset[str] = frozenset()  # parameters of blocks that the run trains
        self._sign_of_training: str | None = None  # by what the weights that the law meets first look trained
        self._modules: dict[str, str] = {}  # with weights, when the blocks were found
        self._weights_step = 0  # and what the loop had counted then
        self._unseen = False  # whether weights may have been changed up to the forward pass of this batch
        self._failures = 0  # in a row
        self._told: set[str] = set()

    # When.

    def begin(self) -> None:
        """Find the blocks and measure for the first time; on resume, publish what was measured last."""
        if self.series.measured_step is not None:
            self.outlets.publish(self.series.values)
        self._search(self._find)
        self._look_if_due(self._host.now())
        if self.meter is not None and self._look is None and self._host.by_hand:
            self._mark(self.meter)
        self._answer(self.series.take_failures())

    def begin_batch(self, batch: Any) -> None:
        """Have measured the weights that the batch will use, and listen to how it uses them."""
        self._unseen = not self._host.by_hand
        if not self._unseen:  # by hand, weights may be changed within the batch in ways that the loop does not see
            self._look_again()
        self._look_if_due(self._host.now())
        if self._look is not None:
            self._look = replace(self._labelled(self._look), settled=True)
            if self._batch_watch is not None:
                self._batch_watch.start(batch)
        if self._awaits_forward:
            self._awaits_forward, self._first_forward = False, FirstForward(self._host.model, batch)

    def in_use(self) -> None:
        """Look whether the weights that the forward pass has used are those that were measured."""
        if self._unseen and self._look is not None and self._look.settled:
            self._unseen = False
            self._look_again()

    def before_step(self) -> None:
        """Act on the measurement of the weights that the optimizer is about to change."""
        self.in_use()
        if self._look is None or not self._look.settled:
            return
        # By hand, another model may step first, and this one has not even run yet.
        watch = self._batch_watch if self._host.by_hand else None
        if watch is None or self.peers.agree(watch.complete):
            self._conclude()

    def end_batch(self, *, announced: bool = True) -> None:
        """Measure if it is due, and do what a failure asks for.

        Args:
            announced: Whether the loop says when a forward pass comes. Otherwise the first one may still be to come.
        """
        self._notice_uncounted()
        step = self._host.now(done=1)
        if self._look is not None and self._look.settled and self._look.measurement.step != step:
            self._conclude()  # the optimizer is one that the loop does not see
        if self._first_forward is not None and (announced or self._first_forward.heard):
            self._search(self._find_late, self._first_forward)
            self._first_forward = None
        self._look_if_due(step, done=1)
        self._answer(self.series.take_failures())
        self.outlets.show(self.series.values)

    def refresh(self) -> None:
        """Publish what is true of the weights now, for callbacks that save or stop by it."""
        self._look_again()

    def end(self) -> None:
        """Measure the final weights, while they are where they were trained."""
        self._look_at_last(also=self._latest is None or self._latest.step != self._host.now())
        self._stop_listening()

    def close(self) -> None:
        """Look whether others have put other weights into their place; write, print and draw the run."""
        if not self._host.shards:  # those can no longer be read then, and nobody averages them
            self._look_at_last()
        if self._look is not None:
            look, self._look = self._look, None
            events, memory = observe(self.series.memory, look.measurement)
            # A run that goes on takes this measurement anew, with its tokens: nothing else follows from it now.
            if self._guard("writing", self._write, look, memory, events):
                self.series.measured_step = look.measurement.step
            if callable(self._options.on_alarm):
                self._answer([event for event in events if event.level == "failure"])
        self.outlets.finish(self._latest, self.series.batches)

    def abandon(self) -> None:
        """Write, print and draw what is known of a run that breaks off, and leave no listener in the model."""
        self._stop_listening()
        with suppress(Exception):  # each process for itself: the others may be somewhere else
            if self._look is not None and not self._host.rehearses:
                look, self._look = self._look, None
                self._write(look, self.series.memory, ())
        with suppress(Exception):  # a warning that is an error would take the place of what broke the run off
            self.outlets.finish(self._latest, self.series.batches)

    def _stop_listening(self) -> None:
        for listener in (self._first_forward, self._batch_watch):
            if listener is not None:
                listener.stop()

    def _notice_uncounted(self) -> None:
        """See whether weights change although the loop counts no step; then batches count as steps."""
        self._host.end_batch()
        doubtful = self._host.doubtful(self._options.every_n_steps) and self._weights_step == self._host.counted()
        if self.meter is None or not doubtful or self._unchanged(self.meter):
            return
        self.series.counts_batches = True
        if self._look is not None:  # taken before the first batch of which this can be known
            step = max(self._host.counted(), self._look.index)
            self._look = replace(self._look, measurement=replace(self._look.measurement, step=step))

    # Finding the blocks.

    def _search(self, action: Callable[..., None], *args: Any) -> None:
        if not self._guard("finding the blocks", action, *args):
            self.meter = None  # in all processes, if one of them has found none

    def _find(self) -> None:
        blocks = self._blocks
        if blocks is None:
            trained = self._host.trained()
            blocks = guessed_blocks(self._host.model, self._options.blocks, trained)
        if blocks is None:
            self._awaits_forward = True
        else:
            self._watch(blocks)

    def _find_late(self, first_forward: FirstForward) -> None:
        first_forward.stop()
        trained = self._host.trained()
        calls = first_forward.calls(trained)
        self._watch(*shown_blocks(self._host.model, self._options.blocks, calls, trained))

    def _watch(self, blocks: tuple[ResidualBlock, ...], calls: Sequence[Call] = ()) -> None:
        options, model = self._options, self._host.model
        self.meter = Meter(
            ModelWeights(self._host.weights),
            blocks,
            linearization=options.linearization,
            solver=options.solver,
            safe_zone=options.safe_zone,
            signals=options.signals,
        )
        self._trained = trained_names(model, self.meter.blocks, self._host.trained())
        self._modules = weighted_modules(model, blocks)
        self.series.blocks = to_plain(blocks)
        # A teacher is meant to begin as a copy.
        trained = [item for item in self.meter.blocks if not self._trained.isdisjoint(parameters_of([item]))]
        copies = copied_blocks(self.meter.weights, trained) or ()
        for note in (*getattr(blocks, "notes", ()), *map(told_of_copies, copies)):
            inform(f"{self._host.name}: {note}")
        if options.looks:
            self._batch_watch = BatchWatch(model, blocks, calls, looks=options.looks)
        if self.series.warm_start:
            self.meter.load_state_dict(self.series.warm_start)
        if not self._host.rehearses:
            header = {name: getattr(options, name) for name in ("linearization", "safe_zone", "every_n_steps")}
            header |= {"run": self.series.run, "model": described_model(model)}
            header["rescaler"] = None if self._steering is None else self._steering.rescaler.to_dict()
            header["blocks"] = [described(block) for block in blocks]
            step = self._host.now()
            # What is due is measured now, also if the file has it already: it was written at the end of a fit.
            kept = step - 1 if self._should_measure(step) else step
            self.outlets.open(header, kept if self._goes_on else None)

    # Measuring.

    def _look_if_due(self, step: int, *, done: int = 0) -> None:
        rehearsed = self._host.rehearses and self._latest is not None
        if self.meter is None or self._look is not None or rehearsed:
            return
        if self._should_measure(step):
            self._measure(self.meter, step, self._host.index(done=done))

    def _look_again(self) -> None:
        """Measure again, from where the last measurement began, if the weights are others by now."""
        if self._look is not None and self.meter is not None and not self._unchanged(self.meter):
            look, self._look = self._look, None
            self._measure(look.meter, look.measurement.step, look.index, settled=look.settled)

    def _labelled(self, look: _Look) -> _Look:
        """Label a measurement anew: a loop that resumes may bring its counts up to date only when it begins a batch."""
        measurement = replace(look.measurement, step=self._host.now())
        return replace(look, measurement=measurement, index=self._host.index())

    def _look_at_last(self, *, also: bool = False) -> None:
        """Measure the weights that the user will get if they are not those that were measured last, or if told to."""
        if self._host.rehearses or self.meter is None:
            return
        if self._look is not None:
            self._look_again()
            if self._look is not None:
                self._look = self._labelled(self._look)
        elif also or (self._latest is not None and not self._unchanged(self.meter)):
            self._measure(self.meter, self._host.now(), self._host.index())

    def _mark(self, meter: Meter) -> None:
        self._weights, self._weights_step = fingerprint(meter.weights, meter.blocks), self._host.counted()

    def _unchanged(self, meter: Meter) -> bool:
        """Whether no process sees other weights than those that were measured last."""
        return self.peers.agree(same_weights(self._weights, fingerprint(meter.weights, meter.blocks)))

    def _measure(self, meter: Meter, step: int, index: int, *, settled: bool = False) -> None:
        """Measure, together with the other processes, and publish it; called at the same steps in all of them."""
        self.meter = copy.copy(meter)  # what a meter remembers is replaced and never changed
        if not self._guard("measuring", self._take_part, self.meter, step):
            self.meter, self.series.scheduled_step = meter, step
            return
        assert self._share is not None
        measurement, alike = self.peers.combined(self._share)
        if not alike and self._steering is not None and not self._steering.disarmed:
            self._steering.disarmed = True
            warn(
                f"{self._host.name} found residual scales that differ between processes at step {measurement.step}: "
                "something else has changed them in one process. It steers no more in this run"
            )
        self._latest = measurement
        self._look = _Look(measurement, index, meter, settled)
        _, memory = observe(self.series.memory, measurement)
        self.outlets.publish(self._values(measurement, memory))
        if not self._introduced and not is_lazy(measurement):
            self._introduced = True
            self._introduce(measurement, meter.blocks)

    def _introduce(self, measurement: Measurement, blocks: Sequence[ResidualBlock]) -> None:
        """Say what is measured and what is doubtful, or warn that there is nothing to compare."""
        for doubt in doubts(measurement):
            inform(f"{self._host.name}: {doubt}")
        if (nothing := nothing_to_compare(measurement)) is None:
            unwritten = "" if self.outlets.has_folder else "; no file is written, because the run has no folder"
            inform(f"{self._host.name}: {found(blocks, measurement, self._options.every_n_steps)}{unwritten}")
        else:
            inform(f"{self._host.name}: {nothing}", logging.WARNING)

    def _take_part(self, meter: Meter, step: int) -> None:
        """Measure the share of this process."""
        self._share = meter.measure(step, (self.peers.rank, self.peers.count))
        self._mark(meter)
        self._notice_rebuilt(meter)
        first = self.series.first_weights or self._weights
        trained = {name: bits for name, bits in first.items() if name in self._trained}
        self._share = with_moved(self._share, meter.blocks, trained, self._weights)
        # Here, because by hand another model may have stepped before anything follows from this measurement.
        if self._steering is not None and self._steering.rescaler.at_once and not self.series.law:
            self._sign_of_training = sign_of_training(meter.weights, meter.blocks)

    def _notice_rebuilt(self, meter: Meter) -> None:
        """Say once that modules have come or gone. What is flattened has no modules with weights."""
        if self._host.shards or "rebuilt" in self._told:
            return
        told = told_of_rebuilt(self._modules, weighted_modules(self._host.model, meter.blocks))
        if told is not None:
            self._told.add("rebuilt")
            inform(f"{self._host.name}: {told}", logging.WARNING)

    # What follows from a measurement.

    def _conclude(self) -> None:
        """Draw the consequences of a measurement that all processes have."""
        assert self._look is not None
        assert self.meter is not None
        look, self._look = self._look, None
        if self._batch_watch is not None:
            look = replace(look, measurement=self._with_tokens(self._batch_watch, look.measurement))
        first, self.series.scheduled_step = self.series.scheduled_step is None, look.measurement.step
        self.series.warm_start = self.meter.state_dict()
        self.series.first_weights = self.series.first_weights or self._weights
        if self._guard("writing", self._note, look, not first):  # nothing is steered before the first step
            self._failures = 0

    def _with_tokens(self, watch: BatchWatch, measurement: Measurement) -> Measurement:
        """Add what was heard. What goes wrong with it costs the tokens, and is told once."""
        if not watch.heard and "heard" not in self._told:
            self._told.add("heard")
            inform(
                f"{self._host.name}: no token geometry at step {measurement.step}, because no call of the model in "
                "grad mode was heard; nothing is heard of a model that is called within compiled code"
            )
        try:
            measurement = watch.add_to(measurement)
        except Exception as error:
            if self._options.on_error == "raise":
                raise
            self._tell_once(f"no token geometry at step {measurement.step} ({type(error).__name__}: {error})")
        return self.peers.combined(measurement)[0]

    def _note(self, look: _Look, steer: bool) -> None:
        measurement = look.measurement
        actions: tuple[Action, ...] = ()
        events = self.series.observe(measurement)
        if self._steering is not None and (steer or self._steering.rescaler.at_once):
            law, optimizers = self.series.law, self._host.optimizers
            for notice in self._steering.notices(optimizers):
                warn(f"{self._host.name}, step {measurement.step}: {notice}")
            falling = falling_tokens(self.series.memory)
            actions, self.series.law = self._steering.act(
                measurement,
                law,
                optimizers,
                falling,
                trained=not law and self._is_trained(),
            )
        self._write(look, self.series.memory, events, actions)
        if self._steering is not None and (told := news(actions, measurement, dry_run=self._steering.rescaler.dry_run)):
            inform(told)

    def _is_trained(self) -> bool:
        """Whether the law meets a model that was trained before: what it has learned to use, is not taken from it."""
        sign = self._sign_of_training
        if sign is not None:
            inform(
                f"{self._host.name}: the model looks trained ({sign}), so no branch is lowered below the norm that it "
                "has now"
            )
        return sign is not None

    def _write(self, look: _Look, memory: Memory, events: Sequence[Event], actions: Sequence[Action] = ()) -> None:
        self._latest, self.series.batches = look.measurement, look.index
        self.series.values = self._values(look.measurement, memory, sum(action.moves for action in actions))
        self.outlets.write(self.series, look.measurement, events, actions)

    def _values(self, measurement: Measurement, memory: Memory, moved: int = 0) -> dict[str, float]:
        rescaled = None if self._steering is None else moved
        prefix, per_layer = self._options.prefix, self._options.per_layer
        return logged_values(measurement, memory, prefix, per_layer=per_layer, rescaled=rescaled)

    def _answer(self, failures: Sequence[Event]) -> None:
        """Do at a failure what the user asked for; what the user's own function raises is no telemetry that failed."""
        for event in failures:
            if self._options.on_alarm == "checkpoint":
                self._rescue(event)
            else:
                self._host.answer(event)

    def _rescue(self, failure: Event) -> None:
        """Save the run in a folder of its own, with the measurements so far."""
        made = self.outlets.rescue(failure, self._host.index())
        folder = self.peers.same("" if made is None else str(made))
        if not folder:
            warn(f"{self._host.name}: no checkpoint at step {failure.step}, because the run has no folder")
        elif self._guard("saving a checkpoint", self._host.save, Path(folder, "failed.ckpt")):
            warn(f"{self._host.name} saved this run in {folder}; `lightning-spectral report {folder}` shows it")

    # Failures.

    def _tell_once(self, message: str) -> None:
        if message.partition(" at step")[0] not in self._told:
            self._told.add(message.partition(" at step")[0])
            warn(f"{self._host.name}: {message}; training goes on, and so do the other measurements")

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
        if not self.peers.agree(error is None or not (mendable or self._options.on_error == "raise")):
            raise error or SpectralError(f"{self._host.name} failed in {what} in another process, whose error says why")
        failure = None if error is None else f"{type(error).__name__}: {error}"
        self._failures += 1
        end = "it is switched off now" if self._failures == PATIENCE else "training goes on"
        told = f"{self._host.name} failed in {what} ({failure or 'in another process'}); {end}"
        if failure is None or self.peers.rank == 0:
            warn(told)
        else:  # the process that knows why
            warn_here(told)
        return False


def _error_of(action: Callable[..., None], *args: Any) -> Exception | None:
    try:
        action(*args)
    except Exception as error:
        return error
    return None

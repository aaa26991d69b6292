"""``SpectralCallback``: the shell for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler, ExportableState

from lightning_spectral.alarms import Event
from lightning_spectral.control import GainCeiling, ResidualRescaler
from lightning_spectral.control.steering import Steering
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.pages import send_alert
from lightning_spectral.scales import fuse_scales
from lightning_spectral.scales.loading import MARKER, lost_scales, marked, restore_marked, saved_sites
from lightning_spectral.watch import Watch
from lightning_spectral.watch.options import AutoRescale, Options
from lightning_spectral.watch.outlets import Outlet
from lightning_spectral.watch.search import blocks_of
from lightning_spectral.watch.telling import inform, warn

__all__ = ["SpectralCallback"]


_OF_WHOLE_MODELS = (
    "SpectralCallback: checkpoints of this run have residual scales. A Trainer with this callback resumes from them, "
    "from_pretrained does not read them: call fuse_scales(model) before save_pretrained, or "
    "SpectralCallback(fuse_at_end=True)"
)
_OF_ADAPTERS = (
    "SpectralCallback: checkpoints of this run have adapters without the residual scales that they were trained with. "
    "A Trainer with this callback resumes from them; adapters that are loaded elsewhere compute something else: call "
    "fuse_scales(model), and save model.merge_and_unload()"
)


class SpectralCallback(TrainerCallback, ExportableState):
    """Measures the spectral ratio of MLP to attention of every residual block while a transformers.Trainer trains.

    .. code-block:: python

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SpectralCallback(every_n_steps=50)])

    What ``report_to`` names gets the keys of :class:`~lightning_spectral.SpectralMonitor`, behind ``train/`` where it
    puts every key there. So does ``state.log_history``. ``output_dir`` gets ``spectral.jsonl`` and ``spectral.png``. A
    checkpoint gets ``spectral.pt``, from which a run that is resumed goes on exactly.

    With ``auto_rescale``, the model has residual scales, which ``save_pretrained`` writes and ``from_pretrained`` does
    not read: fold them into the weights before (:func:`~lightning_spectral.fuse_scales`), or ask for it with
    ``fuse_at_end``.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        auto_rescale: Whether to steer, as in :class:`~lightning_spectral.SpectralMonitor`.
        batch: Example input for finding the blocks to steer, if none can be guessed.
        fuse_at_end: Whether to fold the scales into the weights when training ends. The model computes what it did.
        options: The other settings of :class:`~lightning_spectral.Watch`. ``on_alarm="stop"`` ends
            training.

    Raises:
        ConfigurationError: An argument cannot be used.

    Example:
        >>> callback = SpectralCallback(every_n_steps=50)  # for Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        auto_rescale: AutoRescale | Mapping[str, Any] = False,
        *,
        batch: Any = None,
        fuse_at_end: bool = False,
        **options: Any,
    ) -> None:
        if unsaved := options.pop("unsaved", None):  # see `state`
            raise ConfigurationError(
                f"restore_callback_states_from_checkpoint=True cannot bring back {', '.join(unsaved)} of a "
                "SpectralCallback: leave it out; the run goes on from the checkpoint without it"
            )
        if isinstance(auto_rescale, Mapping):
            auto_rescale = _law(auto_rescale)
        self._options = {"every_n_steps": every_n_steps, "auto_rescale": auto_rescale, **options}
        self._batch, self._fuse_at_end = batch, fuse_at_end
        try:
            self._checked = Options(**self._options)
        except TypeError as error:  # a name that is none
            raise ConfigurationError(f"SpectralCallback: {error}; the options are those of Watch") from None
        self._handler: CallbackHandler | None = None
        self._watch: Watch | None = None
        self._state: Mapping[str, Any] | None = None  # plain values, from a checkpoint
        self._warned = False

    # In the order in which the Trainer calls them.

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        """Attach the scales, so that a checkpoint of a steered run can be loaded."""
        self._handler = _caller()
        law = self._checked.law
        if law is not None and not law.dry_run:
            blocks = self._checked.blocks
            named = None if blocks is None else blocks_of(model, blocks)
            Steering(law, self._checked.safe_zone).attach(model, named, self._callbacks(), batch=self._batch)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        """Begin to watch, where a resumed run had stopped.

        Raises:
            ConfigurationError: The checkpoint has residual scales, and the model has none.
        """
        self._handler = self._handler or _caller()  # one that a checkpoint has brought back has seen no on_init_end
        if self._watch is not None:  # of a run that failed, of which callbacks hear nothing
            self._watch.abandon()
        trainer = _trainer()
        self._watch = _Watch(
            _called(trainer, model),
            args.output_dir,
            beside=(trainer, *self._callbacks()),
            optimizers=[optimizer],
            batch=self._batch,
            **self._options,
        )
        self._watch.add_outlet(_Alerts(self._reporters))
        known = _saved(args, state, self._checked.prefix) or self._state
        if known is not None and state.global_step:
            self._watch.load_state_dict({**known, "step": state.global_step})
            if (lost := lost_scales(model, saved_sites({MARKER: known.get(MARKER, {})}))) is not None:
                raise ConfigurationError(lost)
            restore_marked(model, known.get(MARKER, {}).get("log_scales", {}))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take note that forward passes come next."""
        if self._watch is not None:
            self._watch.before_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> TrainerControl | None:
        """Measure if it is time to, and report what is complete."""
        if self._watch is None:
            return None
        self._report(self._watch.step(state.global_step), args, state, control, model)
        if self._watch.should_stop:
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        """Leave what an exact resume needs in the checkpoint."""
        if self._watch is None:
            return
        if state.is_world_process_zero and (folder := _checkpoint(args, state)).is_dir():
            held = {name: parameter.detach() for name, parameter in model.named_parameters()}
            scales = marked((), held)  # a checkpoint of adapters does not have them
            torch.save({**self._watch.state_dict(), MARKER: scales}, folder / f"{self._checked.prefix}.pt")
        if self._checked.law is not None and not self._checked.law.dry_run and not self._warned:
            self._warned = True
            warn(_OF_ADAPTERS if _has_adapters(model) else _OF_WHOLE_MODELS)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        model: Any = None,
        **others: Any,
    ) -> None:
        """Measure the final weights when the Trainer logs how long the run took, which is the last thing it logs.

        Behind that, reporters end their run. Whatever they are told later begins another one.
        """
        if self._watch is not None and logs is not None and "train_runtime" in logs:
            entry = state.log_history.pop()  # many read their figures from the last one
            try:
                self._close(args, state, control, model)
            finally:
                state.log_history.append(entry)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **others: Any
    ) -> None:
        """Fold the scales if asked."""
        self._close(args, state, control, model)
        if self._fuse_at_end:
            fuse_scales(model)
            if _has_adapters(model):
                warn(
                    "SpectralCallback(fuse_at_end=True) has folded the scales into the adapters and into the weights "
                    "under them, which a checkpoint of adapters does not have: save model.merge_and_unload()"
                )

    # Resume through the state of the Trainer, which is JSON and therefore has no warm start.

    def state(self) -> dict[str, Any]:
        """Return the settings, and what is known of the run without tensors.

        The Trainer makes a new callback of them if ``restore_callback_states_from_checkpoint`` asks for it.
        """
        known = {} if self._watch is None else self._watch.state_dict()
        kept = {name: value for name, value in known.items() if name not in ("warm_start", "blocks")}
        settings = {**self._options, "batch": self._batch, "fuse_at_end": self._fuse_at_end}
        if isinstance(law := settings["auto_rescale"], GainCeiling | ResidualRescaler):
            settings["auto_rescale"] = law.to_dict()
        plain = {name: value for name, value in settings.items() if _is_plain(value)}
        unsaved = [name for name in settings if name not in plain]
        args = plain | ({"unsaved": unsaved} if unsaved else {})
        return {"args": args, "attributes": {"_state": kept or None}}

    def _close(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        """Measure the final weights, and end the watch."""
        if self._watch is not None:
            self._report(self._watch.close(), args, state, control, model)
            self._watch = None

    def _report(
        self,
        values: Mapping[str, float],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
    ) -> None:
        """Hand values to whatever reports, past the callbacks that would print them among the losses."""
        step = None if self._watch is None else self._watch.measured_step
        if not values or step is None:
            return
        then = copy.copy(state)  # the step whose weights were measured
        then.global_step = step
        state.log_history.append({**values, "step": step})
        for reporter in self._reporters():
            reporter.on_log(args, then, control, logs=dict(values), model=model)

    def _reporters(self) -> list[TrainerCallback]:
        """Return the other callbacks, without those that would print values among the losses."""
        return [item for item in self._callbacks() if not isinstance(item, PrinterCallback | ProgressCallback)]

    def _callbacks(self) -> list[TrainerCallback]:
        """Return the other callbacks of the Trainer."""
        known = [] if self._handler is None else self._handler.callbacks
        return [item for item in known if item is not self]


def _has_adapters(model: nn.Module) -> bool:
    """Whether what is saved of a model are its adapters alone, as peft does it."""
    return hasattr(model, "peft_config")


def _law(settings: Mapping[str, Any]) -> GainCeiling | ResidualRescaler:
    """Return the law that :meth:`SpectralCallback.state` has written."""
    laws = {law.__name__: law for law in (GainCeiling, ResidualRescaler)}
    values: dict[str, Any] = dict(settings)
    values |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}  # JSON has no tuples
    return laws[values.pop("law")](**values)


def _is_plain(value: object) -> bool:
    """Whether a value can be written as JSON."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


class _Alerts(Outlet):
    """The services behind the Trainer's reporters that tell people of alerts."""

    def __init__(self, reporters: Callable[[], Sequence[TrainerCallback]]) -> None:
        self._reporters = reporters

    def announce(self, event: Event, key: str, index: int) -> None:
        for reporter in self._reporters():
            for name in ("_wandb", "_trackio"):
                send_alert(getattr(reporter, name, None), event)


class _Watch(Watch):
    """A watch that speaks in the name of the callback."""

    speaker = "SpectralCallback"

    def __init__(self, *args: Any, beside: Sequence[object], **options: Any) -> None:
        self._beside = beside
        super().__init__(*args, **options)

    def add_outlet(self, outlet: Outlet) -> None:
        """Have another place take values and events."""
        self._host.add_outlet(outlet)


def _caller() -> CallbackHandler | None:
    """Return the handler that calls a callback: it knows who reports, and the Trainer passes neither of them on."""
    found = sys._getframe(2).f_locals.get("self")
    if isinstance(found, CallbackHandler):
        return found
    inform("SpectralCallback: report_to gets no values, because the callback was not called by a Trainer")
    return None


def _trainer() -> Trainer | None:
    """Return the Trainer that calls a callback: it may hold copies of the model, and callbacks are not handed it."""
    frame = sys._getframe(2)  # behind the method of the callback
    while frame.f_back is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    found = frame.f_locals.get("self")
    return found if isinstance(found, Trainer) else None


def _called(trainer: Trainer | None, model: nn.Module) -> nn.Module:
    """Return what a Trainer calls: what ``torch_compile`` has made of the model, which callbacks are not handed."""
    called: nn.Module = getattr(trainer, "model_wrapped", model)
    return called if getattr(called, "_orig_mod", None) is model else model


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _saved(args: TrainingArguments, state: TrainerState, prefix: str) -> Mapping[str, Any] | None:
    """Return the state in the checkpoint that a run goes on from, ``None`` where there is none."""
    path = _checkpoint(args, state) / f"{prefix}.pt"
    if not state.global_step or not path.is_file():
        return None
    loaded: Mapping[str, Any] = torch.load(path, weights_only=True)
    return loaded

"""``Watch``: the shell for a loop of one's own, plain or of Lightning Fabric or Accelerate."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_spectral import _checks
from lightning_spectral.alarms import Event
from lightning_spectral.control.explain import explanation
from lightning_spectral.control.optimizers import hooked
from lightning_spectral.control.steering import Steering
from lightning_spectral.discovery import find_blocks
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.sharding.flattened import is_flattened
from lightning_spectral.linalg.sharding.presence import is_dtensor
from lightning_spectral.linalg.solvers import SolverChoice
from lightning_spectral.records import ResidualBlock
from lightning_spectral.runs.series import Series
from lightning_spectral.watch.exits import at_exit, not_at_exit
from lightning_spectral.watch.options import AutoRescale, OnAlarm, Options, Wanted
from lightning_spectral.watch.outlets import Folder, Outlet
from lightning_spectral.watch.search import blocks_of, trained_parameters
from lightning_spectral.watch.session import Session
from lightning_spectral.watch.telling import inform

__all__ = ["Watch"]


class Watch:
    """Watches the training loop of a model, and steers it if asked: :class:`SpectralMonitor` without a Trainer.

    .. code-block:: python

        optimizer = AdamW(model.parameters())
        with Watch(model, "runs/first", every_n_steps=10, optimizers=optimizer) as watch:
            for step, batch in enumerate(loader, start=1):
                watch.before_step(batch)
                model(batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                print(watch.step(step))

    The weights are measured before the first step, then after every ``every_n_steps`` steps, and at the end. What
    follows from a measurement (tokens, events, moves of scales) follows within the next batch, behind its forward pass
    and before the optimizer steps. In several processes, every one of them has a watch and calls the same methods.

    Args:
        model: The model, or what ``DistributedDataParallel`` or ``FullyShardedDataParallel`` made of it. Scales are
            attached here, so a model that will be wrapped, sharded or compiled comes before that, or with scales
            (:func:`attach_scales`).
        folder: Gets ``spectral.jsonl`` and ``spectral.png``. Without one nothing is written.
        optimizers: What trains the model. Needed for steering, which acts between a backward pass and a step.
        every_n_steps: As in :class:`SpectralMonitor`, like all that follow.
        auto_rescale: Whether to steer.
        linearization: The rule that turns branches into linear operators.
        safe_zone: The interval of ratios that counts as balanced.
        blocks: The blocks, or hints for finding them.
        batch: Example input for finding them, if none can be guessed: a tensor, a tuple of positional arguments or a
            dict of keyword arguments. Without one, a run that is only watched finds them in its first forward pass.
        solver: How spectral norms are computed.
        geometry: Whether to look at a few samples of the batch too, in evaluation mode, or at which of their parts.
        signals: What else to ask of the weights.
        per_layer: Whether values are given for every block, besides the summary.
        on_alarm: What to do at a failure beyond telling it: nothing, ``"checkpoint"``, which saves model and optimizers
            in a folder of their own, ``"stop"``, which sets ``should_stop``, or call ``on_alarm(event)``.
        on_error: What to do when a measurement fails.
        prefix: First part of every key and file name.
        verbose: Whether the console is told of every ratio that crosses an edge of the safe zone or drifts.

    Attributes:
        should_stop: Whether a failure has asked for the end of the run.

    Raises:
        ConfigurationError: An argument cannot be used, or a scale would not be trained.
        BlocksNotFoundError, ExampleInputError: The blocks to steer cannot be found.

    Example:
        >>> watch = Watch(model, every_n_steps=10)
        >>> watch.before_step(ids)  # then the forward pass, the backward pass and the step
        >>> round(watch.step(1)["spectral/ratio_max"], 1), watch.measured_step
        (0.9, 0)
    """

    speaker = "Watch"
    _beside: Sequence[object] = ()  # objects that may hold copies of the model

    def __init__(
        self,
        model: nn.Module,
        folder: str | PathLike[str] | None = None,
        *,
        optimizers: Optimizer | Iterable[Optimizer] = (),
        every_n_steps: int = 50,
        auto_rescale: AutoRescale = False,
        linearization: Literal["circuit", "paper"] = "circuit",
        safe_zone: tuple[float, float] = (0.5, 2.0),
        blocks: Wanted = None,
        batch: Any = None,
        solver: SolverChoice = None,
        geometry: bool | Collection[str] = True,
        signals: Collection[str] = (),
        per_layer: bool = False,
        on_alarm: OnAlarm | Callable[[Event], object] = "log",
        on_error: Literal["warn", "raise"] = "warn",
        prefix: str = "spectral",
        verbose: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model is a {type(model).__name__}, expected the torch.nn.Module that is trained")
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
        self.should_stop = False
        self._host = _LoopHost(self, model, _unwrapped(optimizers), None if folder is None else Path(folder))
        self._series = Series.begin(linearization)
        self._goes_on = self._closed = self._in_batch = False
        self._session: Session | None = None
        self._hooks: list[RemovableHandle] = []
        self._at_exit = partial(_abandon, weakref.ref(self))
        law = self.options.law
        self._steering = None if law is None else Steering(law, self.options.safe_zone)
        self._blocks: tuple[ResidualBlock, ...] | None = None
        if self._steering is not None:
            self._attach(self._steering, batch)
        elif batch is not None:
            hints = blocks if isinstance(blocks, Mapping) else None
            self._blocks = find_blocks(self._host.model, batch=batch, hints=hints)

    def _attach(self, steering: Steering, batch: Any) -> None:
        host = self._host
        if not host.optimizers:
            raise ConfigurationError(
                "auto_rescale without optimizers: steering acts between a backward pass and a step, so name what "
                "steps, Watch(model, ..., auto_rescale=True, optimizers=optimizer)"
            )
        steering.set_up()
        named = None if host.wanted is None else blocks_of(host.model, host.wanted)
        others = () if host.shards else self._beside  # a copy that is cut itself could not take scales any more
        steering.attach(host.model, named, others, batch=batch)
        steering.begin(host.optimizers)
        for told in (steering.held_still(), *steering.doubts):
            if told is not None:
                inform(f"{host.name}: {told}")

    # In a loop.

    def should_measure(self, step: int) -> bool:
        """Whether to measure at a step; a subclass may decide otherwise, but alike in all processes."""
        return self._series.due(step, self.options.every_n_steps)

    def before_step(self, batch: Any = None) -> None:
        """Take note that a forward pass comes next.

        Args:
            batch: What it is of. It is needed only where the model is called with nothing else, which is not a forward
                pass but a strategy's way into one.
        """
        self._begin().begin_batch(batch)
        self._in_batch = True

    def step(self, step: int) -> Mapping[str, float]:
        """Take note that an optimizer step is done, and measure if it is time to.

        Args:
            step: How many steps are done: 1 after the first.

        Returns:
            What was measured of the weights before this step and is complete now, by the keys of
            :class:`SpectralMonitor`; empty where nothing was. It belongs to step :attr:`measured_step`.
        """
        session, host = self._begin(), self._host
        step = _checks.steps("step", step, least=host.now())
        announced, self._in_batch = self._in_batch, False
        if not announced:  # the user says nothing of forward passes, so no tokens are heard
            session.begin_batch(None)
        host.steps = step
        session.end_batch(announced=announced)
        return host.take()

    @property
    def measured_step(self) -> int | None:
        """The step of the last measurement that is complete, ``None`` before the first."""
        return self._series.measured_step

    def close(self) -> Mapping[str, float]:
        """Measure the final weights, write and draw what is left, and leave no hook in the model. Scales stay.

        Returns:
            What was measured last.
        """
        if not self._closed:
            self._closed = True
            try:
                if self._session is not None:
                    self._session.end()
                    self._session.close()
            finally:
                self._release()
        return self._host.take()

    def __enter__(self) -> Self:
        """Return the watch, which :meth:`close` ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the watch; where the loop failed, write what there is and measure nothing any more."""
        if error is None:
            self.close()
        else:
            attached = self._steering is not None and self._steering.has_attached
            if attached and (told := explanation(error, self._host.model, self.speaker)):
                error.add_note(told)
            self.abandon()

    def abandon(self) -> None:
        """End without another measurement: write, print and draw what there is, and leave no hook in the model.

        A watch that nobody closes does so when the interpreter exits, as behind an exception, and at SIGTERM, unless
        the program handles this signal itself.
        """
        if not self._closed:
            self._closed = True
            if self._session is not None:
                self._session.abandon()
            self._release()

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, as copies of plain values and tensors."""
        return {"step": self._host.now(), **self._series.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier state, before the first step.

        Raises:
            ConfigurationError: The watch has begun already, or the state is of another linearization.
        """
        if self._session is not None:
            raise ConfigurationError("load_state_dict comes before the first before_step() or step() of a watch")
        known, rule = state.get("linearization", self.options.linearization), self.options.linearization
        if known != rule:
            raise ConfigurationError(
                f"the state is of linearization={known!r}, this watch has {rule!r}, and one series never mixes them: "
                "make a watch with the same, or leave the state out"
            )
        series = Series(rule)
        series.load_state_dict(state)
        self._host.steps = _checks.steps("step", state.get("step", series.measured_step or 0), least=0)
        if series.measured_step is None or series.reaches(self._host.steps):
            self._series, self._goes_on = series, True

    # Behind it.

    def _begin(self) -> Session:
        if self._closed:
            raise ConfigurationError("the watch is closed: make another one to go on")
        if self._session is None:
            steering, host = self._steering, self._host
            for item in host.optimizers:
                self._hooks += hooked(item, "register_step_pre_hook", self._before_optimizer)
            if steering is not None:
                steering.start(host.optimizers)
            blocks = self._blocks if steering is None else steering.blocks
            self._session = Session(
                self.options, self._series, steering, blocks, host, self.should_measure, goes_on=self._goes_on
            )
            at_exit(self._at_exit)
            weakref.finalize(self, not_at_exit, self._at_exit).atexit = False  # nobody closed it, and nobody can
            self._session.begin()
        return self._session

    def _before_optimizer(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Act between a backward pass and a step. A step that is given a closure runs its passes later."""
        if self._session is None or not self._in_batch or any(map(callable, (*args, *kwargs.values()))):
            return
        if self._steering is not None:
            self._steering.check_gradients()
        self._session.before_step()

    def _release(self) -> None:
        not_at_exit(self._at_exit)
        while self._hooks:
            self._hooks.pop().remove()
        if self._steering is not None:
            self._steering.release()

    def __repr__(self) -> str:
        """Return the call that makes such a watch."""
        return f"{type(self).__name__}({type(self._host.model).__name__}, {self.options.changed()})"


def _abandon(watch: weakref.ref[Watch]) -> None:
    if (found := watch()) is not None:
        found.abandon()


class _LoopHost:
    """A loop that counts its own steps. :class:`~lightning_spectral.watch.host.Host` says what each member is for."""

    rehearses = False

    def __init__(self, watch: Watch, model: nn.Module, optimizers: Sequence[Optimizer], folder: Path | None) -> None:
        self._watch, self._outer, self.optimizers = watch, model, optimizers
        self.name, self.steps = watch.speaker, 0
        self.wanted = watch.options.blocks
        self._values = _Values()
        self._outlets: list[Outlet] = [self._values, *([] if folder is None else [Folder(folder)])]

    @property
    def model(self) -> nn.Module:
        wraps = isinstance(self._outer, DistributedDataParallel) or is_flattened(self._outer)
        inner = self._outer.module if wraps else self._outer
        assert isinstance(inner, nn.Module)
        return inner

    @property
    def weights(self) -> nn.Module:
        return self._outer if is_flattened(self._outer) else self.model

    @property
    def processes(self) -> tuple[int, int]:
        together = distributed.is_available() and distributed.is_initialized()
        return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)

    @property
    def shards(self) -> bool:
        return is_flattened(self._outer) or any(map(is_dtensor, self._outer.parameters()))

    @property
    def by_hand(self) -> bool:
        return len(self.optimizers) > 1

    def counted(self) -> int:
        return self.steps

    def now(self, *, done: int = 0) -> int:
        return self.steps

    def index(self, *, done: int = 0) -> int:
        return self.steps

    def end_batch(self) -> None:
        pass

    def doubtful(self, every_n_steps: int) -> bool:
        return False

    def trained(self) -> Sequence[Tensor]:
        return trained_parameters(self.model, self.optimizers)

    def outlets(self) -> Sequence[Outlet]:
        return self._outlets

    def add_outlet(self, outlet: Outlet) -> None:
        self._outlets.append(outlet)

    def answer(self, failure: Event) -> None:
        on_alarm = self._watch.options.on_alarm
        if callable(on_alarm):
            on_alarm(failure)
        elif on_alarm == "stop":
            self._watch.should_stop = True

    def save(self, path: Path) -> None:
        if self.shards:
            raise ConfigurationError(
                "sharded weights are not saved from here: pass on_alarm=function, which saves them"
            )
        if self.processes[0] == 0:
            states = {"model": self.model.state_dict(), "optimizers": [item.state_dict() for item in self.optimizers]}
            torch.save({**states, "watch": self._watch.state_dict(), "step": self.steps}, path)

    def take(self) -> Mapping[str, float]:
        """Return the values of a measurement that has become complete, once."""
        return self._values.take()


class _Values(Outlet):
    """Keeps the values of a measurement until they are taken."""

    def __init__(self) -> None:
        self._kept: Mapping[str, float] = {}

    def log(self, values: dict[str, float], index: int) -> None:
        self._kept = values

    def take(self) -> Mapping[str, float]:
        kept, self._kept = self._kept, {}
        return kept


def _unwrapped(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """Return optimizers without what Fabric and Accelerate put around them: hooks are called on the inner ones."""
    found = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for number, item in enumerate(found):
        while isinstance(inner := getattr(item, "optimizer", None), Optimizer):
            item = inner
        if not isinstance(item, Optimizer):
            raise ConfigurationError(f"optimizers has a {type(item).__name__}, expected torch.optim.Optimizer")
        found[number] = item
    return found

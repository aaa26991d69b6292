"""Where a measurement goes: loggers, other callbacks, the journal, the progress bar, the picture, the console.

Each of them fails alone: it is told once, and the others get what is theirs. Nothing here is raised, whatever
``on_error`` says, because most of it happens in one process of several, and the others would wait for it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from lightning_spectral.alarms import Event
from lightning_spectral.control.actions import described_action
from lightning_spectral.control.law import Action
from lightning_spectral.monitor.framework import log_to_bar, rank_zero_info, rank_zero_warn
from lightning_spectral.pages import one_screen, send_figure
from lightning_spectral.records import Measurement
from lightning_spectral.runs.durable import replace
from lightning_spectral.runs.history import history_of
from lightning_spectral.runs.journal import Journal
from lightning_spectral.runs.series import Series

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure

__all__ = ["Outlets"]

P = ParamSpec("P")
R = TypeVar("R")


class Outlets:
    """The outlets of one call of fit.

    Args:
        prefix: First part of every key and file name.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._journal: Journal | None = None
        self._bar_is_old = False  # the progress bar shows an older measurement
        self._failed: set[str] = set()
        self._untold: list[tuple[str, bool]] = []  # texts, and whether they are grave

    def open(self, trainer: Trainer, header: Mapping[str, Any], resume_step: int | None) -> None:
        """Begin the journal, or go on with it, where this process writes one (see :class:`Journal`)."""
        loggers = self._loggers(trainer) if trainer.is_global_zero else ()
        if loggers:
            folders = (self._try(f"asking {_name(logger)} for its folder", _folder, logger) for logger in loggers)
            folder = next((folder for folder in folders if folder is not None), None)
            path = None if folder is None else folder / f"{self.prefix}.jsonl"
            self._journal = self._try("beginning the journal", Journal, path, header, resume_step=resume_step)
        self._tell()

    def write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        series: Series,
        measurement: Measurement,
        events: Sequence[Event],
        actions: Sequence[Action],
    ) -> None:
        """Write a measurement, its logged values, what is new in it and the actions after it everywhere."""
        self._bar_is_old = True
        if self._journal is not None:
            self._try("writing the journal", _append, self._journal, measurement, events, actions)
        self._try("publishing", _publish, trainer, pl_module, series.values)
        for logger in self._loggers(trainer):
            self._try(f"logging to {_name(logger)}", _log, logger, series)
        self._untold += [(event.message, event.level != "info") for event in events]
        self._tell()

    def publish(self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        """Put values where other callbacks look for them. On all ranks: reading them may be a collective."""
        self._try("publishing", _publish, trainer, pl_module, values)
        self._tell()

    def show(self, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        """Put two new numbers into the progress bar; `self.log` may do so only within a batch."""
        if not self._bar_is_old:
            return
        self._bar_is_old = False
        for name in ("ratio_median", "in_zone"):
            if (value := values.get(f"{self.prefix}/{name}")) is not None:
                self._try("showing in the progress bar", log_to_bar, pl_module, f"{self.prefix}_{name}", value)
        self._tell()

    def print(self, measurement: Measurement) -> None:
        """Print the table of a measurement."""
        if (text := self._try("printing", one_screen, measurement)) is not None:
            self._untold.append((text, False))
        self._tell()

    def draw(self, trainer: Trainer, index: int) -> None:
        """Draw the run; ``index`` is where loggers put the picture."""
        self.close()
        figure = None if self._journal is None else self._try("drawing", self._figure, self._journal)
        if figure is not None and self._journal is not None:
            if self._journal.path is not None:
                self._try("drawing", _save, figure, self._journal.path.with_suffix(".png"))
            for logger in self._loggers(trainer):
                what = f"sending the picture to {_name(logger)}"
                self._try(what, send_figure, logger, figure, f"{self.prefix}/heatmap", index)
        self._tell()

    def close(self) -> None:
        """Try a last time to write what the journal could not write."""
        if self._journal is not None:
            self._try("writing the journal", self._journal.close)
        self._tell()

    def _loggers(self, trainer: Trainer) -> Sequence[Logger]:
        return self._try("finding the loggers", lambda: list(trainer.loggers)) or ()

    def _figure(self, journal: Journal) -> Figure | None:
        history = history_of(journal.lines())
        if not history.measurements:  # all of them have failed
            return None
        try:
            return history.plot_heatmap()
        except ModuleNotFoundError as error:
            self._untold.append((f"SpectralMonitor: no heatmap; {error}", False))
            return None

    def _try(self, what: str, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Do one thing that may fail, and is told then, the first time."""
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                why = f"{type(error).__name__}: {error}"
                self._untold.append((f"SpectralMonitor failed in {what} ({why}); training goes on", True))
            return None

    def _tell(self) -> None:
        """Say what is to be said, behind all else: where warnings are errors, the first one raises."""
        news = () if self._journal is None else self._journal.take_news()
        told = [(f"SpectralMonitor: {item.text}", item.grave) for item in news] + self._untold
        self._untold = []
        for text, grave in told:
            (rank_zero_warn if grave else rank_zero_info)(text)


def _append(journal: Journal, measurement: Measurement, events: Sequence[Event], actions: Sequence[Action]) -> None:
    told = [asdict(event) for event in events]
    journal.append(measurement, told + [described_action(action, measurement) for action in actions])


def _publish(trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
    names = {**values, **{key.replace("/", "_"): value for key, value in values.items() if key.count("/") == 1}}
    trainer.callback_metrics.update(
        {name: torch.tensor(value, device=pl_module.device) for name, value in names.items()}
    )


def _log(logger: Logger, series: Series) -> None:
    logger.log_metrics(dict(series.values), step=series.batches)  # a copy: a logger may change it


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace(path, picture.getvalue())


def _name(logger: Any) -> str:
    return type(logger).__name__


def _folder(logger: Logger) -> Path | None:
    """Return the folder of this run on this machine, ``None`` where the logger has none."""
    folder, shared = getattr(logger, "log_dir", None), getattr(logger, "save_dir", None)
    if folder is None and shared is not None:
        # All runs of such a logger share one folder; ModelCheckpoint keeps them apart in the same way.
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(shared, str(logger.name), version)
    return None if folder is None or re.match(r"\w[\w+.-]+:/", str(folder)) else Path(folder)  # no s3://

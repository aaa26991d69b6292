"""Where a measurement goes: loggers, other callbacks, the journal, the progress bar, the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_spectral.alarms import Event
from lightning_spectral.control.actions import described_action
from lightning_spectral.control.law import Action
from lightning_spectral.journal import Journal
from lightning_spectral.monitor.framework import rank_zero_info, rank_zero_warn
from lightning_spectral.records import Measurement
from lightning_spectral.report import heatmap, send_figure
from lightning_spectral.series import Series

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Outlets"]


class Outlets:
    """The outlets of one call of fit.

    Args:
        prefix: First part of every key and file name.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._journal: Journal | None = None
        self._bar_is_old = False  # the progress bar shows an older measurement

    def open(self, trainer: Trainer, header: Mapping[str, Any], resume_step: int | None) -> None:
        """Begin the journal, or go on with it, where this process writes one (see :class:`Journal`)."""
        if trainer.is_global_zero and trainer.loggers:
            folder = _run_folder(trainer)
            path = None if folder is None else folder / f"{self.prefix}.jsonl"
            self._journal = Journal(path, header, resume_step=resume_step)

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
        self.publish(trainer, pl_module, series.values)
        for logger in trainer.loggers:
            logger.log_metrics(series.values, step=series.batches)
        if self._journal is not None:
            told = [asdict(event) for event in events]
            self._journal.append(measurement, told + [described_action(action, measurement) for action in actions])
        for event in events:
            (rank_zero_info if event.level == "info" else rank_zero_warn)(event.message)

    def publish(self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        """Put values where other callbacks look for them. On all ranks: reading them may be a collective."""
        names = {**values, **{key.replace("/", "_"): value for key, value in values.items() if key.count("/") == 1}}
        trainer.callback_metrics.update(
            {name: torch.tensor(value, device=pl_module.device) for name, value in names.items()}
        )

    def show(self, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        """Put two new numbers into the progress bar; `self.log` may do so only within a batch."""
        if not self._bar_is_old:
            return
        self._bar_is_old = False
        for name in ("ratio_median", "in_zone"):
            if (value := values.get(f"{self.prefix}/{name}")) is not None:
                pl_module.log(f"{self.prefix}_{name}", value, prog_bar=True, logger=False, batch_size=1)

    def draw(self, trainer: Trainer, index: int) -> None:
        """Draw the run; ``index`` is where loggers put the picture."""
        if self._journal is None:
            return
        records = self._journal.records()
        if not records:  # every measurement has failed
            return
        try:
            figure = heatmap(records)
        except ModuleNotFoundError as error:
            rank_zero_info(f"SpectralMonitor: no heatmap; {error}")
            return
        if self._journal.path is not None:
            figure.savefig(self._journal.path.with_suffix(".png"))
        for logger in trainer.loggers:
            send_figure(logger, figure, f"{self.prefix}/heatmap", index)


def _run_folder(trainer: Trainer) -> Path | None:
    """Return the folder of this run on this machine, ``None`` where there is none. Only rank zero writes there."""
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    folder = logger.log_dir
    if folder is None and logger.save_dir is not None:
        # All runs of such a logger share one folder; ModelCheckpoint keeps them apart in the same way.
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = f"{logger.save_dir}/{logger.name}/{version}"
    return None if folder is None or "://" in folder else Path(folder)

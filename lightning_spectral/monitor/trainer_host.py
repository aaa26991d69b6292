"""Lightning's Trainer as the core of a watched run sees it, and the places that it has for numbers."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.alarms import Event
from lightning_spectral.monitor.strategies import outermost, will_shard
from lightning_spectral.pages import send_event, send_figure
from lightning_spectral.records.text import writable
from lightning_spectral.runs.durable import link
from lightning_spectral.runs.series import Series
from lightning_spectral.watch.options import Options
from lightning_spectral.watch.outlets import Outlet
from lightning_spectral.watch.search import trained_parameters

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure

__all__ = ["LightningHost"]


class LightningHost:
    """One call of fit. :class:`~lightning_spectral.watch.host.Host` says what each member is for.

    Steps are those that the Trainer counts or, where the series says that the run takes others, batches.

    Args:
        trainer: The Trainer.
        pl_module: The module that it trains.
        series: Remembers what counts.
        options: The settings of the monitor.
        progress_bar: Whether the progress bar gets a number.
    """

    name = "SpectralMonitor"

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, series: Series, options: Options, *, progress_bar: bool
    ) -> None:
        self._trainer, self._module, self._series, self._options = trainer, pl_module, series, options
        self._in_bar = progress_bar
        self._counted = trainer.global_step
        self._uncounted = 0  # batches since the Trainer has counted a step

    @property
    def model(self) -> LightningModule:
        """The module."""
        return self._module

    @property
    def weights(self) -> nn.Module:
        """The module, or what the strategy has put around it to cut its weights."""
        return outermost(self._trainer.strategy, self._module)

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """Those of the Trainer."""
        return self._trainer.optimizers

    @property
    def processes(self) -> tuple[int, int]:
        """The rank, and the size of the world."""
        return self._trainer.global_rank, self._trainer.world_size

    @property
    def rehearses(self) -> bool:
        """Whether it is a ``fast_dev_run``."""
        return bool(self._trainer.fast_dev_run)  # type: ignore[attr-defined]  # public, but not declared

    @property
    def shards(self) -> bool:
        """Whether the strategy shards weights."""
        return will_shard(self._trainer.strategy)

    @property
    def by_hand(self) -> bool:
        """Whether the module optimizes by hand."""
        return not self._module.automatic_optimization

    def counted(self) -> int:
        """Return ``global_step``."""
        return self._trainer.global_step

    def now(self, *, done: int = 0) -> int:
        """Return ``global_step``, or the number of batches."""
        step = self._trainer.global_step
        return max(step, self.index(done=done)) if self._series.counts_batches else step

    def index(self, *, done: int = 0) -> int:
        """Return the index at which Lightning logs the next batch, which at the end of a batch it has not counted."""
        loop = self._trainer.fit_loop.epoch_loop
        stepped: int = loop.on_save_checkpoint().get("_batches_that_stepped", self._trainer.global_step)
        return stepped + done

    def end_batch(self) -> None:
        """Count batches by hand without a step: its optimizer may be called by another name than ``step``."""
        if self._trainer.global_step != self._counted or not self.by_hand:
            self._counted, self._uncounted = self._trainer.global_step, 0
        else:
            self._uncounted += 1

    def doubtful(self, every_n_steps: int) -> bool:
        """Whether it is time to see if weights change without a step: behind the first such batch, and now and then."""
        waits = self._uncounted > 1 and self._uncounted % every_n_steps
        return bool(self._uncounted) and not self._series.counts_batches and not waits

    def trained(self) -> Sequence[Tensor]:
        """Return what the optimizers hold of the module."""
        return trained_parameters(self._module, self._trainer.optimizers)

    def outlets(self) -> Sequence[Outlet]:
        """Return the metrics that callbacks see, the progress bar, and every logger."""
        bar = [_ProgressBar(self._trainer, self._options.prefix)] if self._in_bar else []
        return [_CallbackMetrics(self._trainer, self._module), *bar, *map(_Logger, self._trainer.loggers)]

    def answer(self, failure: Event) -> None:
        """Stop the Trainer, or call the function of the user."""
        if callable(self._options.on_alarm):
            self._options.on_alarm(self._trainer, self._module, failure)
        elif self._options.on_alarm == "stop":
            self._trainer.should_stop = True

    def save(self, path: Path) -> None:
        """Save a checkpoint, and link those that the Trainer's callbacks have saved, and may delete, beside it."""
        if self._trainer.is_global_zero:
            for earlier in _saved(self._trainer):
                link(earlier, path.with_name("earlier") / earlier.name)
        self._trainer.save_checkpoint(path)


def _saved(trainer: Trainer) -> list[Path]:
    """Return the checkpoints on this machine that callbacks of a Trainer have saved and remember."""
    paths: set[str] = set()
    for callback in trainer.checkpoint_callbacks:
        kept = getattr(callback, "best_k_models", {})
        paths |= {*kept, *(getattr(callback, name, "") for name in ("best_model_path", "last_model_path"))}
    return sorted(path for path in map(Path, filter(None, paths)) if path.exists())


class _CallbackMetrics(Outlet):
    """What other callbacks look at."""

    name = "callback_metrics"

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer, self._module = trainer, pl_module

    def publish(self, values: Mapping[str, float]) -> None:
        asked = _texts(self._trainer)
        names = dict(values)
        for key, value in values.items():  # a slash in the name of a checkpoint would make a folder
            if any((flat := key.replace("/", "_")) in text for text in asked):
                names[flat] = value
        self._trainer.callback_metrics.update(
            {name: torch.tensor(value, device=self._module.device) for name, value in names.items()}
        )


def _texts(trainer: Trainer) -> list[str]:
    """Return the texts in which a user may have named a metric: what callbacks and schedulers monitor, file names."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not declared
    settings = [value for callback in callbacks for value in vars(callback).values()]
    settings += [scheduler.monitor for scheduler in trainer.lr_scheduler_configs]
    return [value for value in settings if isinstance(value, str)]


class _ProgressBar(Outlet):
    """The progress bar, which has one short number: the median of the ratios."""

    name = "the progress bar"

    def __init__(self, trainer: Trainer, prefix: str) -> None:
        self._trainer, self._prefix = trainer, prefix

    def show(self, values: Mapping[str, float]) -> None:
        if (value := values.get(f"{self._prefix}/ratio_median")) is not None:
            symbol = writable("ρ", sys.stdout, "rho")
            name = symbol if self._prefix == "spectral" else f"{self._prefix} {symbol}"
            self._trainer.progress_bar_metrics[name] = value  # past `log`, which would make a metric of it


class _Logger(Outlet):
    """A logger of Lightning."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    @property
    def name(self) -> str:
        return type(self._logger).__name__

    def folder(self) -> Path | None:
        folder, shared = getattr(self._logger, "log_dir", None), getattr(self._logger, "save_dir", None)
        if folder is None and shared is not None:
            # All runs of such a logger share one folder; ModelCheckpoint keeps them apart in the same way.
            own = self._logger.version
            folder = Path(shared, str(self._logger.name), own if isinstance(own, str) else f"version_{own}")
        return None if folder is None or re.match(r"\w[\w+.-]+:/", str(folder)) else Path(folder)  # no s3://

    def log(self, values: dict[str, float], index: int) -> None:
        self._logger.log_metrics(values, step=index)

    def announce(self, event: Event, key: str, index: int) -> None:
        send_event(self._logger, event, key, index)

    def picture(self, figure: Figure, key: str, index: int) -> None:
        send_figure(self._logger, figure, key, index)

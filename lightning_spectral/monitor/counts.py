"""How far a run has come: the step that a measurement is labelled with, and the index that loggers put it at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_spectral.runs.series import Series

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Steps"]


class Steps:
    """The steps of a run: those that its Trainer counts or, where it takes others, its batches.

    Args:
        trainer: The trainer.
        pl_module: The module that it trains.
        series: Remembers what counts.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, series: Series) -> None:
        self._trainer, self._module, self._series = trainer, pl_module, series
        self.counted = trainer.global_step
        self.uncounted = 0  # batches since the Trainer has counted a step

    def now(self, *, done: int = 0) -> int:
        """Return the step that the run has come to; ``done`` is 1 at the end of a batch."""
        step = self._trainer.global_step
        return max(step, self.index(done=done)) if self._series.counts_batches else step

    def index(self, *, done: int = 0) -> int:
        """Return the index at which Lightning logs the next batch, which at the end of a batch it has not counted."""
        loop = self._trainer.fit_loop.epoch_loop
        stepped: int = loop.on_save_checkpoint().get("_batches_that_stepped", self._trainer.global_step)
        return stepped + done

    def end_batch(self) -> None:
        """Count batches by hand without a step: its optimizer may be called by another name than ``step``."""
        if self._trainer.global_step != self.counted or self._module.automatic_optimization:
            self.counted, self.uncounted = self._trainer.global_step, 0
        else:
            self.uncounted += 1

    def doubtful(self, every_n_steps: int) -> bool:
        """Whether it is time to see if weights change without a step: behind the first such batch, and now and then."""
        waits = self.uncounted > 1 and self.uncounted % every_n_steps
        return bool(self.uncounted) and not self._series.counts_batches and not waits

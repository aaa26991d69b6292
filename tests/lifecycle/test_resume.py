"""Runs that were stopped in the middle of an epoch, killed or broken, and go on as if they had not been."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same
from journals import read_actions, read_events, read_journal
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from steered import unbalanced
from tiny_run import CONTEXT, VOCABULARY, LitGPT, SaveAt
from torch import Tensor

from lightning_spectral import ResidualRescaler, SpectralMonitor

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")

STEPS, EPOCH = 14, 6


class Resumable:
    """Six batches an epoch, which remembers where it is, as loaders that can be resumed do."""

    def __init__(self) -> None:
        tokens = torch.randint(VOCABULARY, (EPOCH, 4, CONTEXT), generator=torch.Generator().manual_seed(7))
        self.batches, self.next = [*tokens], 0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[Tensor]:
        while self.next < EPOCH:
            self.next += 1
            yield self.batches[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


SETTINGS: dict[str, dict[str, Any]] = {
    "watch": {"geometry": True},
    "signals": {"signals": ("change", "stable_rank", "alignment", "logit_bound")},
    "steer": {"auto_rescale": ResidualRescaler(patience=2, warmup_steps=2)},
    "steer alone": {"auto_rescale": ResidualRescaler(patience=2, learnable=False)},
}


def trained(folder: Path, name: str, *others: Callback, ckpt_path: Path | None = None) -> LitGPT:
    module = unbalanced()
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[SpectralMonitor(3, **SETTINGS[name], per_layer=True, on_error="raise"), *others],
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(other, Checkpoint) for other in others),
    )
    trainer.fit(module, Resumable(), [], ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return module


def lines(folder: Path, after: int = -1) -> list[dict[str, Any]]:
    """Return all that the journal says of later steps, but for the time it took."""
    path = folder / "spectral.jsonl"
    entries = [*read_journal(path)[1], *read_actions(path), *read_events(path)]
    hidden = ("seconds", "time")
    return [{key: entry[key] for key in entry if key not in hidden} for entry in entries if entry["step"] > after]


def assert_goes_on(straight: Path, resumed: Path, modules: tuple[LitGPT, LitGPT], step: int) -> None:
    assert_same(modules[0].state_dict(), modules[1].state_dict())
    assert modules[0].losses[step:] == modules[1].losses
    assert [entry["step"] for entry in lines(straight)][:6] == [0, 3, 6, 9, 12, 14]
    assert lines(straight, step) == lines(resumed, step)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_resumed_inside_an_epoch_is_bitwise_the_straight_run(tmp_path: Path, name: str):
    straight = trained(tmp_path / "straight", name)
    steps = (4, 9)
    trained(tmp_path / "stopped", name, *(SaveAt(tmp_path / f"{step}.ckpt", step) for step in steps))
    for step in steps:
        resumed = trained(tmp_path / f"from {step}", name, ckpt_path=tmp_path / f"{step}.ckpt")
        assert_goes_on(tmp_path / "straight", tmp_path / f"from {step}", (straight, resumed), step)
    steered = read_actions(tmp_path / "straight" / "spectral.jsonl")
    assert bool(steered) is name.startswith("steer")


class Broken(Callback):
    """Fails at one step, after or before the monitor has measured there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise OSError("the machine is gone")


class Killed(Broken):
    """Is told to end at one step, as by a scheduler."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Last(Callback):
    """Keeps what was saved when a run broke off, which `OnExceptionCheckpoint` does with a file for a crash only."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")


@pytest.mark.parametrize("name", ["watch", "steer"])
def test_a_run_that_was_told_to_end_goes_on_bitwise(tmp_path: Path, name: str):
    straight = trained(tmp_path / "straight", name)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException, match=r"^$"):
        trained(tmp_path, name, Killed(6), Last())
    assert signal.getsignal(signal.SIGTERM) == before
    assert [entry["step"] for entry in read_journal(tmp_path / "spectral.jsonl")[1]] == [0, 3, 6]
    resumed = trained(tmp_path, name, ckpt_path=tmp_path / "last.ckpt")
    assert_goes_on(tmp_path / "straight", tmp_path, (straight, resumed), 6)
    assert lines(tmp_path) == lines(tmp_path / "straight")  # the same file goes on, each step once


# Lightning looks for the file of an earlier crash, and finds none.
@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")
@pytest.mark.parametrize("name", ["watch", "steer"])
def test_a_checkpoint_of_a_crash_has_the_state_of_the_monitor(tmp_path: Path, name: str):
    """The exception comes to the monitor first, which lets go of the model, and then to the callback that saves."""
    straight = trained(tmp_path / "straight", name)
    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(OSError, match="the machine is gone"):
        trained(tmp_path / "crashed", name, Broken(7), saving)
    resumed = trained(tmp_path / "resumed", name, ckpt_path=Path(saving.ckpt_path))
    assert_goes_on(tmp_path / "straight", tmp_path / "resumed", (straight, resumed), 7)

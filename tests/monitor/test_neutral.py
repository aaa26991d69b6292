"""Watching changes nothing: a run with the monitor is bitwise the run without it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitwise import MODES, assert_same, everything, run
from journals import read_journal
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from restless import PickyRestless, Restless, fresh, outside
from tiny_run import PickyLitGPT, SaveAt, fit

from lightning_spectral import ResidualRescaler, SpectralMonitor

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


@pytest.mark.parametrize("mode", MODES)
def test_a_watched_run_is_bitwise_the_unwatched_run(tmp_path: Path, mode: str):
    alone = run(tmp_path / "alone", [], **MODES[mode])
    watched = run(tmp_path / "watched", [SpectralMonitor(every_n_steps=2, per_layer=True)], **MODES[mode])
    assert_same(alone, watched)
    assert (tmp_path / "watched" / "spectral.jsonl").exists()


def test_a_watched_resume_is_bitwise_the_unwatched_resume(tmp_path: Path):
    results = []
    for name, monitors in (("alone", []), ("watched", [SpectralMonitor(every_n_steps=3)])):
        folder = tmp_path / name
        saved = folder / "middle.ckpt"
        run(folder, [*monitors, SaveAt(saved, 5)])
        fresh = [SpectralMonitor(every_n_steps=3)] if monitors else []
        results.append(run(folder / "resumed", fresh, ckpt_path=str(saved), seed=2))
    assert_same(*results)


def test_a_checkpoint_of_a_watched_run_has_the_same_weights_by_the_same_names(tmp_path: Path):
    saved = []
    for name, monitors in (("alone", []), ("watched", [SpectralMonitor(every_n_steps=1)])):
        trainer = fit(tmp_path / name, monitors, shuffle=True)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        saved.append(torch.load(tmp_path / f"{name}.ckpt", weights_only=True))
    alone, watched = saved
    assert_same(alone["state_dict"], watched["state_dict"])
    assert_same(alone["optimizer_states"], watched["optimizer_states"])
    assert watched.keys() - alone.keys() <= {"callbacks"}


def test_waiting_for_the_first_forward_pass_changes_nothing_either(tmp_path: Path):
    results = []
    for monitors in ([], [SpectralMonitor(every_n_steps=2)]):
        seed_everything(0)
        module = PickyLitGPT(dropout=0.2)
        trainer = fit(tmp_path / str(len(monitors)), monitors, module=module, shuffle=True)
        results.append(everything(module, trainer))
    assert_same(*results)
    assert (tmp_path / "1" / "spectral.jsonl").exists()


def restless_run(folder: Path, kind: type[Restless], monitors: list[Any]) -> dict[str, Any]:
    """Train a module that keeps things in every place there is, and return all that is left."""
    module = fresh(kind)
    seed_everything(0)
    stopping = EarlyStopping("size", patience=99, check_on_train_epoch_end=True)
    fit(folder, [*monitors, stopping], module=module, shuffle=True, max_steps=6)
    rows = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()]
    wanted = [rows[0].index(name) for name in ("deep", "direct", "half", "kept", "size", "step", "train/loss")]
    return {
        "losses": module.losses,
        "state": {name: value for name, value in module.state_dict().items() if "residual_scale" not in name},
        "gradients": [p.grad for name, p in module.named_parameters() if "residual_scale" not in name],
        "outside": outside(),
        "curve": [[row[place] for place in wanted] for row in rows if any(row[place] for place in wanted[:-2])],
        "best": stopping.best_score,
        "streams": [torch.get_rng_state(), random.getstate(), np.random.get_state()],
    }


WAYS: dict[str, dict[str, Any]] = {
    "watched": {"per_layer": True},
    "steered": {"auto_rescale": ResidualRescaler(learnable=False)},
}


@pytest.mark.parametrize("kind", [Restless, PickyRestless])
def test_a_module_that_keeps_everything_trains_bitwise_alike(tmp_path: Path, kind: type[Restless]):
    """With generators, memories, counters, logs, hooks and globals; steered inside the safe zone as well."""
    alone = restless_run(tmp_path / "alone", kind, [])
    assert len(alone["curve"]) > 6
    for name, options in WAYS.items():
        if name == "steered" and kind is PickyRestless:
            continue  # blocks that are to be steered have to be found before the first batch
        monitor = SpectralMonitor(2, on_error="raise", **options)
        assert_same(alone, restless_run(tmp_path / name, kind, [monitor]))
        records = read_journal(tmp_path / name / "spectral.jsonl")[1]
        assert all(layer["ratio"] is not None for record in records for layer in record["layers"])

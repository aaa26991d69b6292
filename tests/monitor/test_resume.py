"""Checkpoints: a run that was stopped and resumed measures what the straight run measures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_journal
from lightning.pytorch.loggers import CSVLogger
from tiny_run import LitGPT, SaveAt, fit, loader

from lightning_spectral import SpectralMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]


def steps(folder: Path, name: str = "spectral.jsonl") -> list[int]:
    return [record["step"] for record in read_journal(folder / name)[1]]


def numbers(folder: Path) -> dict[int, list[tuple[float, float]]]:
    records = read_journal(folder / "spectral.jsonl")[1]
    return {
        record["step"]: [(layer["mlp_norm"], layer["attention_norm"]) for layer in record["layers"]]
        for record in records
    }


def interrupted(folder: Path, monitor: SpectralMonitor, step: int, **flags: Any) -> str:
    """Run to the end and return the checkpoint of a step in between, as after a crash some steps later."""
    fit(folder, [monitor, SaveAt(folder / "middle.ckpt", step)], **flags)
    return str(folder / "middle.ckpt")


@pytest.mark.parametrize("step", [2, 3, 5])
def test_the_schedule_and_the_numbers_after_a_resume_are_those_of_the_straight_run(tmp_path: Path, step: int):
    # One batch an epoch: Lightning begins an interrupted epoch anew, and here anew is the same.
    fit(tmp_path / "straight", SpectralMonitor(every_n_steps=3), batches=1)
    saved = interrupted(tmp_path / "stopped", SpectralMonitor(every_n_steps=3), step, batches=1)
    fit(tmp_path / "resumed", SpectralMonitor(every_n_steps=3), ckpt_path=saved, batches=1)
    assert steps(tmp_path / "straight") == [0, 3, 6, 8]
    assert steps(tmp_path / "resumed") == [s for s in (0, 3, 6, 8) if s >= step]  # what is due was not acted on yet
    straight, resumed = numbers(tmp_path / "straight"), numbers(tmp_path / "resumed")
    assert {s: straight[s] for s in resumed} == resumed


def test_resuming_in_the_same_folder_leaves_each_step_once(tmp_path: Path):
    saved = interrupted(tmp_path, SpectralMonitor(every_n_steps=2), 5)
    assert steps(tmp_path) == [0, 2, 4, 6, 8]
    fit(tmp_path, SpectralMonitor(every_n_steps=2), ckpt_path=saved, max_steps=10)
    assert steps(tmp_path) == [0, 2, 4, 6, 8, 10]


def test_a_new_run_in_an_old_folder_begins_a_new_file(tmp_path: Path):
    fit(tmp_path, SpectralMonitor(every_n_steps=2))
    fit(tmp_path, SpectralMonitor(every_n_steps=4))
    assert steps(tmp_path) == [0, 4, 8]


def test_another_linearization_never_continues_a_series(tmp_path: Path):
    saved = interrupted(tmp_path, SpectralMonitor(every_n_steps=2), 4)
    with pytest.warns(UserWarning, match="linearization.*circuit"):
        fit(tmp_path, SpectralMonitor(every_n_steps=2, linearization="paper"), ckpt_path=saved)
    assert read_journal(tmp_path / "spectral.jsonl")[0]["linearization"] == "paper"


def test_fitting_again_goes_on_where_the_first_fit_ended(tmp_path: Path):
    monitor = SpectralMonitor(every_n_steps=3)
    module = LitGPT()
    trainer = fit(tmp_path, monitor, module=module, max_steps=4)
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(module, loader(), loader())
    assert steps(tmp_path) == [0, 3, 4, 6, 9]


def test_one_monitor_can_watch_one_run_after_another(tmp_path: Path):
    monitor = SpectralMonitor(every_n_steps=4)
    for name in ("first", "second"):
        fit(tmp_path / name, monitor)
    assert steps(tmp_path / "second") == [0, 4, 8]
    assert numbers(tmp_path / "first").keys() == numbers(tmp_path / "second").keys()


def test_the_interval_may_change_on_resume(tmp_path: Path):
    saved = interrupted(tmp_path / "stopped", SpectralMonitor(every_n_steps=3), 5)
    fit(tmp_path / "resumed", SpectralMonitor(every_n_steps=1), ckpt_path=saved)
    assert steps(tmp_path / "resumed") == [5, 6, 7, 8]


def test_a_checkpoint_without_a_monitor_can_be_resumed_with_one(tmp_path: Path):
    fit(tmp_path / "alone", SaveAt(tmp_path / "middle.ckpt", 5))
    fit(tmp_path / "watched", SpectralMonitor(every_n_steps=2), ckpt_path=str(tmp_path / "middle.ckpt"))
    assert steps(tmp_path / "watched") == [5, 7, 8]


def test_a_checkpoint_with_a_monitor_can_be_resumed_without_one(tmp_path: Path):
    saved = interrupted(tmp_path / "stopped", SpectralMonitor(every_n_steps=3), 5)
    with pytest.warns(UserWarning, match="SpectralMonitor"):
        trainer = fit(tmp_path / "resumed", [], ckpt_path=saved)
    assert trainer.global_step == 8


def test_the_state_loads_with_weights_only_and_is_a_copy(tmp_path: Path):
    monitor = SpectralMonitor(every_n_steps=2)
    trainer = fit(tmp_path, monitor)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    assert state["measured_step"] == 8
    before = copy.deepcopy(monitor.state_dict())
    changed = monitor.state_dict()
    changed["memory"]["blocks"][0], changed["values"]["spectral/ratio_max"] = 99, 99.0
    assert str(monitor.state_dict()) == str(before)


def test_unknown_and_missing_keys_of_a_state_do_no_harm(tmp_path: Path):
    monitor = SpectralMonitor(every_n_steps=4)
    monitor.load_state_dict({"version": 99, "of_a_later_version": 1})
    fit(tmp_path, monitor)
    assert steps(tmp_path) == [0, 4, 8]


def test_restored_values_are_published_before_the_next_measurement(tmp_path: Path):
    saved = interrupted(tmp_path / "stopped", SpectralMonitor(every_n_steps=100), 5)
    trainer = fit(tmp_path / "resumed", SpectralMonitor(every_n_steps=100), ckpt_path=saved, limit_train_batches=1)
    assert "spectral/ratio_max" in trainer.callback_metrics


def test_monitors_of_other_settings_have_other_keys():
    keys = {
        SpectralMonitor().state_key,
        SpectralMonitor(linearization="paper").state_key,
        SpectralMonitor(prefix="other").state_key,
    }
    assert len(keys) == 3
    assert SpectralMonitor(10).state_key == SpectralMonitor(20).state_key


def test_a_checkpoint_of_the_csv_logger_is_not_needed(tmp_path: Path):
    saved = interrupted(tmp_path, SpectralMonitor(every_n_steps=2), 5, logger=False)
    fit(tmp_path / "resumed", SpectralMonitor(every_n_steps=2), ckpt_path=saved, logger=CSVLogger(tmp_path / "resumed"))
    assert steps(tmp_path / "resumed" / "lightning_logs" / "version_0") == [6, 8]

"""What the monitor writes, when, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_journal
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from processes import PYTHONPATH
from recorder import Recorder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import BLOCKS, Block, LitGPT, PickyLitGPT, fit, loader
from torch import Tensor, nn

from lightning_spectral import History, RandomizedSVD, SpectralMonitor, find_blocks
from lightning_spectral.errors import BlocksNotFoundError, ConfigurationError, ExampleInputError
from lightning_spectral.watch import outlets

SUMMARY = {
    "spectral/ratio_min",
    "spectral/ratio_median",
    "spectral/ratio_max",
    "spectral/in_zone",
    "spectral/mlp_norm_max",
    "spectral/attention_norm_max",
    "spectral_health/unmeasured",
    "spectral_health/seconds",
    "spectral_health/drifting",
    "spectral_health/alarm",
}
OF_BATCH = {  # where a batch was looked at: for all but the last weights
    "spectral/token_residual_min",
    "spectral/effective_rank_min",
    "spectral/sample_residual_min",
    "spectral/attention_logit_max",
    "spectral/output_residual",
}


def journal_steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_journal(folder / "spectral.jsonl")[1]]


# When it measures


@pytest.mark.parametrize(
    ("every", "flags", "expected"),
    [
        (3, {}, [0, 3, 6, 8]),
        (4, {}, [0, 4, 8]),
        (1, {"max_steps": 3}, [0, 1, 2, 3]),
        (100, {}, [0, 8]),
        (2, {"accumulate_grad_batches": 2, "max_steps": 5}, [0, 2, 4, 5]),
        (3, {"max_epochs": 1, "max_steps": -1}, [0, 3, 4]),
        (3, {"validate": True, "num_sanity_val_steps": 2}, [0, 3, 6, 8]),
    ],
)
def test_it_measures_first_on_schedule_and_last(tmp_path: Path, every: int, flags: dict[str, Any], expected: list[int]):
    fit(tmp_path, SpectralMonitor(every_n_steps=every), **flags)
    assert journal_steps(tmp_path) == expected


class TwoOptimizers(LitGPT):
    """Steps two optimizers a batch, so that the optimizer step counts double."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        half = len(parameters := list(self.parameters())) // 2
        return [torch.optim.SGD(part, lr=0.1) for part in (parameters[:half], parameters[half:])]


def test_with_two_optimizers_the_schedule_counts_steps_and_the_axis_batches(tmp_path: Path):
    recorder = Recorder()
    fit(tmp_path, SpectralMonitor(every_n_steps=5), module=TwoOptimizers(), logger=recorder, max_steps=16)
    assert [step for step, _ in recorder.measured] == [0, 3, 6, 8]  # optimizer steps 0, 6, 12, 16


def test_curves_share_the_axis_of_the_loss(tmp_path: Path):
    """Index k holds the loss of the k-th batch and the norms of the weights that it was computed with."""
    recorder = Recorder()
    fit(tmp_path, SpectralMonitor(every_n_steps=1), logger=recorder, max_steps=4)
    losses = [step for step, values in recorder.calls if "train/loss" in values]
    assert losses == [0, 1, 2, 3]
    assert [step for step, _ in recorder.measured] == [0, 1, 2, 3, 4]


# What it writes


def test_every_summary_key_is_there_from_the_first_call_on(tmp_path: Path):
    recorder = Recorder()
    fit(tmp_path, SpectralMonitor(every_n_steps=4), logger=recorder)
    *earlier, (_, last) = recorder.measured
    assert all(values.keys() == SUMMARY | OF_BATCH for _, values in earlier)
    assert last.keys() == SUMMARY
    first = recorder.measured[0][1]
    assert first["spectral/ratio_min"] <= first["spectral/ratio_median"] <= first["spectral/ratio_max"]
    assert first["spectral_health/unmeasured"] == 0
    assert first["spectral_health/seconds"] > 0


def test_per_layer_adds_the_numbers_of_every_block(tmp_path: Path):
    recorder = Recorder()
    fit(tmp_path, SpectralMonitor(every_n_steps=4, per_layer=True), logger=recorder)
    values = recorder.measured[0][1]
    quantities = ("ratio", "mlp_norm", "attention_norm", "token_residual", "effective_rank", "update_ratio")
    names = {f"spectral_blocks/{name}/{i:02d}" for name in quantities for i in range(BLOCKS)}
    assert values.keys() == SUMMARY | OF_BATCH | names
    assert math.isclose(
        values["spectral_blocks/ratio/01"],
        values["spectral_blocks/mlp_norm/01"] / values["spectral_blocks/attention_norm/01"],
    )


def test_the_prefix_stands_in_front_of_every_key_and_file(tmp_path: Path):
    trainer = fit(tmp_path, SpectralMonitor(every_n_steps=4, prefix="other"))
    assert "other/ratio_max" in trainer.callback_metrics
    assert (tmp_path / "other.jsonl").exists()
    assert (tmp_path / "other.png").exists()


def test_the_csv_file_has_one_header_and_all_values(tmp_path: Path):
    fit(tmp_path, SpectralMonitor(every_n_steps=4))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["spectral/ratio_max"]]
    assert [int(row["step"]) for row in rows] == [0, 4, 8]


def test_tensorboard_gets_scalars_and_the_heatmap(tmp_path: Path):
    fit(tmp_path, SpectralMonitor(every_n_steps=4), logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("spectral/ratio_max")] == [0, 4, 8]
    assert [event.step for event in events.Images("spectral/heatmap")] == [8]


def test_every_logger_gets_everything_it_can_take(tmp_path: Path):
    first, second = Recorder(), Recorder()
    fit(tmp_path, SpectralMonitor(every_n_steps=4), logger=[first, CSVLogger(tmp_path, name=""), second])
    assert first.measured == second.measured
    assert first.pictures == second.pictures == [("spectral/heatmap", 8)]


def test_the_journal_describes_the_run_and_holds_every_block_of_every_measurement(tmp_path: Path):
    fit(tmp_path, SpectralMonitor(every_n_steps=4))
    header, records = read_journal(tmp_path / "spectral.jsonl")
    assert header["linearization"] == "circuit"
    assert header["every_n_steps"] == 4
    assert [block["name"] for block in header["blocks"]] == [f"model.blocks.{i}" for i in range(BLOCKS)]
    assert header["blocks"][0]["attention"]
    assert all(len(record["layers"]) == BLOCKS for record in records)
    assert all(json.loads(line) for line in (tmp_path / "spectral.jsonl").read_text().splitlines())


def test_files_of_a_logger_with_a_shared_folder_are_kept_apart(tmp_path: Path):
    recorder = Recorder()
    recorder.save_dir = str(tmp_path)
    fit(tmp_path, SpectralMonitor(every_n_steps=4), logger=recorder)
    assert (tmp_path / "recorder" / "0" / "spectral.jsonl").exists()


class OnPlateau(LitGPT):
    """Lowers its learning rate by what the monitor measures."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "spectral_in_zone"}}


def test_other_callbacks_can_monitor_a_key_on_the_first_day(tmp_path: Path):
    save = ModelCheckpoint(
        tmp_path, monitor="spectral_ratio_max", every_n_train_steps=1, filename="{step}-{spectral_ratio_max:.2f}"
    )
    stop = EarlyStopping(monitor="spectral/ratio_max", check_on_train_epoch_end=True, patience=100)
    callbacks = [SpectralMonitor(every_n_steps=100), stop, save]
    trainer = fit(tmp_path, callbacks, module=OnPlateau(), enable_checkpointing=True)
    assert trainer.callback_metrics.keys() - {"train/loss"} == SUMMARY | OF_BATCH | {
        "spectral_ratio_max",  # named by a callback
        "spectral_in_zone",  # named by a scheduler
    }
    assert not [path for path in tmp_path.rglob("*.ckpt") if path.parent != tmp_path]
    assert save.best_model_score == pytest.approx(float(save.best_model_score))


@pytest.mark.parametrize(("rate", "steps"), [(1e-3, 24), (0.0, 8)])
@pytest.mark.filterwarnings("ignore:.*FAILURE at step")
def test_early_stopping_as_the_page_on_keys_shows_it_stops_a_failure_and_no_healthy_run(
    tmp_path: Path, rate: float, steps: int
):
    page = (Path(__file__).parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")
    (call,) = re.findall(r"^stop = (EarlyStopping\(.*\))$", page, re.MULTILINE)
    stop = eval(call, {"EarlyStopping": EarlyStopping})
    trainer = fit(tmp_path, [SpectralMonitor(every_n_steps=2), stop], module=LitGPT(learning_rate=rate), max_steps=24)
    assert trainer.global_step == steps


@pytest.mark.parametrize(
    ("settings", "encoding", "expected"),
    [
        ({}, "utf-8", {"ρ"}),
        ({}, "ascii", {"rho"}),
        ({"prefix": "paper"}, "utf-8", {"paper ρ"}),
        ({"progress_bar": False}, "utf-8", set()),
    ],
)
def test_the_progress_bar_shows_one_number(
    tmp_path: Path, settings: dict[str, Any], encoding: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    class Bar(TQDMProgressBar):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            self.seen |= self.get_metrics(trainer, trainer.lightning_module).keys()

    bar = Bar()
    monitor = SpectralMonitor(every_n_steps=100, **settings)
    trainer = fit(tmp_path, [monitor, bar], enable_progress_bar=True, max_steps=1)
    assert {name for name in bar.seen if "ρ" in name or "rho" in name or "ratio" in name} == expected
    assert not expected & trainer.callback_metrics.keys()  # it is no metric
    assert ("progress_bar=False" in repr(monitor)) == (not expected)


# What it says


class Blow(Callback):
    """Multiplies a weight at one step."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.model.blocks[1].mlp[2].weight.mul_(self.factor)


def console(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package has said."""
    return [record.getMessage() for record in caplog.records if record.name == "lightning_spectral"]


def tables(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in console(caplog) if text.startswith("spectral ratio")]


@pytest.mark.parametrize("verbose", [True, False])
def test_leaving_and_re_entering_the_zone_is_noted_and_said_if_asked(
    tmp_path: Path, verbose: bool, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    module = LitGPT(learning_rate=0.0)
    monitor = SpectralMonitor(every_n_steps=1, safe_zone=(0.01, 20.0), verbose=verbose)
    fit(tmp_path, [Blow(3, 1000.0), Blow(6, 0.001), monitor], module=module)
    noted = [event.message for event in History.read(tmp_path).events]
    assert [text.partition(":")[0] for text in noted] == ["step 3", "step 6"]
    assert "block 1 (model.blocks.1) is above the safe zone at" in noted[0]
    assert "block 1 (model.blocks.1) is back in the safe zone at" in noted[1]
    assert [text for text in console(caplog) if "outside is information" in text] == [
        f"SpectralMonitor, {text}" for text in noted if verbose
    ]


def test_the_console_has_a_line_at_the_start_and_a_table_and_the_place_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "my run"
    fit(folder, SpectralMonitor(every_n_steps=1, safe_zone=(1e-6, 1e6)))
    start, table, place = console(caplog)
    assert start == f"SpectralMonitor: {BLOCKS} blocks, all verified, measured every step"
    assert "step 8" in table
    assert [f"model.blocks.{i}" in table for i in range(BLOCKS)] == [True] * BLOCKS
    assert f"{BLOCKS} of {BLOCKS} blocks inside the safe zone" in table
    assert place.splitlines() == [
        f"SpectralMonitor: files are in {folder}, and this makes a page of them:",
        f"lightning-spectral report '{folder}'",
    ]


class Ending(Callback):
    """Ends a run in its third batch."""

    def __init__(self, exception: BaseException) -> None:
        self.exception = exception

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            raise self.exception


@pytest.mark.parametrize("exception", [ArithmeticError("gone"), KeyboardInterrupt(), SIGTERMException()], ids=repr)
def test_a_run_that_breaks_off_leaves_the_table_the_picture_and_the_place(
    tmp_path: Path, exception: BaseException, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    handler = signal.getsignal(signal.SIGINT)
    recorder = Recorder()
    recorder.save_dir = str(tmp_path)
    try:
        with pytest.raises(BaseException, match=r"gone|^1$|^$") as raised:
            fit(tmp_path, [SpectralMonitor(2, prefix="mine"), Ending(exception)], logger=recorder)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning switches it off
    assert isinstance(raised.value, ArithmeticError | SystemExit)
    (table,) = tables(caplog)
    assert "step 2" in table
    run = tmp_path / "recorder" / "0" / "mine.jsonl"
    assert console(caplog)[-1].endswith(f"lightning-spectral report {run}")
    assert History.read(run).steps == (0, 2)
    assert run.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert recorder.pictures == [("mine/heatmap", 2)]


@pytest.mark.parametrize(("share", "drawn"), [(1e9, [0, 2, 4, 4]), (1e-9, [0, 4])])
def test_the_picture_is_drawn_as_the_run_goes_for_a_small_share_of_its_time(
    tmp_path: Path, share: float, drawn: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outlets, "PAUSE", 0.0)
    monkeypatch.setattr(outlets, "SHARE", share)
    recorder = Recorder()
    fit(tmp_path, SpectralMonitor(2), logger=recorder, max_steps=4)
    assert recorder.pictures == [("spectral/heatmap", step) for step in drawn]


class Mixing(Block):
    """A block without attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


def test_a_run_without_anything_to_compare_is_warned_of_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    module = LitGPT()
    module.model.blocks = nn.ModuleList(Mixing(dropout=0.0) for _ in range(BLOCKS))
    fit(tmp_path, SpectralMonitor(4), module=module, max_steps=1)
    (warned,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == (
        f"SpectralMonitor: {BLOCKS} blocks, none with a spectral ratio, so there is nothing to compare "
        "(block 0 (model.blocks.0): attention: the block has none)"
    )
    assert not any("measured every" in text for text in console(caplog))


class Projecting(Block):
    """A block that multiplies the stream itself, which no branch does."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.into = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.into(x))


def test_blocks_that_are_not_verified_are_told_at_the_start_in_the_table_and_in_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    module = LitGPT()
    module.model.blocks = nn.ModuleList(Projecting() for _ in range(BLOCKS))
    fit(tmp_path, SpectralMonitor(1), module=module, max_steps=1)
    (table,) = tables(caplog)
    (told,) = (record.getMessage() for record in caplog.records if "not verified, so" in record.getMessage())
    assert table.count("not verified: ") == BLOCKS
    assert told.startswith(f"SpectralMonitor: {BLOCKS} of {BLOCKS} blocks are not verified, so their numbers may be wr")
    header, records = read_journal(tmp_path / "spectral.jsonl")
    assert [block["verified"] for block in header["blocks"]] == [False] * BLOCKS
    assert all("something is left of the operation 'addmm'" in layer["doubt"] for layer in records[0]["layers"])


class Decoding(nn.Module):
    """Two convolutions around a shortcut, and a nonlinearity on the sum: what a U-Net puts behind its Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv1d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x + self.two(self.one(x.mT).relu()).mT)


def test_no_number_is_doubted_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    module = LitGPT()
    module.model.blocks = nn.ModuleList([*module.model.blocks, Decoding(), Decoding()])
    fit(tmp_path, SpectralMonitor(1), module=module, max_steps=1)
    _, records = read_journal(tmp_path / "spectral.jsonl")
    assert [layer["doubt"] is None for layer in records[0]["layers"]] == [True] * BLOCKS + [False] * 2
    said = [record.getMessage() for record in caplog.records]
    assert any(f"{BLOCKS + 2} blocks, {BLOCKS} with a ratio, {BLOCKS} verified" in line for line in said)
    assert not any("may be wrong" in line for line in said)


# Flags of the Trainer


def test_fast_dev_run_measures_once_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trainer = fit(tmp_path, SpectralMonitor(every_n_steps=1), fast_dev_run=3, logger=True)
    assert "spectral/ratio_max" in trainer.callback_metrics
    assert not list(tmp_path.rglob("*spectral*"))


def test_barebones_switches_it_off_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    trainer = Trainer(barebones=True, max_steps=2, callbacks=SpectralMonitor(), accelerator="cpu")
    with pytest.warns(UserWarning, match=r"barebones=True\)` is configured"):
        trainer.fit(LitGPT(), loader(), loader())
    assert [record.getMessage() for record in caplog.records if "SpectralMonitor" in record.getMessage()] == [
        "SpectralMonitor is off, because the Trainer is barebones"
    ]


def test_without_a_logger_logs_and_files_are_lost_and_the_first_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    trainer = fit(tmp_path, SpectralMonitor(every_n_steps=2), logger=False)
    assert "spectral/ratio_max" in trainer.callback_metrics
    assert not list(tmp_path.rglob("*spectral*"))
    said = "measured every 2 steps; no file is written, because the run has no folder"
    assert any(text.endswith(said) for text in console(caplog))


@pytest.mark.parametrize("flags", [{"limit_train_batches": 0}, {"max_steps": 0}, {"overfit_batches": 1}])
@pytest.mark.filterwarnings("ignore:.*overfit_batches|.*max_steps=0")
def test_odd_lengths_do_not_fail(tmp_path: Path, flags: dict[str, Any]):
    assert fit(tmp_path, SpectralMonitor(every_n_steps=2), **flags).state.finished


def test_validating_testing_and_predicting_measure_nothing(tmp_path: Path):
    recorder = Recorder()
    trainer = Trainer(
        callbacks=SpectralMonitor(),
        logger=recorder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    module = LitGPT()
    module.test_step = module.validation_step  # type: ignore[assignment]
    module.predict_step = lambda batch, batch_idx: module(batch)  # type: ignore[assignment]
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    trainer.predict(module, loader())
    assert recorder.measured == []


# Finding the blocks


def test_a_model_that_no_input_can_be_guessed_for_is_measured_after_its_first_batch(tmp_path: Path):
    module = PickyLitGPT()
    fit(tmp_path, SpectralMonitor(every_n_steps=3), module=module)
    assert journal_steps(tmp_path) == [1, 4, 7, 8]
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_blocks_and_hints_can_be_given(tmp_path: Path):
    module = LitGPT()
    blocks = find_blocks(module, batch=torch.zeros(1, 4, dtype=torch.long))
    fit(tmp_path, SpectralMonitor(every_n_steps=4, blocks=blocks[:2]), module=module)
    _, records = read_journal(tmp_path / "spectral.jsonl")
    assert [layer["name"] for layer in records[0]["layers"]] == ["model.blocks.0", "model.blocks.1"]


class Nothing(LitGPT):
    """A model without a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32))  # type: ignore[assignment]


def test_a_model_without_blocks_is_refused_before_the_first_step(tmp_path: Path):
    module = Nothing()
    with pytest.raises(BlocksNotFoundError, match="hints"):
        fit(tmp_path, SpectralMonitor(), module=module)
    assert module.losses == []


class Loose(PickyLitGPT):
    """Calls neither itself nor a child."""

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.head.weight.mean()


def test_a_model_that_is_never_called_is_refused_after_the_first_batch(tmp_path: Path):
    module = Loose()
    with pytest.raises(ExampleInputError, match="example_input_array"):
        fit(tmp_path, SpectralMonitor(), module=module)
    assert not any(part._forward_pre_hooks for part in module.modules())


# Failures


class FailingSolver:
    """Fails at some of its calls; with one measurement a step, these are the steps."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.count, self.solver = calls, -1, RandomizedSVD()

    def init(self, operators: Sequence[Any]) -> Any:
        return self.solver.init(operators)

    def compute(self, operators: Sequence[Any], state: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise OSError("the disk is full")
        return self.solver.compute(operators, state)


def test_a_failure_is_told_and_training_goes_on(tmp_path: Path):
    recorder = Recorder()
    with pytest.warns(UserWarning, match=r"failed in measuring \(OSError: the disk is full\); training goes on"):
        trainer = fit(tmp_path, SpectralMonitor(1, solver=FailingSolver({2, 5})), logger=recorder)
    assert trainer.global_step == 8
    assert [step for step, _ in recorder.measured] == [0, 1, 3, 4, 6, 7, 8]


def test_three_failures_in_a_row_switch_it_off(tmp_path: Path):
    recorder = Recorder()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, SpectralMonitor(1, solver=FailingSolver({1, 3, 4, 5})), logger=recorder)
    assert trainer.global_step == 8
    assert [step for step, _ in recorder.measured] == [0, 2]
    failures = [text for warning in told if "failed in measuring" in (text := str(warning.message))]
    assert [text.rpartition("; ")[2] for text in failures] == [*["training goes on"] * 3, "it is switched off now"]


def test_a_failure_is_raised_where_that_is_asked_for(tmp_path: Path):
    with pytest.raises(OSError, match="the disk is full"):
        fit(tmp_path, SpectralMonitor(1, solver=FailingSolver({2}), on_error="raise"))


@pytest.mark.filterwarnings("ignore:SpectralMonitor, FAILURE")
def test_weights_that_are_not_finite_are_counted_and_stop_nothing(tmp_path: Path):
    recorder = Recorder()
    module = LitGPT()
    with torch.no_grad():
        module.model.blocks[1].mlp[2].weight[0, 0] = math.nan
    fit(tmp_path, SpectralMonitor(every_n_steps=4), module=module, logger=recorder, max_steps=1)
    values = recorder.measured[0][1]
    assert values["spectral_health/unmeasured"] == 1
    assert math.isnan(values["spectral/ratio_max"])  # the largest of the others would look healthy


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, r"every_n_steps=0: expected an integer of at least 1"),
        ({"every_n_steps": 2.5}, r"every_n_steps=2\.5: expected an integer"),
        ({"every_n_steps": True}, r"every_n_steps=True: expected an integer"),
        (
            {"linearization": "jacobian"},
            r"'circuit' or 'paper' here; .*measure\(model, linearization='jacobian', batch",
        ),
        ({"linearization": None}, r"linearization=None: expected 'circuit' or 'paper'"),
        ({"safe_zone": (2.0, 0.5)}, r"safe_zone=\(2\.0, 0\.5\): expected two ratios, 0 < low < high"),
        ({"safe_zone": (0.0, 2.0)}, r"safe_zone=\(0\.0, 2\.0\): expected two ratios"),
        ({"safe_zone": 2.0}, r"safe_zone=2\.0: expected two ratios"),
        ({"safe_zone": (0.5, math.inf)}, r"safe_zone=\(0\.5, inf\): expected two ratios"),
        ({"on_error": "ignore"}, r"on_error='ignore': expected 'warn' or 'raise'"),
        ({"prefix": "a/b"}, r"prefix='a/b': expected letters"),
        ({"prefix": "../up"}, r"prefix='\.\./up': expected letters"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        SpectralMonitor(**arguments)


def test_two_monitors_that_would_write_the_same_keys_are_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="prefix='spectral_circuit'"):
        fit(tmp_path, [SpectralMonitor(), SpectralMonitor(linearization="paper")])


def test_two_equal_monitors_are_refused_by_the_trainer(tmp_path: Path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SpectralMonitor`"):
        fit(tmp_path, [SpectralMonitor(), SpectralMonitor()])


def test_two_monitors_with_two_prefixes_live_in_one_trainer(tmp_path: Path):
    paper = SpectralMonitor(every_n_steps=4, linearization="paper", prefix="paper")
    trainer = fit(tmp_path, [SpectralMonitor(every_n_steps=4), paper])
    assert {"spectral/ratio_max", "paper/ratio_max"} <= trainer.callback_metrics.keys()
    assert read_journal(tmp_path / "paper.jsonl")[0]["linearization"] == "paper"


# Neighbours


def test_it_can_be_pickled_before_and_after_a_run(tmp_path: Path):
    monitor = SpectralMonitor(every_n_steps=4)
    assert pickle.loads(pickle.dumps(monitor)).every_n_steps == 4
    fit(tmp_path, monitor)
    assert pickle.loads(pickle.dumps(monitor)).state_dict()["measured_step"] == 8


def run_script(folder: Path, text: str) -> None:
    (folder / "script.py").write_text(text)
    here = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=here, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_agree_write_once_and_train_as_if_unwatched(tmp_path: Path):
    run_script(
        tmp_path,
        """
import sys
from datetime import timedelta
from pathlib import Path
import torch
from lightning.pytorch.strategies import DDPStrategy
from tiny_run import LitGPT, fit
from lightning_spectral import SpectralMonitor
from lightning.pytorch import seed_everything

for name, monitors in (("alone", []), ("watched", [SpectralMonitor(every_n_steps=2, on_error="raise")])):
    seed_everything(0)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30))
    module = LitGPT(dropout=0.2)
    trainer = fit(Path(name), monitors, module=module, max_steps=4, devices=2, strategy=strategy)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k != "train/loss" and "seconds" not in k}
    torch.save({"weights": module.state_dict(), "metrics": metrics}, f"{name}-{trainer.global_rank}.pt")
""",
    )
    alone, watched, other = (torch.load(tmp_path / name) for name in ("alone-0.pt", "watched-0.pt", "watched-1.pt"))
    assert all(bool((value == watched["weights"][key]).all()) for key, value in alone["weights"].items())
    assert watched["metrics"] == other["metrics"]
    assert "spectral/ratio_max" in other["metrics"]
    assert journal_steps(tmp_path / "watched") == [0, 2, 4]


@pytest.mark.slow
def test_it_works_in_the_trainers_of_both_namespaces(tmp_path: Path):
    """In one process; where only the other name is imported, its command line is run with the monitor."""
    run_script(
        tmp_path,
        """
import lightning.pytorch, pytorch_lightning, torch
from lightning_spectral import SpectralMonitor
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 4, 16)), batch_size=2)
for namespace in (lightning.pytorch, pytorch_lightning):
    class Lit(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
            self.model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.example_input_array = torch.randn(2, 4, 16)
        def forward(self, x): return self.model(x)
        def training_step(self, batch, batch_idx): return self(batch[0]).mean()
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)
    trainer = namespace.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                                callbacks=SpectralMonitor(every_n_steps=1, on_error="raise"))
    trainer.fit(Lit(), data)
    assert "spectral/ratio_max" in trainer.callback_metrics, namespace
""",
    )

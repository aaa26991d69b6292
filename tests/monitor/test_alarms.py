"""Events in real runs: attention that starts too strong, tokens that are one vector, weights that become NaN."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_events, read_journal
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import BLOCKS, Block, LitGPT, fit
from torch import Tensor, nn

import lightning_spectral
from lightning_spectral import History, SpectralMonitor
from lightning_spectral.alarms.signs import COLLAPSED
from lightning_spectral.errors import ConfigurationError

DEPTH = 48
WARNING = (
    r"SpectralMonitor, WARNING at step [2-6]: the network begins to give every token the same answer\. "
    r"At the output of block 47 "
)
FAILURE = (
    r"SpectralMonitor, FAILURE at step 1: the network gives every token the same answer\. "
    r"At the output of block 2 \(model\.blocks\.2\) "
)


def collapsing() -> LitGPT:
    """Return a deep model whose attention starts 64 times too strong, so that its tokens become one vector."""
    seed_everything(0)
    module = LitGPT(learning_rate=1e-2)
    module.model.blocks = nn.ModuleList(Block(0.0) for _ in range(DEPTH))
    for block in module.model.blocks:
        block.attention.proj.weight.data.mul_(64)
    return module


def collapsed() -> LitGPT:
    """Return a model that knows one token only, and no place, and hardly learns."""
    seed_everything(0)
    module = LitGPT(learning_rate=1e-7)
    for parameter in module.model.tokens.parameters():
        parameter.data[:] = parameter.data[:1].clone()
    return module


class Breaking(LitGPT):
    """Has weights that are not numbers after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == self.steps - 1:
            self.model.blocks[1].mlp[0].weight.grad.fill_(float("nan"))


def rows(folder: Path) -> Iterator[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        yield from (row for row in csv.DictReader(file) if row["spectral_health/alarm"])


def test_attention_that_dominates_is_warned_of_before_the_tokens_are_one(tmp_path: Path):
    with pytest.warns(UserWarning, match=WARNING):
        fit(tmp_path, SpectralMonitor(1), module=collapsing())
    (warning,) = [event for event in read_events(tmp_path / "spectral.jsonl") if event["level"] == "warning"]
    assert warning["name"] == "tokens_collapsing"
    assert warning["values"]["token_residual"] > COLLAPSED


def test_a_collapse_is_announced_once_and_written_everywhere(tmp_path: Path):
    with pytest.warns(UserWarning, match=FAILURE) as told:
        trainer = fit(tmp_path, SpectralMonitor(1), module=collapsed())
    assert trainer.global_step == 8
    assert sum("FAILURE" in str(warning.message) for warning in told) == 1
    (failure,) = [event for event in read_events(tmp_path / "spectral.jsonl") if event["level"] == "failure"]
    assert (failure["since"], failure["step"], failure["blocks"]) == (0, 1, [BLOCKS - 1])
    logged = [float(row["spectral_health/alarm"]) for row in rows(tmp_path)]
    assert logged == [float(step >= failure["step"]) for step in range(9)]
    assert float(trainer.callback_metrics["spectral_health/alarm"]) == 1
    lines = (tmp_path / "spectral.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(read_journal(tmp_path / "spectral.jsonl")[1]) < len(lines) - 1  # events are no measurements
    (read,) = [event for event in History.read(tmp_path / "spectral.jsonl").events if event.level == "failure"]
    assert (read.name, read.advice[0], read.values) == ("tokens_collapsed", "pre_norm", failure["values"])


def test_the_end_says_what_was_told_although_all_warnings_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, SpectralMonitor(1), module=collapsed())
    (failure,) = [event for event in read_events(tmp_path / "spectral.jsonl") if event["level"] == "failure"]
    said = [record.getMessage() for record in caplog.records if record.name == "lightning_spectral"]
    assert said.count(f"SpectralMonitor, {failure['message']}") == 1
    table = next(place for place, line in enumerate(said) if line.startswith("spectral ratio"))
    assert said[table + 1] == "SpectralMonitor: told in this run: failure tokens_collapsed at step 1"


@pytest.mark.parametrize("settings", [{}, {"geometry": False}, {"on_alarm": "stop"}, {"auto_rescale": True}])
def test_a_model_that_starts_as_usual_trains_without_an_alarm(tmp_path: Path, settings: dict[str, Any]):
    trainer = fit(tmp_path, SpectralMonitor(1, **settings))
    assert trainer.global_step == 8
    assert all(event["level"] == "note" for event in read_events(tmp_path / "spectral.jsonl"))


def test_without_tokens_a_collapse_is_not_seen(tmp_path: Path):
    fit(tmp_path, SpectralMonitor(1, geometry=False), module=collapsed())
    assert all(event["level"] == "note" for event in read_events(tmp_path / "spectral.jsonl"))


@pytest.mark.parametrize("geometry", [True, False])
def test_weights_that_become_nan_are_told_at_the_next_measurement(tmp_path: Path, geometry: bool):
    with pytest.warns(UserWarning, match="FAILURE at step 6: the network computes with NaN or infinity"):
        trainer = fit(tmp_path, SpectralMonitor(2, geometry=geometry), module=Breaking(6))
    (failure,) = [event for event in read_events(tmp_path / "spectral.jsonl") if event["level"] == "failure"]
    assert (failure["name"], failure["blocks"], failure["branch"]) == ("not_finite", [1], "mlp")
    assert "at step 4 everything was finite" in failure["message"]
    assert trainer.callback_metrics["spectral/ratio_max"].isnan()  # and not the last healthy one
    assert trainer.callback_metrics["spectral/mlp_norm_max"].isnan()


def test_a_failure_can_stop_the_run(tmp_path: Path):
    with pytest.warns(UserWarning, match=FAILURE):
        trainer = fit(tmp_path, SpectralMonitor(1, on_alarm="stop"), module=collapsed())
    (failure,) = [event for event in read_events(tmp_path / "spectral.jsonl") if event["level"] == "failure"]
    assert trainer.global_step == failure["step"] + 1 < 8  # the step whose forward pass has shown the tokens


def test_a_failure_can_save_the_run_with_what_was_saved_before(tmp_path: Path):
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=1)
    with pytest.warns(UserWarning, match="FAILURE at step 3|saved this run in .*spectral-failure-3; ") as told:
        fit(tmp_path, [SpectralMonitor(1, on_alarm="checkpoint"), saver], module=Breaking(3), enable_checkpointing=True)
    folder = tmp_path / "spectral-failure-3"
    assert f"SpectralMonitor saved this run in {folder}; `lightning-spectral report {folder}` shows it" in map(
        str, (warning.message for warning in told)
    )
    saved = torch.load(folder / "failed.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    failure = json.loads((folder / "failure.json").read_text())
    assert (failure["name"], failure["step"], failure["batch"]) == ("not_finite", 3, 3)
    run = History.read(folder / "spectral.jsonl")
    assert [item.step for item in run.measurements] == [0, 1, 2, 3]
    assert run.events[-1].name == "not_finite"
    (earlier,) = (folder / "earlier").iterdir()
    assert not (tmp_path / "saved" / earlier.name).exists()  # the saver has deleted it since
    assert torch.load(earlier, weights_only=True)["global_step"] <= 4
    assert lightning_spectral.report(folder).is_file()


def test_a_failure_can_call_a_function_whose_errors_are_the_users(tmp_path: Path):
    heard: list[Any] = []

    def answer(*given: Any) -> None:
        heard.extend(given)
        raise KeyError("mine")

    module = collapsed()
    with pytest.warns(UserWarning, match=FAILURE), pytest.raises(KeyError, match="mine"):
        fit(tmp_path, SpectralMonitor(1, on_alarm=answer), module=module)
    trainer, pl_module, event = heard
    assert (pl_module, trainer.global_step, event.level) == (module, event.step + 1, "failure")


def test_what_on_alarm_cannot_be():
    with pytest.raises(ConfigurationError, match="on_alarm='shout': expected 'log' or 'checkpoint' or 'stop'"):
        SpectralMonitor(on_alarm="shout")  # type: ignore[arg-type]


def test_a_resumed_run_remembers(tmp_path: Path):
    with pytest.warns(UserWarning, match=FAILURE):
        trainer = fit(tmp_path / "first", SpectralMonitor(1), module=collapsed(), max_steps=6, batches=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    folder = tmp_path / "second"
    fit(folder, SpectralMonitor(1), module=collapsed(), ckpt_path=str(tmp_path / "last.ckpt"), batches=2)
    # Step 6 is measured again, now with tokens; the failure is not said again.
    assert [(row["step"], float(row["spectral_health/alarm"])) for row in rows(folder)] == [
        ("6", 1),
        ("7", 1),
        ("8", 1),
    ]
    assert all(event["level"] == "note" for event in read_events(folder / "spectral.jsonl"))


# Updates


def test_the_updates_of_the_measured_batch_are_compared(tmp_path: Path):
    class Remembering(LitGPT):
        """Compares the updates of every batch by itself."""

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            x, found = self.model.tokens(batch[:, :-1]).detach(), []
            with torch.no_grad():
                for block in self.model.blocks:
                    attention = block.attention(block.norm1(x))
                    mlp = block.mlp(block.norm2(x + attention))
                    x = x + attention + mlp
                    found.append(
                        (
                            float(mlp.norm() / attention.norm()),
                            float((mlp * attention).sum() / mlp.norm() / attention.norm()),
                        )
                    )
            self.updates = {**getattr(self, "updates", {}), self.global_step: found}
            return super().training_step(batch, batch_idx)

    module = Remembering()
    fit(tmp_path, SpectralMonitor(3, geometry=True, per_layer=True), module=module)
    seen = {
        record["step"]: [layer["functional"] for layer in record["layers"]]
        for record in read_journal(tmp_path / "spectral.jsonl")[1]
    }
    assert list(seen) == [0, 3, 6, 8]
    assert seen[8] == [None] * BLOCKS  # no pass uses the last weights
    for step in (0, 3, 6):
        pairs = [(layer["update_ratio"], layer["update_cosine"]) for layer in seen[step]]
        assert pairs == [pytest.approx(pair, rel=1e-4, abs=1e-5) for pair in module.updates[step]]
    logged = {row["step"]: row["spectral_blocks/update_ratio/01"] for row in rows(tmp_path)}
    assert float(logged["3"]) == pytest.approx(module.updates[3][1][0], rel=1e-4)

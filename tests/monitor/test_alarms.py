"""Alarms in real runs: a model that starts with attention far too strong, and one that starts as usual."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_events, read_journal
from lightning.pytorch import seed_everything
from tiny_run import BLOCKS, Block, LitGPT, fit
from torch import Tensor, nn

from lightning_spectral import SpectralMonitor
from lightning_spectral.errors import ConfigurationError

DEPTH = 48
ALARM = (
    r"spectral ALARM, step [2-6], zone \(0\.5, 2\): tokens become one vector: token residual 0\.\d+ behind block 0, "
)


def collapsing() -> LitGPT:
    """Return a deep model whose attention starts 64 times too strong, so that its tokens become one vector."""
    seed_everything(0)
    module = LitGPT(learning_rate=1e-2)
    module.model.blocks = nn.ModuleList(Block(0.0) for _ in range(DEPTH))
    for block in module.model.blocks:
        block.attention.proj.weight.data.mul_(64)
    return module


def rows(folder: Path) -> Iterator[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        yield from (row for row in csv.DictReader(file) if row["spectral/alarm"])


def test_collapse_is_announced_once_and_written_everywhere(tmp_path: Path):
    with pytest.warns(UserWarning, match=ALARM) as told:
        trainer = fit(tmp_path, SpectralMonitor(1, geometry=True), module=collapsing())
    assert trainer.global_step == 8
    assert sum("ALARM" in str(warning.message) for warning in told) == 1
    (alarm,) = [event for event in read_events(tmp_path / "spectral.jsonl") if event["level"] == "alarm"]
    assert (alarm["since"], alarm["blocks"]) == (0, list(range(DEPTH)))
    logged = [float(row["spectral/alarm"]) for row in rows(tmp_path)]
    assert logged == [float(step >= alarm["step"]) for step in range(9)]
    assert float(trainer.callback_metrics["spectral_alarm"]) == 1
    lines = (tmp_path / "spectral.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(read_journal(tmp_path / "spectral.jsonl")[1]) < len(lines) - 1  # events are no measurements


@pytest.mark.parametrize("settings", [{}, {"geometry": True}, {"on_alarm": "stop"}, {"auto_rescale": True}])
def test_a_model_that_starts_as_usual_trains_without_an_alarm(tmp_path: Path, settings: dict[str, Any]):
    trainer = fit(tmp_path, SpectralMonitor(1, **settings))
    assert trainer.global_step == 8
    assert all(event["level"] == "info" for event in read_events(tmp_path / "spectral.jsonl"))


def test_without_tokens_there_is_no_alarm(tmp_path: Path):
    fit(tmp_path, SpectralMonitor(1), module=collapsing())
    assert {event["level"] for event in read_events(tmp_path / "spectral.jsonl")} == {"info"}


def test_an_alarm_can_stop_the_run(tmp_path: Path):
    with pytest.warns(UserWarning, match=ALARM):
        trainer = fit(tmp_path, SpectralMonitor(1, on_alarm="stop"), module=collapsing())
    (alarm,) = [event for event in read_events(tmp_path / "spectral.jsonl") if event["level"] == "alarm"]
    assert trainer.global_step == alarm["step"] + 1 < 8  # the step whose forward pass has shown the tokens


def test_an_alarm_can_call_a_function_whose_errors_are_the_users(tmp_path: Path):
    heard: list[Any] = []

    def answer(*given: Any) -> None:
        heard.extend(given)
        raise KeyError("mine")

    module = collapsing()
    with pytest.warns(UserWarning, match=ALARM), pytest.raises(KeyError, match="mine"):
        fit(tmp_path, SpectralMonitor(1, on_alarm=answer), module=module)
    trainer, pl_module, event = heard
    assert (pl_module, trainer.global_step, event.level) == (module, event.step + 1, "alarm")


def test_what_on_alarm_cannot_be():
    with pytest.raises(ConfigurationError, match="on_alarm='shout': expected 'log' or 'stop'"):
        SpectralMonitor(on_alarm="shout")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigurationError, match="on_alarm='stop' with geometry=False: an alarm needs the tokens as its second witness"
    ):
        SpectralMonitor(on_alarm="stop", geometry=False)
    assert SpectralMonitor(on_alarm="stop").geometry is True


def test_a_resumed_run_remembers(tmp_path: Path):
    with pytest.warns(UserWarning, match=ALARM):
        trainer = fit(
            tmp_path / "first", SpectralMonitor(1, geometry=True), module=collapsing(), max_steps=6, batches=2
        )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    folder = tmp_path / "second"
    fit(
        folder, SpectralMonitor(1, geometry=True), module=collapsing(), ckpt_path=str(tmp_path / "last.ckpt"), batches=2
    )
    # Step 6 is measured again, now with tokens; the alarm is not said again.
    assert [(row["step"], float(row["spectral/alarm"])) for row in rows(folder)] == [("6", 1), ("7", 1), ("8", 1)]


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
    logged = {row["step"]: row["spectral/update_ratio/01"] for row in rows(tmp_path)}
    assert float(logged["3"]) == pytest.approx(module.updates[3][1][0], rel=1e-4)

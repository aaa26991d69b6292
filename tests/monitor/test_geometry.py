"""Token geometry in real runs: measured on samples of the batch of measured steps, and on nothing else."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import MODES, assert_same, run
from journals import read_journal
from lightning.pytorch import seed_everything
from tiny_run import BLOCKS, LitGPT, fit
from torch import Tensor

from lightning_spectral import History, SpectralMonitor, find_blocks
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.tokens import token_residual


def seen(folder: Path) -> dict[int, list[float | None]]:
    records = read_journal(folder / "spectral.jsonl")[1]
    return {record["step"]: [layer["token_residual"] for layer in record["layers"]] for record in records}


def test_the_tokens_of_the_measured_batch_are_measured(tmp_path: Path):
    class Remembering(LitGPT):
        """Computes the token residual of every batch by itself."""

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            x, found = self.model.tokens(batch[:, :-1]), []
            for block in self.model.blocks:
                x = block(x)
                found.append(float(token_residual(x.detach()).mean()))
            self.residuals = {**getattr(self, "residuals", {}), self.global_step: found}
            return super().training_step(batch, batch_idx)

    module = Remembering()
    fit(tmp_path, SpectralMonitor(every_n_steps=3, geometry=True, per_layer=True), module=module)
    found = seen(tmp_path)
    assert list(found) == [0, 3, 6, 8]
    assert found[8] == [None] * BLOCKS  # no pass uses the last weights
    for step in (0, 3, 6):
        assert found[step] == pytest.approx(module.residuals[step], rel=1e-6)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = {row["step"]: row for row in csv.DictReader(file) if row["spectral/ratio_max"]}
    assert float(rows["3"]["spectral/token_residual_min"]) == pytest.approx(min(module.residuals[3]), rel=1e-6)
    assert float(rows["3"]["spectral_blocks/token_residual/01"]) == pytest.approx(module.residuals[3][1], rel=1e-6)
    assert float(rows["3"]["spectral/effective_rank_min"]) > 1
    assert rows["8"]["spectral/token_residual_min"] == ""


@pytest.mark.parametrize("mode", MODES)
def test_measuring_the_tokens_changes_no_bit(tmp_path: Path, mode: str):
    alone = run(tmp_path / "alone", [], **MODES[mode])
    watched = run(tmp_path / "watched", [SpectralMonitor(every_n_steps=2, geometry=True)], **MODES[mode])
    assert_same(alone, watched)
    assert any(value is not None for values in seen(tmp_path / "watched").values() for value in values)


def test_it_is_on_by_default():
    assert SpectralMonitor().geometry is True
    assert SpectralMonitor(auto_rescale=True).geometry is True
    assert SpectralMonitor(geometry=False).geometry is False
    with pytest.raises(ConfigurationError, match="geometry='yes': 'yes' is none of 'tokens', 'updates', 'logits'"):
        SpectralMonitor(geometry="yes")


SHOWN = {
    "tokens": ("token_residual", "effective_rank", "sample_residual", "stream_rms"),
    "updates": ("update_ratio",),
    "logits": ("attention_logit",),
}


@pytest.mark.parametrize("look", SHOWN)
def test_each_look_is_measured_alone(tmp_path: Path, look: str):
    fit(tmp_path, SpectralMonitor(2, geometry=(look,)), module=LitGPT())
    last = History.read(tmp_path / "spectral.jsonl").measurements[-2]  # no pass uses the last weights
    for name, quantities in SHOWN.items():
        for quantity in quantities:
            values = {getattr(layer.functional if name != "tokens" else layer, quantity, None) for layer in last}
            assert (None not in values) if name == look else values == {None}
    assert (last.output is not None) == (look == "tokens")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_have_tokens_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    torch.compiler.reset()
    seed_everything(0)
    module = LitGPT()
    module.model.compile(backend="eager")
    fit(tmp_path / "compiled", SpectralMonitor(2, on_error="raise"), module=module)
    seed_everything(0)
    fit(tmp_path / "eager", SpectralMonitor(2, on_error="raise"), module=LitGPT())
    assert "no token geometry" not in caplog.text
    compiled, eager = seen(tmp_path / "compiled"), seen(tmp_path / "eager")
    assert compiled.pop(8) == eager.pop(8) == [None] * BLOCKS
    assert compiled == {step: pytest.approx(values, rel=1e-5) for step, values in eager.items()}


def test_no_step_has_a_hook_and_only_measured_ones_have_listeners(tmp_path: Path):
    hooks: list[int] = []
    listeners: list[int] = []

    class Counting(LitGPT):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            hooks.append(sum(len(part._forward_hooks) for part in self.modules()))
            listeners.append(sum("_compiled_call_impl" in vars(part) for part in self.modules()))
            return super().training_step(batch, batch_idx)

    module = Counting()
    fit(tmp_path, SpectralMonitor(every_n_steps=4, geometry=True), module=module)
    heard = BLOCKS + 3  # every block, and whatever is around them: the list, the model and the module
    assert hooks == [0] * 8
    assert listeners == [heard, 0, 0, 0, heard, 0, 0, 0]
    assert not any("_compiled_call_impl" in vars(part) for part in module.modules())


def test_blocks_of_another_model_do_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    seed_everything(0)
    module = LitGPT()
    strangers = find_blocks(module.model)  # named as in the inner model: "blocks.0" and not "model.blocks.0"
    trainer = fit(tmp_path, SpectralMonitor(2, geometry=True, blocks=strangers), module=module)
    assert trainer.global_step == 8
    (warned,) = [
        record.getMessage() for record in caplog.records if "none with a spectral ratio" in record.getMessage()
    ]
    assert "no attribute 'blocks'" in warned
    assert all(value is None for values in seen(tmp_path).values() for value in values)
    reasons = [layer["reason"] for layer in read_journal(tmp_path / "spectral.jsonl")[1][-1]["layers"]]
    assert all("no attribute 'blocks'" in reason for reason in reasons)

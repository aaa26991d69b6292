"""What the release before wrote: a run resumes from its checkpoint, in its folder; its files are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from tiny_run import LitGPT, loader

from lightning_spectral import GainCeiling, History, SpectralMonitor, audit, report

# Written by the commit before the rooms were moved: LitGPT from seed 3, MLPs 30 times too strong, every 2 of 8 steps,
# tokens too, a checkpoint at step 4.
EARLIER = Path(__file__).parents[1] / "data" / "earlier"
LAWS = {"watched": False, "steered": GainCeiling(learnable=True)}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


@pytest.fixture(params=LAWS)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(EARLIER / request.param, tmp_path / request.param))


def unbalanced() -> LitGPT:
    seed_everything(3, verbose=False)
    module = LitGPT()
    with torch.no_grad():
        for block in module.model.blocks:
            block.mlp[2].weight *= 30
    return module


def test_a_run_resumes_where_the_earlier_release_had_stopped(earlier: Path):
    before = History.read(earlier / "spectral.jsonl")
    monitor = SpectralMonitor(every_n_steps=2, auto_rescale=LAWS[earlier.name], geometry=True)
    trainer = Trainer(
        max_steps=8,
        accelerator="cpu",
        callbacks=[monitor],
        logger=CSVLogger(earlier, name="", version=""),
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(unbalanced(), loader(), loader(), ckpt_path=earlier / "middle.ckpt", weights_only=True)
    after = History.read(earlier / "spectral.jsonl")
    assert after.header["run"] == before.header["run"]
    assert after.steps == before.steps == (0, 2, 4, 6, 8)
    for quantity in ("ratio", "mlp_scale", "attention_scale", "token_residual"):
        np.testing.assert_allclose(after.values(quantity), before.values(quantity), rtol=1e-4)
    assert [(item["step"], item["block"]) for item in after.actions] == [
        (item["step"], item["block"]) for item in before.actions
    ]
    assert bool(after.actions) == (earlier.name == "steered")


def test_its_checkpoint_is_audited(earlier: Path):
    measured = {layer.index: layer.ratio for layer in audit(earlier / "middle.ckpt")}
    history = History.read(earlier / "spectral.jsonl")
    then = history.values("ratio")[:, history.steps.index(4)]
    assert list(measured.values()) == pytest.approx(then.tolist(), rel=1e-2)


def test_its_folder_is_reported(earlier: Path):
    page = report(earlier).read_text(encoding="utf-8")
    assert "model.blocks.2" in page

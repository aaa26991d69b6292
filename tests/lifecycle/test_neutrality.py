"""Watching changes no bit: every precision with every mode, tokens measured or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import assert_same, everything
from journals import read_journal
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from tiny_run import LitGPT, fit

from lightning_spectral import SpectralMonitor

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "64-true"]
MODES: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 3, "max_steps": 4},
    "clipping": {"gradient_clip_val": 0.1, "max_steps": 4},
    "validation": {"validate": True, "val_check_interval": 2, "num_sanity_val_steps": 1, "max_steps": 5},
    "compiled blocks": {"max_steps": 4},
}


def trained(folder: Path, callbacks: list[Callback], mode: str, precision: str) -> dict[str, Any]:
    """Return whatever a run leaves behind, the names and tensors of its checkpoint included."""
    torch.compiler.reset()
    seed_everything(0)
    module = LitGPT(dropout=0.2)
    if mode == "compiled blocks":
        for block in module.model.blocks:
            block.compile(backend="eager")
    trainer = fit(folder, callbacks, module=module, shuffle=True, precision=precision, **MODES[mode])
    left = everything(module, trainer)
    trainer.save_checkpoint(folder / "last.ckpt")
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    return left | {"checkpoint": {name: saved[name] for name in ("state_dict", "optimizer_states")}}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_watched_run_is_bitwise_the_unwatched_run(tmp_path: Path, precision: str, mode: str):
    alone = trained(tmp_path / "alone", [], mode, precision)
    assert list(alone["checkpoint"]["state_dict"]) == list(alone["state"])
    plain = SpectralMonitor(every_n_steps=2, geometry=False, per_layer=True, on_error="raise")
    heard = SpectralMonitor(every_n_steps=2, geometry=True, on_error="raise", prefix="tokens")
    assert_same(alone, trained(tmp_path / "watched", [plain, heard], mode, precision))
    for name in ("spectral", "tokens"):
        records = read_journal(tmp_path / "watched" / f"{name}.jsonl")[1]
        layers = [layer for record in records for layer in record["layers"]]
        assert all(layer["ratio"] is not None for layer in layers)
        tokens = any(layer["token_residual"] is not None for layer in layers)
        assert tokens is (name == "tokens")

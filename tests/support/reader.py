"""What a reader of the documentation brings along: a model, data, a finished run, a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from zoo.gpt import NanoGPT

from lightning_spectral import ResidualRescaler, SpectralMonitor


class GPT(NanoGPT):
    """The reader's own model."""

    @property
    def blocks(self) -> nn.ModuleList:
        """Where its blocks are."""
        return self.transformer["h"]


class Module(LightningModule):
    """The reader's LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT()

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def brought() -> dict[str, Any]:
    """The names that a page may use without defining them."""
    torch.manual_seed(0)
    ids = torch.randint(0, 61, (64, 9))
    module = Module()
    return {
        "GPT": GPT,
        "MyModel": GPT,
        "ids": ids[:2],
        "loader": DataLoader(ids, batch_size=8),
        "model": module.model,
        "module": module,
    }


def write_files(folder: Path) -> None:
    """Write a steered run with its checkpoint, and a Hugging Face folder."""
    torch.manual_seed(0)
    run = folder / "runs" / "gpt" / "version_0"
    module = Module()
    with torch.no_grad():
        for block in module.model.blocks:
            block.mlp.c_proj.weight.mul_(8)  # out of balance, so that the law has something to do
    trainer = Trainer(
        max_steps=20,
        accelerator="cpu",
        logger=CSVLogger(folder / "runs", name="gpt", version=0),
        callbacks=[
            SpectralMonitor(5, ResidualRescaler(patience=1)),
            ModelCheckpoint(run / "checkpoints", save_last=True),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, brought()["loader"])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=61)
    for name in ("model_folder", "finetuned_folder"):
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    assert json.loads((folder / "model_folder" / "config.json").read_text())["model_type"] == "llama"

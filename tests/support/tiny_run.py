"""A real training run, small enough to do a hundred times: a pre-norm GPT of three blocks on random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

VOCABULARY, WIDTH, BLOCKS, CONTEXT = 32, 16, 3, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, time, WIDTH))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class TinyGPT(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(BLOCKS))
        self.norm = nn.BatchNorm1d(WIDTH)  # has buffers, which a forward pass in train mode changes
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


class LitGPT(LightningModule):
    """Next-token prediction; remembers every training loss."""

    def __init__(self, dropout: float = 0.0, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.model, self.learning_rate = TinyGPT(dropout), learning_rate
        self.losses: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class SaveAt(Callback):
    """Save a checkpoint at the end of one step, as Lightning's own checkpoint callback does, but without a state."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class PickyGPT(TinyGPT):
    """Takes an input that nobody would guess."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["ids"] - 1000)


class PickyLitGPT(LitGPT):
    """Has no forward; its training step calls the inner model."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.model = PickyGPT(dropout)

    def forward(self, *args: Any) -> Tensor:
        raise NotImplementedError

    def loss(self, ids: Tensor) -> Tensor:
        logits = self.model({"ids": ids[:, :-1] + 1000})
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def loader(*, shuffle: bool = False, batches: int = 4) -> DataLoader[Any]:
    """Always the same random tokens, four sequences a batch."""
    generator = torch.Generator().manual_seed(7)
    return DataLoader(
        torch.randint(VOCABULARY, (4 * batches, CONTEXT), generator=generator), batch_size=4, shuffle=shuffle
    )


def fit(
    folder: Path,
    callbacks: list[Callback] | Callback,
    *,
    module: LightningModule | None = None,
    shuffle: bool = False,
    batches: int = 4,
    validate: bool = False,
    ckpt_path: str | None = None,
    seed: int = 1,
    **flags: Any,
) -> Trainer:
    """Train from a fixed seed for eight steps, unless flags say otherwise, and return the trainer."""
    seed_everything(seed)
    module = LitGPT() if module is None else module
    settings: dict[str, Any] = {
        "max_steps": 8,
        "accelerator": "cpu",
        "logger": CSVLogger(folder, name="", version=""),
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "limit_val_batches": 1.0 if validate else 0,
    }
    trainer = Trainer(callbacks=callbacks, **settings | flags)
    trainer.fit(module, loader(shuffle=shuffle, batches=batches), loader(), ckpt_path=ckpt_path)
    return trainer

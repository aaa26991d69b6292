"""Train a small byte-level GPT on the source of Python's own standard library, and watch its spectral ratios.

    python examples/train_gpt.py
    python examples/train_gpt.py --layers 12 --width 256 --steps 2000 --every-n-steps 50 --linearization paper

The model is plain PyTorch and knows nothing of `lightning_spectral`; one callback is all that watching takes. No data
is downloaded: the text is what `import` reads every day. What the script needs comes with `pip install '.[all]'`.
"""

from __future__ import annotations

import argparse
import csv
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_spectral import SpectralMonitor


@dataclass
class Config:
    """Size of the model; the default has 3.0 M parameters."""

    layers: int = 8
    width: int = 176
    heads: int = 8
    context: int = 128
    dropout: float = 0.0
    vocabulary: int = 256  # bytes


class SelfAttention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.proj(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (batch, time, width) to the same shape."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One pre-norm residual block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(config.width), SelfAttention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.width), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches to the residual stream: (batch, time, width) to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A GPT over bytes, with learned positions and an output head tied to the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Predict the next byte at each position: (batch, time) integers to (batch, time, vocabulary) logits."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LitGPT(LightningModule):
    """The training recipe: next-byte cross entropy, AdamW, one learning-rate cycle."""

    def __init__(self, config: Config, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.model, self.learning_rate = GPT(config), learning_rate

    def forward(self, ids: Tensor) -> Tensor:
        """Predict the next byte."""
        return self.model(ids)

    def _loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss per byte, in nats."""
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean loss per byte on files that are not trained on, in nats."""
        self.log("val/loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict:
        """AdamW, warmed up and annealed."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches
        # Its warm-up ends at step `pct_start * steps - 1` and is divided by that: none in runs too short for one.
        warmup = 0.1 if steps > 10 else 0.0
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Windows(Dataset[Tensor]):
    """Consecutive windows of a text, `context + 1` bytes each."""

    def __init__(self, text: bytes, context: int) -> None:
        length = context + 1
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.windows = data[: len(data) // length * length].view(-1, length)

    def __len__(self) -> int:
        """Count the windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        """Return one window of bytes as token ids."""
        return self.windows[index].long()


def read_standard_library() -> tuple[bytes, bytes]:
    """Read the source files of the standard library: every twentieth for validation, the others for training."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    texts = [path.read_bytes() for path in files]
    return b"".join(t for i, t in enumerate(texts) if i % 20), b"".join(texts[::20])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 176), ("heads", 8), ("context", 128), ("batch-size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--every-n-steps", type=int, default=10, help="optimizer steps between two measurements")
    parser.add_argument("--linearization", default="circuit", choices=["circuit", "paper"])
    parser.add_argument("--out", default="runs", help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(args: argparse.Namespace) -> Path:
    """Train, watch and return the folder of the run."""
    seed_everything(args.seed)
    config = Config(args.layers, args.width, args.heads, args.context, args.dropout)
    text, held_out = read_standard_library()
    loaders = (
        DataLoader(Windows(text, args.context), args.batch_size, shuffle=True, drop_last=True),
        DataLoader(Windows(held_out, args.context), args.batch_size),
    )
    table = CSVLogger(args.out, name="gpt")
    board = TensorBoardLogger(args.out, name="gpt", version=table.version)
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=[table, board],
        callbacks=[SpectralMonitor(every_n_steps=args.every_n_steps, linearization=args.linearization)],
        log_every_n_steps=1,
        val_check_interval=max(args.steps // 3, 1),
        limit_val_batches=10,
        gradient_clip_val=1.0,
    )
    trainer.fit(LitGPT(config), *loaders)
    return Path(table.log_dir)


def report(folder: Path) -> None:
    """Print how the loss fell and where everything lies."""
    with (folder / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    print(f"\ntraining loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte")
    for what, name in (
        ("heatmap of the spectral ratio", "spectral.png"),
        ("every measurement", "spectral.jsonl"),
        ("scalars", "metrics.csv"),
    ):
        print(f"{what:<30} {folder / name}")
    print(f"{'curves and heatmap':<30} tensorboard --logdir {folder.parent}")
    print(f"{'to look closer':<30} lightning-spectral report {folder}")


if __name__ == "__main__":
    report(train(parse()))

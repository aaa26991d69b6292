"""Train a small byte-level GPT from Lightning's command line, with the monitor in the configuration file.

    python examples/cli/train.py fit --config examples/cli/config.yaml
    python examples/cli/train.py fit --config examples/cli/config.yaml --trainer.callbacks.every_n_steps=5

    LAST=runs/cli/version_0/checkpoints/last.ckpt
    python examples/cli/train.py validate --config examples/cli/config.yaml --ckpt_path=$LAST
    python examples/cli/train.py fit --config examples/cli/config.yaml --trainer.max_steps=300 --ckpt_path=$LAST

This file has no word about the monitor: `config.yaml` names it, shows each of its arguments, and says what they do.
Needs `pip install '.[all]'`.

What to look for: the table at the end, and `spectral.png` in the folder of the run. What was in effect stands beside
it, in Lightning's own `config.yaml`. A resumed run gets a folder of its own and goes on with the measurements there.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

BYTES = 256


class StandardLibrary(LightningDataModule):
    """The source of the standard library's top-level modules, as windows of bytes.

    Args:
        context: Bytes that the model sees.
        batch_size: Windows in a batch.
    """

    def __init__(self, context: int = 128, batch_size: int = 16) -> None:
        super().__init__()
        self.context, self.batch_size = context, batch_size

    def setup(self, stage: str) -> None:
        """Read the files: every twentieth window is for validation."""
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)
        windows = text.long().unfold(0, self.context, self.context)
        held_out = torch.arange(len(windows)) % 20 == 0
        self.training, self.validation = windows[~held_out], windows[held_out]

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return shuffled batches, (batch_size, context) integers."""
        return DataLoader(self.training, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the batches for validation."""
        return DataLoader(self.validation, self.batch_size)


class ByteGPT(LightningModule):
    """A GPT over bytes, of torch's own layers.

    Args:
        depth: Blocks.
        width: Size of the residual stream.
        heads: Heads of attention in each block.
        context: Longest input, in bytes.
        learning_rate: AdamW's.
    """

    def __init__(
        self, depth: int = 6, width: int = 128, heads: int = 4, context: int = 128, learning_rate: float = 1e-3
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.tokens, self.positions = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        """Predict the next byte at each position: (batch, time) integers to (batch, time, bytes) logits."""
        time = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time, device=ids.device)
        x = self.tokens(ids) + self.positions.weight[:time]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))

    def _loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss per byte, in nats."""
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean loss per byte on text that is not trained on, in nats."""
        self.log("val/loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at one learning rate."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)


if __name__ == "__main__":
    LightningCLI(ByteGPT, StandardLibrary)

"""Train `nn.TransformerEncoder` to sort digits, and watch its spectral ratios.

    python examples/transformer_encoder.py
    python examples/transformer_encoder.py --norm post

The input is a row of random digits, the output the same digits in order. The model is torch's own, in either
arrangement of its norms: in front of the branches (`pre`), or on the stream itself, behind each sum (`post`), as in the
first Transformer.

What to look for: run both and compare. Both learn to sort. With `pre` each branch adds to a stream that grows; with
`post` the stream has the same size in front of every branch. So the same ratio means something else in the two: read
the numbers of one arrangement against each other, not against those of the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_spectral import SpectralMonitor

DIGITS = 10


class LitSorter(LightningModule):
    """An encoder that says, at each position, which digit stands there once the row is sorted."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.steps, self.learning_rate = args.steps, args.learning_rate
        self.digits = nn.Embedding(DIGITS, args.width)
        self.positions = nn.Embedding(args.length, args.width)
        pre = args.norm == "pre"
        layer = nn.TransformerEncoderLayer(
            args.width, args.heads, 4 * args.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=pre
        )
        final = nn.LayerNorm(args.width) if pre else None  # post-norm ends with a norm anyway
        self.encoder = nn.TransformerEncoder(layer, args.layers, final, enable_nested_tensor=False)
        self.head = nn.Linear(args.width, DIGITS)
        for parameter in self.encoder.parameters():  # the layers are copies of one: draw each anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, rows: Tensor) -> Tensor:
        """Sort: (batch, length) digits to (batch, length, digits) logits."""
        return self.head(self.encoder(self.digits(rows) + self.positions.weight))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean cross entropy per position, in nats."""
        loss = F.cross_entropy(self(batch).flatten(0, 1), batch.sort().values.flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the fraction of the positions that have the right digit."""
        self.log("val/accuracy", (self(batch).argmax(-1) == batch.sort().values).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict:
        """AdamW, warmed up over the first fifth of the steps, which deep post-norm needs (arXiv:2002.04745)."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=max(self.steps // 5, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", default="pre", choices=["pre", "post"], help="where the norms stand")
    for name, default in (("layers", 6), ("width", 64), ("heads", 4), ("length", 16), ("batch-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--every-n-steps", type=int, default=10, help="optimizer steps between two measurements")
    parser.add_argument("--out", default="runs", help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, watch, and say where everything lies."""
    args = parse()
    seed_everything(args.seed)
    logger = CSVLogger(args.out, name=f"encoder-{args.norm}")
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[SpectralMonitor(every_n_steps=args.every_n_steps)],
        log_every_n_steps=1,
        gradient_clip_val=1.0,
    )
    module = LitSorter(args)
    training = torch.randint(DIGITS, (args.steps * args.batch_size, args.length))
    validation = torch.randint(DIGITS, (1000, args.length))
    trainer.fit(module, DataLoader(training, args.batch_size), DataLoader(validation, 500))
    folder = Path(logger.log_dir)
    print(f"\naccuracy           {trainer.callback_metrics['val/accuracy']:.1%} of the positions, on new rows")
    print(f"heatmap            {folder / 'spectral.png'}\nevery measurement  {folder / 'spectral.jsonl'}")
    print(f"to look closer     lightning-spectral report {folder}")


if __name__ == "__main__":
    main()

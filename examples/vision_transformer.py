"""Train a small Vision Transformer on handwritten digits, and watch its spectral ratios.

    python examples/vision_transformer.py
    python examples/vision_transformer.py --layers 12 --patch 1

The images, 1,797 digits of 8 × 8 pixels, come with scikit-learn; the model is built from a configuration of
`transformers`, with random weights. Nothing is downloaded, and nothing in the callback knows of images. Needs
`pip install '.[examples]'`.

What to look for: first of all the accuracy, on images that were not trained on. The ratios say how the balance of MLP
and attention moves over depth and time on the way there, not how good the model is. Blocks leave the safe zone, and
there is a warning. It asks the tokens, which were measured too, and they say that nothing has collapsed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTForImageClassification

from lightning_spectral import SpectralMonitor

DIGITS, PIXELS = 10, 8


class LitVisionTransformer(LightningModule):
    """An image classifier of `transformers`."""

    def __init__(self, config: ViTConfig, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = ViTForImageClassification(config), learning_rate
        self.accuracy = MulticlassAccuracy(DIGITS, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Classify: (batch, 1, height, width) to (batch, digits) logits."""
        return self.model(pixel_values=images).logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy, in nats."""
        images, digits = batch
        loss = F.cross_entropy(self(images), digits)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the fraction of the images that are classified correctly."""
        images, digits = batch
        self.accuracy(self(images), digits)
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at one learning rate."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.05)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("width", 64), ("heads", 4), ("patch", 2), ("batch-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--every-n-steps", type=int, default=10, help="optimizer steps between two measurements")
    parser.add_argument("--out", default="runs", help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, watch, and say where everything lies."""
    args = parse()
    seed_everything(args.seed)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, PIXELS, PIXELS) / 8 - 1  # from 0..16 to -1..1
    training, held_out = random_split(TensorDataset(images, torch.tensor(digits)), [0.8, 0.2])
    config = ViTConfig(
        image_size=PIXELS,
        patch_size=args.patch,
        num_channels=1,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_labels=DIGITS,
    )
    logger = CSVLogger(args.out, name="vision")
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=logger,
        callbacks=[SpectralMonitor(every_n_steps=args.every_n_steps, geometry=True)],  # look at the tokens too
        log_every_n_steps=1,
        gradient_clip_val=1.0,
    )
    module = LitVisionTransformer(config, args.learning_rate)
    validation = DataLoader(held_out, args.batch_size)
    trainer.fit(module, DataLoader(training, args.batch_size, shuffle=True, drop_last=True), validation)
    trainer.validate(module, validation, verbose=False)
    folder = Path(logger.log_dir)
    print(f"\naccuracy           {trainer.callback_metrics['val/accuracy']:.1%} of {len(held_out)} images")
    print(f"heatmap            {folder / 'spectral.png'}\nevery measurement  {folder / 'spectral.jsonl'}")
    print(f"to look closer     lightning-spectral report {folder}")


if __name__ == "__main__":
    main()

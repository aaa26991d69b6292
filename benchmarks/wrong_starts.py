"""Does auto-rescale hold every ratio inside the safe zone, whatever the model and the start? See docs/steering.md.

    python benchmarks/wrong_starts.py
    python benchmarks/wrong_starts.py --models llama --every-n-steps 50 --seeds 1

A GPT (the example's), a Llama of transformers, a pre-norm `nn.TransformerEncoder` and a vision Transformer start with
every MLP, or every attention branch, 8 times too strong (the Llama's 10 times), and as they are. Each is trained with
`SpectralMonitor(every_n_steps, auto_rescale=True)`, all settings of the law by default. A line of the table says from
which measured step on every block was inside, in the slowest of the seeds, and the farthest ratio from step 100 on.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from machine import describe
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_spectral import SpectralMonitor, attach_scales, find_blocks
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Config, Windows, read_standard_library

SETTLED, WATCHED_EVERY = 100, 10
WIDTH, LAYERS, CONTEXT, BATCH = 48, 6, 32, 8
STARTS = ("as it is", "MLP", "attention")


class Encoder(nn.Module):
    """Torch's own layers as a causal language model over bytes, pre-norm, with dropout as torch has it by default."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, norm_first=True)
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        """Predict the next byte: (batch, time) integers to (batch, time, 256) logits."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.head(self.encoder(x, mask=mask, is_causal=True))


class Llama(nn.Module):
    """A tiny Llama of transformers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=CONTEXT,
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Predict the next byte: (batch, time) integers to (batch, time, 256) logits."""
        return self.lm(ids).logits


class ViT(nn.Module):
    """A vision Transformer of transformers that tells what a window of bytes, seen as a picture, goes on with."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=256,
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify: (batch, 1, 8, 8) pixels to (batch, 256) logits."""
        return self.vit(pixels).logits


class Task(LightningModule):
    """Next-byte prediction, at every position or from a picture, by AdamW with 10 % warm-up."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__()
        self.model, self.rate = model, rate

    def forward(self, x: Tensor) -> Tensor:
        """Run the model."""
        return self.model(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss, in nats."""
        if isinstance(self.model, ViT):
            return F.cross_entropy(self(as_pictures(batch)), batch[:, -1])
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> dict:
        """AdamW, warmed up and annealed."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def as_pictures(windows: Tensor) -> Tensor:
    """Lay the first 32 bytes of windows twice into an 8 × 8 picture, (batch, 1, 8, 8)."""
    rows = windows[:, :32].float().view(-1, 1, 4, 8) / 64 - 1
    return torch.cat([rows, -rows], dim=2)


MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "gpt": (lambda: GPT(Config(LAYERS, WIDTH, 4, CONTEXT)), 8.0),
    "llama": (Llama, 10.0),
    "encoder": (Encoder, 8.0),
    "vit": (ViT, 8.0),
}


class Watcher(Callback):
    """Notes the ratios of all blocks now and then."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.rows = meter, {}

    def on_train_batch_end(self, trainer: Trainer, *rest: object) -> None:
        """Measure."""
        if trainer.global_step % WATCHED_EVERY == 0:
            layers = self.meter.measure(trainer.global_step).layers
            self.rows[trainer.global_step] = [layer.log_ratio for layer in layers]


def run(name: str, start: str, seed: int, args: argparse.Namespace) -> dict[int, list[float | None]]:
    """Train once; return ln ρ of all blocks by step."""
    torch.manual_seed(seed)
    make, factor = MODELS[name]
    task = Task(make(), args.rate)
    example = torch.zeros(2, CONTEXT, dtype=torch.long)
    blocks = find_blocks(task, batch=as_pictures(example) if name == "vit" else example)
    with torch.no_grad():
        for block in blocks if start != "as it is" else ():
            branches = block.mlp_branches if start == "MLP" else block.attention_branches
            for end in (end for branch in branches for end in branch.ends):
                task.get_parameter(end.parameter).mul_(factor)
    blocks = attach_scales(task, blocks, learnable=False).blocks
    watcher = Watcher(Meter(ModelWeights(task), blocks))
    monitor = SpectralMonitor(args.every_n_steps, auto_rescale=True, blocks=blocks, geometry=False, on_error="raise")
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(Windows(read_standard_library()[0], CONTEXT), BATCH, shuffle=True, generator=order)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=args.steps,
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            callbacks=[monitor, watcher],
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(task, loader)
    return watcher.rows


def settled(rows: dict[int, list[float | None]], zone: float) -> int | None:
    """Return the first measured step from which on every block is inside."""
    outside = [step for step, row in rows.items() if any(value is None or abs(value) >= zone for value in row)]
    later = [step for step in rows if step > max(outside, default=-1)]
    return min(later, default=None)


def main() -> None:
    """Print a line for every model and start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--every-n-steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning_spectral"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    print(describe())
    print(
        f"{args.seeds} seeds, {args.steps} steps, rate {args.rate:g}, a measurement every {args.every_n_steps} steps\n"
    )
    print(f"{'model':<10}{'start':<18}{'all inside from step':>21}{'ratios from step 100 on':>28}")
    for name in args.models:
        for start in STARTS:
            runs = [run(name, start, seed, args) for seed in range(args.seeds)]
            steps = [settled(rows, math.log(2)) for rows in runs]
            late = [v for rows in runs for step, row in rows.items() if step >= SETTLED for v in row if v is not None]
            slowest = "never" if None in steps else str(max(step for step in steps if step is not None))
            spread = f"{math.exp(min(late)):.2f} to {math.exp(max(late)):.2f}"
            label = start if start == "as it is" else f"{start} {MODELS[name][1]:g}×"
            print(f"{name:<10}{label:<18}{slowest:>21}{spread:>28}", flush=True)


if __name__ == "__main__":
    main()

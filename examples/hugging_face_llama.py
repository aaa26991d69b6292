"""Train a tiny Llama, built from a configuration of `transformers`, and watch its spectral ratios.

    python examples/hugging_face_llama.py
    python examples/hugging_face_llama.py --layers 12 --width 192 --steps 1000

Needs `pip install '.[examples]'`. Nothing is downloaded: the weights are random, and the text is the standard library's
source, as in `train_gpt.py` beside it.

Blocks are found in the model as it is: grouped key/value heads, a gated MLP and RMSNorm need no word of yours. Any
other causal language model of `transformers` takes the place of `LlamaForCausalLM`, a pretrained one too.

What to look for: the table at the end; in the heatmap, when which block parts from the others; in the report, the same
and more, with the numbers under the pointer. Blocks leave the safe zone here while the loss falls as it should: that is
information about the model, not a fault.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from train_gpt import Windows, read_standard_library
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_spectral import SpectralMonitor, report


class LitLlama(LightningModule):
    """A causal language model of `transformers`, which computes its own loss."""

    def __init__(self, config: LlamaConfig, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = LlamaForCausalLM(config), learning_rate

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss per byte, in nats; the model shifts its labels itself."""
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean loss per byte on files that are not trained on, in nats."""
        self.log("val/loss", self.model(input_ids=batch, labels=batch).loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at one learning rate."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("width", 128), ("heads", 8), ("kv-heads", 2), ("context", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--every-n-steps", type=int, default=10, help="optimizer steps between two measurements")
    parser.add_argument("--out", default="runs", help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, watch, and say where everything lies."""
    args = parse()
    seed_everything(args.seed)
    config = LlamaConfig(
        vocab_size=256,  # bytes
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        bos_token_id=None,  # no byte is special
        eos_token_id=None,
    )
    text, held_out = read_standard_library()
    logger = CSVLogger(args.out, name="llama")
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=logger,
        callbacks=[SpectralMonitor(every_n_steps=args.every_n_steps)],
        log_every_n_steps=1,
        limit_val_batches=10,
        gradient_clip_val=1.0,
    )
    module = LitLlama(config, args.learning_rate)
    # A window is one byte longer than the context it is made for; here every byte of it goes in.
    batches = DataLoader(Windows(text, args.context - 1), args.batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(Windows(held_out, args.context - 1), args.batch_size)
    trainer.fit(module, batches, validation)
    trainer.validate(module, validation, verbose=False)
    folder = Path(logger.log_dir)
    print(f"\nvalidation loss    {trainer.callback_metrics['val/loss']:.3f} nats per byte")
    print(f"heatmap            {folder / 'spectral.png'}\nevery measurement  {folder / 'spectral.jsonl'}")
    try:  # the same as `lightning-spectral report FOLDER`
        print(f"report             {report(folder)}")
    except ModuleNotFoundError as missing:
        print(missing)


if __name__ == "__main__":
    main()

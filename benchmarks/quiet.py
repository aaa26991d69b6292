"""Training without a word and without files, for experiments of many short runs."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

__all__ = ["fit"]


def fit(
    module: LightningModule, callbacks: Sequence[Callback], windows: Any, *, batch_size: int, steps: int, seed: int
) -> None:
    """Run Lightning's Trainer.

    Args:
        module: The module, which is trained in place.
        callbacks: Callbacks, in their order.
        windows: The dataset.
        batch_size: Windows per optimizer step.
        steps: Optimizer steps.
        seed: Decides the order of the windows.
    """
    for name in ("lightning.pytorch", "lightning_spectral"):
        logging.getLogger(name).setLevel(logging.ERROR)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(windows, batch_size, shuffle=True, drop_last=True, generator=order)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*")
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            callbacks=list(callbacks),
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, loader)

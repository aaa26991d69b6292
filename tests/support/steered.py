"""Models that a law has to move, or that it cannot reach, and where it has moved them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import seed_everything
from tiny_run import LitGPT
from torch import Tensor, nn


def unbalanced(branch: str = "mlp", factor: float = 8.0, **settings: Any) -> LitGPT:
    """A model whose MLPs (or attentions) are too strong by a factor."""
    seed_everything(0)
    module = LitGPT(**settings)
    with torch.no_grad():
        for block in module.model.blocks:
            (block.mlp[2] if branch == "mlp" else block.attention.proj).weight.mul_(factor)
    return module


def log_scales(module: nn.Module) -> list[float]:
    return [value.item() for name, value in module.state_dict().items() if name.endswith("log_scale")]


class FunctionalAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]

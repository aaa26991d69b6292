"""A nanoGPT, written as its users write it, and the matrices of its branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .example import HEADS, HIDDEN, VOCABULARY

Matrices = Mapping[str, Mapping[str, list[Tensor]]]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int = HEADS) -> Tensor:
    """Causal attention on ``(batch, tokens, width)`` with equal numbers of query, key and value heads."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    """Self-attention with one fused projection, rows q|k|v."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.c_proj = nn.Linear(HIDDEN, HIDDEN)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        q, k, v = self.c_attn(x).split(HIDDEN, dim=2)
        return self.resid_dropout(self.c_proj(attend(q, k, v)))


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, dropout: float = 0.0, width: int = HIDDEN) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token alone."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(HIDDEN)
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(HIDDEN)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches, one after the other."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """A language model on blocks of any kind; the head shares its weight with the token embedding."""

    def __init__(self, block: Callable[[], nn.Module] = Block, layers: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, HIDDEN),
                "wpe": nn.Embedding(64, HIDDEN),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList(block() for _ in range(layers)),
                "ln_f": nn.LayerNorm(HIDDEN),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids to logits."""
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](positions))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


ATTENTION_SITES = ("attn", "attn.c_proj", "attn.resid_dropout")
MLP_SITES = ("mlp", "mlp.c_proj", "mlp.dropout")
BLOCKS = "transformer.h"


def attention_matrix(attention: nn.Module) -> Tensor:
    """W_o · W_v of :class:`CausalSelfAttention`."""
    return attention.c_proj.weight @ attention.c_attn.weight[2 * HIDDEN :]


def mlp_matrix(mlp: nn.Module) -> Tensor:
    """W_down · W_up of :class:`MLP`."""
    return mlp.c_proj.weight @ mlp.c_fc.weight


def block_matrices(model: nn.Module, container: str = BLOCKS) -> Matrices:
    """The matrices of every block whose branches are the two classes above."""
    return {
        f"{container}.{index}": {
            "attention": [attention_matrix(block.attn).detach()],
            "mlp": [mlp_matrix(block.mlp).detach()],
        }
        for index, block in enumerate(model.get_submodule(container))
    }

"""Models that read a second sequence, or have convolutions for MLPs: speech, retrieval. And grouped fused queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .example import (
    BATCH,
    HEADS,
    HIDDEN,
    SOURCE_TOKENS,
    TOKENS,
    VOCABULARY,
    Example,
    Inputs,
    blocks_of,
    floats,
    seeded,
    token_inputs,
    tokens,
)
from .gpt import attend

WIDTH, CHUNK, FOUND = 48, 4, 3


class Grouped(nn.Module):
    """litgpt: one projection with the rows query, query, key, value for every group; both branches read the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.proj = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.fc_1, self.fc_2, self.out = (nn.Linear(*size) for size in ((HIDDEN, WIDTH),) * 2 + ((WIDTH, HIDDEN),))

    def forward(self, x: Tensor) -> Tensor:
        """One sum of three."""
        groups = self.qkv(self.norm_1(x)).unflatten(-1, (HEADS // 2, 4, -1)).permute(0, 2, 3, 1, 4)
        q, k, v = groups.split([2, 1, 1], dim=2)
        k, v = k.expand_as(q), v.expand_as(q)
        q, k, v = (part.reshape(x.shape[0], HEADS, x.shape[1], -1) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        h = self.norm_2(x)
        return x + self.proj(y) + self.out(F.silu(self.fc_1(h)) * self.fc_2(h))

    def operators(self) -> dict[str, Tensor]:
        """The fourth part of every group has the values, which two heads read."""
        values = self.qkv.weight.unflatten(0, (HEADS // 2, 4, -1))[:, 3].repeat_interleave(2, 0).flatten(0, 1)
        return {
            "attention": self.proj.weight @ values @ self.norm_1.weight.diag(),
            "mlp": self.out.weight @ self.fc_2.weight @ self.norm_2.weight.diag(),
        }


class Convolved(nn.Module):
    """A feed-forward module of speech models: convolutions over one frame, the channels second."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Conv1d(HIDDEN, WIDTH, 1), nn.Conv1d(WIDTH, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """There and back."""
        return self.down(F.silu(self.up(self.norm(x).transpose(1, 2)))).transpose(1, 2)

    def matrix(self) -> Tensor:
        """A convolution over one frame is a matrix."""
        return self.down.weight[..., 0] @ self.up.weight[..., 0] @ self.norm.weight.diag()


class Conformer(nn.Module):
    """Half an MLP, attention, half an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = Convolved(), Convolved(), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """One branch after the other."""
        x = x + 0.5 * self.first(x)
        x = x + self.out(attend(*self.qkv(self.norm(x)).chunk(3, dim=-1)))
        return x + 0.5 * self.last(x)

    def operators(self) -> dict[str, Tensor]:
        """The halves are added up."""
        value = self.qkv.weight[2 * HIDDEN :] @ self.norm.weight.diag()
        return {"attention": self.out.weight @ value, "mlp": 0.5 * (self.first.matrix() + self.last.matrix())}


class WhisperAttention(nn.Module):
    """OpenAI's: keys without bias, queries and keys scaled alike; returns the scores, too."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.key = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend to itself or to another sequence."""
        source = x if other is None else other
        q, k, v = self.query(x), self.key(source), self.value(source)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3) for part in (q, k, v))
        scale = (HIDDEN // HEADS) ** -0.25
        scores = (q * scale) @ (k * scale).transpose(-1, -2)
        if mask is not None:
            scores = scores + mask[: x.shape[1], : x.shape[1]]
        weights = F.softmax(scores.float(), dim=-1).to(q.dtype)
        return self.out((weights @ v).permute(0, 2, 1, 3).flatten(start_dim=2)), scores.detach()


class WhisperBlock(nn.Module):
    """A block of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross_attn = WhisperAttention(), WhisperAttention()
        self.attn_ln, self.cross_attn_ln, self.mlp_ln = (nn.LayerNorm(HIDDEN) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.GELU(), nn.Linear(WIDTH, HIDDEN))

    def forward(self, x: Tensor, audio: Tensor, mask: Tensor) -> Tensor:
        """Three branches."""
        x = x + self.attn(self.attn_ln(x), mask=mask)[0]
        x = x + self.cross_attn(self.cross_attn_ln(x), audio)[0]
        return x + self.mlp(self.mlp_ln(x))

    def operators(self) -> dict[str, Tensor]:
        """Without what is read from the other sequence."""
        return {
            "attention": self.attn.out.weight @ self.attn.value.weight @ self.attn_ln.weight.diag(),
            "mlp": self.mlp[2].weight @ self.mlp[0].weight @ self.mlp_ln.weight.diag(),
        }


class ChunkedBlock(WhisperBlock):
    """RETRO: every chunk of tokens, shifted so that none sees its own neighbours, reads what was found for it."""

    def forward(self, x: Tensor, found: Tensor, mask: Tensor) -> Tensor:
        """Three branches."""
        x = x + self.attn(self.attn_ln(x), mask=mask)[0]
        x = x + self.chunked(self.cross_attn_ln(x), found)
        return x + self.mlp(self.mlp_ln(x))

    def chunked(self, x: Tensor, found: Tensor) -> Tensor:
        """Move the tokens forth by a chunk less one, attend, move them back."""
        shifted = F.pad(x[:, CHUNK - 1 :], (0, 0, 0, found.shape[1] * CHUNK - (x.shape[1] - CHUNK + 1)))
        chunks = shifted.unflatten(1, (found.shape[1], CHUNK)).flatten(0, 1)
        y, _ = self.cross_attn(chunks, found.flatten(0, 1))
        y = y.unflatten(0, (x.shape[0], -1)).flatten(1, 2)
        return F.pad(y, (0, 0, CHUNK - 1, 0))[:, : x.shape[1]]


class Model(nn.Module):
    """Token ids, and a second input for every block."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -torch.inf).triu(1), persistent=False)

    def forward(self, idx: Tensor, *beside: Tensor) -> Tensor:
        """Ids to logits."""
        x = self.embed(idx)
        for layer in self.layers:
            x = layer(x, *beside, self.mask) if beside else layer(x)
        return self.head(x)

    def operators(self) -> dict[str, dict[str, Tensor]]:
        """What the blocks say about themselves."""
        return {f"layers.{i}": layer.operators() for i, layer in enumerate(self.layers)}


def with_audio(model: nn.Module) -> Inputs:
    """Token ids and frames."""
    return (tokens(BATCH, TOKENS), floats(BATCH, SOURCE_TOKENS, HIDDEN, seed=1)), {}


def with_neighbours(model: nn.Module) -> Inputs:
    """Token ids and, for every chunk of them, some tokens that were found."""
    return (tokens(BATCH, TOKENS), floats(BATCH, TOKENS // CHUNK, FOUND, HIDDEN, seed=1)), {}


def members() -> list[Example]:
    """Every model of this module."""
    self_attention, cross = ("attn[0]", "attn.out"), (("cross_attn[0]", "cross_attn.out"),)
    three = blocks_of("layers", range(2), self_attention, ("mlp", "mlp.2"), cross, other_kinds=("cross_attention",))
    halves = blocks_of(
        "layers", range(2), "out", ("first", "first.down"), (("last", "last.down"),), other_kinds=("mlp",)
    )
    grouped = blocks_of("layers", range(2), "proj", "out")

    def member(name: str, block: Callable[[], nn.Module], *rest: Any, **flags: Any) -> Example:
        def operators(model: Any) -> dict[str, dict[str, Tensor]]:
            with torch.no_grad():
                found: dict[str, dict[str, Tensor]] = model.operators()
            return found

        return Example(name, seeded(lambda: Model(block)), *rest, operators=operators, **flags)

    return [
        member("litgpt_grouped", Grouped, token_inputs, grouped, norm_scheme="par", note="rows grouped by key"),
        member("conformer_conv1d", Conformer, token_inputs, halves, note="MLPs of convolutions"),
        member("whisper_openai", WhisperBlock, with_audio, three, note="attention returns its scores"),
        member("retro_chunked", ChunkedBlock, with_neighbours, three, note="chunks read neighbours"),
    ]

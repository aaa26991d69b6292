"""The models of the register: one block with options beside torch's own layers, and what is put around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import PATCHES, PIXELS

Norm = Literal["pre", "post", "none"]


class Attention(nn.Module):
    """Multi-head self-attention, written out.

    A mask is true where a token may not look; a row of the mask that is all true gives NaN.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def logits(self, x: Tensor) -> Tensor:
        """Return what the softmax is taken of, without a mask: (batch, heads, tokens, tokens)."""
        q, k = self.q_norm(self._split(self.q(x))), self.k_norm(self._split(self.k(x)))
        return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend: (batch, tokens, width) to the same."""
        logits = self.logits(x)
        if mask is not None:
            logits = logits.masked_fill(mask, -torch.inf)
        mixed = self.dropout(logits.softmax(-1)) @ self._split(self.v(x))
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention and MLP, each added to the stream; post-norm multiplies the stream by ``alpha`` (DeepNorm)."""

    def __init__(
        self,
        width: int,
        heads: int = 4,
        *,
        norm: Norm = "pre",
        alpha: float = 1.0,
        dropout: float = 0.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.pre, self.alpha = norm == "pre", alpha
        self.attention = Attention(width, heads, dropout, qk_norm=qk_norm)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.attention_norm, self.mlp_norm = (
            nn.Identity() if norm == "none" else nn.LayerNorm(width) for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (batch, tokens, width) to the same."""
        x = self._add(x, lambda stream: self.attention(stream, mask), self.attention_norm)
        return self._add(x, self.mlp, self.mlp_norm)

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        if self.pre:
            return x + self.dropout(branch(norm(x)))
        return norm(self.alpha * x + self.dropout(branch(x)))


class Blocks(nn.Module):
    """A stack of blocks with the signature of `nn.TransformerEncoder`; pre-norm ends with a norm."""

    def __init__(self, layers: int, width: int, *, norm: Norm = "pre", **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, norm=norm, **options) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None) -> Tensor:
        """Map (batch, tokens, width) to the same; masks are true where a token may not look."""
        if src_key_padding_mask is not None:
            padding = src_key_padding_mask[:, None, None]
            mask = padding if mask is None else mask | padding
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


def stock_encoder(layers: int, width: int, *, pre: bool, dropout: float = 0.1) -> nn.TransformerEncoder:
    """Return torch's own encoder: its layers are copies of one, post-norm ends without a further norm."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True, norm_first=pre)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(width) if pre else None, enable_nested_tensor=False)


def draw_anew_(encoder: nn.TransformerEncoder) -> nn.TransformerEncoder:
    """Draw the matrices of each layer anew, which `nn.TransformerEncoder` does not."""
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return encoder


def causal(tokens: int) -> Tensor:
    """Return the mask that hides the future: (tokens, tokens), true where a token may not look."""
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


class Transformer(nn.Module):
    """Embed, add positions, run the layers, read out.

    ``read`` is what the head sees: each of the ``"tokens"``, a class token put in front (``"class"``), the ``"last"``
    token, or their ``"mean"``. ``mask`` makes the mask of so many tokens.
    """

    def __init__(
        self,
        embed: nn.Module,
        body: nn.Module,
        head: nn.Module,
        *,
        width: int,
        length: int,
        read: Literal["tokens", "class", "last", "mean"] = "tokens",
        mask: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.embed, self.body, self.head, self.read, self.mask = embed, body, head, read, mask
        self.positions = nn.Parameter(0.5 * torch.randn(length + (read == "class"), width))
        if read == "class":
            self.class_token = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map (batch, tokens) or (batch, tokens, features) to what the head makes of it."""
        x = self.embed(x)
        if self.read == "class":
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), 1)
        x = x + self.positions[: x.shape[1]]
        mask = None if self.mask is None else self.mask(x.shape[1])
        x = self.body(x, mask, src_key_padding_mask=padding)
        match self.read:
            case "class":
                x = x[:, 0]
            case "last":
                x = x[:, -1]
            case "mean":
                x = x.mean(1)
        return self.head(x)


class SequenceToSequence(nn.Module):
    """`nn.Transformer` over symbols; embeddings and positions are shared by both sides."""

    def __init__(self, layers: int, width: int, symbols: int, length: int, *, pre: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols + 1, width)
        self.positions = nn.Parameter(0.5 * torch.randn(length, width))
        self.transformer = nn.Transformer(
            width,
            4,
            num_decoder_layers=layers,
            dim_feedforward=4 * width,
            custom_encoder=stock_encoder(layers, width, pre=pre),
            norm_first=pre,
            batch_first=True,
        )
        self.head = nn.Linear(width, symbols)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Map two times (batch, length) symbols to (batch, length, symbols) logits."""
        one, other = (self.embed(ids) + self.positions for ids in (source, target))
        return self.head(self.transformer(one, other, tgt_mask=causal(target.shape[1])))


class Detector(nn.Module):
    """A detector with object queries: patches through an encoder, queries through a decoder, one box a query."""

    def __init__(self, layers: int, width: int, queries: int, *, pre: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.positions = nn.Parameter(0.5 * torch.randn(PATCHES, width))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.encoder = stock_encoder(2, width, pre=True, dropout=0.0)
        layer = nn.TransformerDecoderLayer(width, 4, 4 * width, 0.1, batch_first=True, norm_first=pre)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width) if pre else None)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, patches, pixels) to (batch, queries, 5): a logit of there being a box, and the box."""
        memory = self.encoder(self.embed(images) + self.positions)
        found = self.head(self.decoder(self.queries.expand(len(images), -1, -1), memory))
        return torch.cat((found[..., :1], found[..., 1:].sigmoid()), -1)


class LowRank(nn.Module):
    """A frozen linear map with a trainable one of low rank beside it, which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.base(x) + self.up(self.down(x))


class Together(Optimizer):
    """Several optimizers that step as one: Muon takes matrices only."""

    def __init__(self, *optimizers: Optimizer) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers

    def step(self, closure: Any = None) -> None:
        """Step all."""
        for optimizer in self.optimizers:
            optimizer.step()

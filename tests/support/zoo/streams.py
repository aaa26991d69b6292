"""Models with several streams side by side: every branch reads one that is mixed of them, and is written to all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .example import BATCH, HIDDEN, TOKENS, Example, ExpectedBlock, Inputs, floats, seeded
from .gpt import MLP, CausalSelfAttention, Matrices, attention_matrix, mlp_matrix

STREAMS = 4


class HyperConnection(nn.Module):
    """Static hyper-connections (Zhu and others, 2024), the streams in front: (streams, batch, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.branches = nn.ModuleList([CausalSelfAttention(), MLP()])
        self.read = nn.Parameter(torch.randn(2, STREAMS))
        self.write = nn.Parameter(torch.randn(2, STREAMS))
        self.mix = nn.Parameter(torch.eye(STREAMS).repeat(2, 1, 1))

    def forward(self, streams: Tensor) -> Tensor:
        """Read a mixture of the streams, add the branch to each with its own weight, mix the streams."""
        for branch, read, write, mix in zip(self.branches, self.read, self.write, self.mix, strict=True):
            y = branch(self.norm(torch.einsum("n,nbtd->btd", read, streams)))
            streams = torch.einsum("mn,nbtd->mbtd", mix, streams) + write[:, None, None, None] * y
        return streams


class Manifold(nn.Module):
    """Manifold-constrained hyper-connections: maps that depend on the token, the mixing doubly stochastic.

    The streams stand before the channels: (batch, tokens, streams, width).
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.branches = nn.ModuleList([CausalSelfAttention(), MLP()])
        self.maps = nn.ModuleList(nn.Linear(STREAMS * HIDDEN, STREAMS * (STREAMS + 2)) for _ in self.branches)

    def forward(self, streams: Tensor) -> Tensor:
        """Read, write and mix by what the token says."""
        for branch, maps in zip(self.branches, self.maps, strict=True):
            read, write, mix = maps(streams.flatten(-2)).split([STREAMS, STREAMS, STREAMS**2], dim=-1)
            mix = mix.unflatten(-1, (STREAMS, STREAMS)).exp()
            for _ in range(3):
                mix = mix / mix.sum(-1, keepdim=True)
                mix = mix / mix.sum(-2, keepdim=True)
            y = branch(self.norm((read.sigmoid().unsqueeze(-1) * streams).sum(-2)))
            streams = mix @ streams + 2 * write.sigmoid().unsqueeze(-1) * y.unsqueeze(-2)
        return streams


class AtOnce(nn.Module):
    """One branch: a single product makes the stream that it reads and the streams that are kept."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.maps = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, STREAMS + 1)
        self.branch_norm, self.branch = nn.LayerNorm(HIDDEN), branch
        self.write = nn.Parameter(torch.rand(STREAMS, 1))

    def forward(self, streams: Tensor) -> Tensor:
        """Mix n streams to one that is read and n that are kept."""
        read, kept = (self.maps(self.norm(streams)).softmax(-2).mT @ streams).split([1, STREAMS], dim=-2)
        return kept + self.write * self.branch(self.branch_norm(read.squeeze(-2))).unsqueeze(-2)


class Streams(nn.Module):
    """A stack of such blocks on copies of its input, summed at the end."""

    def __init__(self, layers: Iterable[nn.Module], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Copy, run, sum."""
        streams = torch.stack([x] * STREAMS, dim=self.dim)
        for layer in self.layers:
            streams = layer(streams)
        return streams.sum(self.dim)


def matrices(model: nn.Module) -> Matrices:
    """The matrices of every block."""
    return {
        f"layers.{index}": {
            "attention": [attention_matrix(layer.branches[0]).detach()],
            "mlp": [mlp_matrix(layer.branches[1]).detach()],
        }
        for index, layer in enumerate(model.layers)
    }


def matrices_in_turn(model: nn.Module) -> Matrices:
    """The matrices of every pair of branches."""
    pairs = zip(model.layers[::2], model.layers[1::2], strict=True)
    return {
        f"layers.{2 * index} + layers.{2 * index + 1}": {
            "attention": [attention_matrix(first.branch).detach()],
            "mlp": [mlp_matrix(second.branch).detach()],
        }
        for index, (first, second) in enumerate(pairs)
    }


def inputs(model: nn.Module) -> Inputs:
    """Token vectors."""
    return (floats(BATCH, TOKENS, HIDDEN),), {}


def members() -> list[Example]:
    """Hyper-connections of both kinds."""
    blocks = tuple(
        ExpectedBlock(
            f"layers.{index}",
            (f"layers.{index}.branches.0", f"layers.{index}.branches.0.c_proj"),
            (f"layers.{index}.branches.1", f"layers.{index}.branches.1.c_proj"),
            whole=False,  # it takes and returns all streams
        )
        for index in range(3)
    )
    pairs = tuple(
        ExpectedBlock(
            f"layers.{2 * index} + layers.{2 * index + 1}",
            (f"layers.{2 * index}.branch", f"layers.{2 * index}.branch.c_proj"),
            (f"layers.{2 * index + 1}.branch", f"layers.{2 * index + 1}.branch.c_proj"),
            whole=False,
        )
        for index in range(2)
    )
    return [
        Example(
            "streams_at_once",
            seeded(lambda: Streams([AtOnce(kind()) for kind in (CausalSelfAttention, MLP) * 2], -2)),
            inputs,
            pairs,
            identity=False,
            matrices=matrices_in_turn,
            note="one product makes the stream that is read and those that are kept; branches in turn in one list",
        ),
        Example(
            "streams_hyper_connections",
            seeded(lambda: Streams((HyperConnection() for _ in range(3)), 0)),
            inputs,
            blocks,
            identity=False,
            matrices=matrices,
            note="four streams in front, static maps",
        ),
        Example(
            "streams_manifold_constrained",
            seeded(lambda: Streams((Manifold() for _ in range(3)), -2)),
            inputs,
            blocks,
            identity=False,
            matrices=matrices,
            note="four streams before the channels, maps that depend on the token",
        ),
    ]

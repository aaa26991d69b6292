"""Models to refuse: nothing is added to a residual stream, or what is added cannot be told from the stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .arrangements import Embedded, Loop
from .example import BATCH, HIDDEN, TOKENS, Example, Inputs, floats, seeded, token_inputs
from .gpt import MLP, CausalSelfAttention


class ReversibleLayer(nn.Module):
    """Two streams, each receives a branch of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_f, self.norm_g = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn, self.mlp = CausalSelfAttention(), MLP()

    def forward(self, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross over."""
        left, right = streams
        left = left + self.attn(self.norm_f(right))
        right = right + self.mlp(self.norm_g(left))
        return left, right


class Reversible(nn.Module):
    """A stack of reversible layers that starts from two different streams."""

    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.layers = nn.ModuleList(ReversibleLayer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Split, cross over, join."""
        left, right = self.split(x).chunk(2, dim=-1)
        for layer in self.layers:
            left, right = layer((left, right))
        return left + right


class JoinedLayer(nn.Module):
    """Stream and branch are concatenated and projected: nothing is added."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = CausalSelfAttention()
        self.mlp = MLP()
        self.merge = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Join and project, twice."""
        x = self.merge(torch.cat([x, self.attn(x)], dim=-1))
        return self.merge(torch.cat([x, self.mlp(x)], dim=-1))


class ClassTokenLayer(nn.Module):
    """The class token is cut off, the other tokens get the branches, and both are joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn, self.mlp = CausalSelfAttention(), MLP()
        self.pool = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Cut, add, pool, join."""
        first, rest = x[:, :1], x[:, 1:]
        rest = rest + self.attn(self.norm1(rest))
        rest = rest + self.mlp(self.norm2(rest))
        return torch.cat([self.pool(first + rest.mean(1, keepdim=True)), rest], dim=1)


class MaskedLayer(nn.Module):
    """The branches are added to every other token only, through an index."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn, self.mlp = CausalSelfAttention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        """Add in place where the mask says so."""
        mask = torch.arange(x.shape[1]) % 2 == 0
        x = x.clone()
        x[:, mask] += self.attn(self.norm1(x[:, mask]))
        x[:, mask] += self.mlp(self.norm2(x[:, mask]))
        return x


class PlainRecurrent(nn.Module):
    """Stacked GRUs without any residual."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(HIDDEN, HIDDEN, num_layers=3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run along the tokens."""
        return self.rnn(x)[0]


class NoSkipLayer(nn.Module):
    """Attention and MLP in sequence: nothing is added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attn, self.mlp = CausalSelfAttention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        """No residual."""
        return self.mlp(self.attn(self.norm(x)))


def vectors(model: nn.Module) -> Inputs:
    """A batch of vectors."""
    return (floats(BATCH, HIDDEN),), {}


def pixels(model: nn.Module) -> Inputs:
    """Small pictures."""
    return (floats(BATCH, 3, 16, 16),), {}


def plain_mlp() -> nn.Module:
    """Linear layers and activations."""
    return nn.Sequential(nn.Linear(HIDDEN, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


def plain_cnn() -> nn.Module:
    """Convolutions, pooling, a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )


def build_cnn() -> nn.Module:
    """The CNN with its last layer's width known."""
    model = plain_cnn()
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16))
    return model


def members() -> list[Example]:
    """Every model of this module."""

    def refused(name: str, build: object, inputs: object, note: str) -> Example:
        return Example(
            name,
            seeded(build),
            inputs,
            expected_refusal=True,
            norm_scheme="none",
            identity=False,  # type: ignore[arg-type]
            note=note,
        )

    def stream(model: nn.Module) -> Inputs:
        return (floats(BATCH, TOKENS, HIDDEN),), {}

    return [
        refused("refused_reversible", Reversible, stream, "two streams"),
        refused(
            "refused_joined_stream",
            lambda: Embedded(Loop([JoinedLayer() for _ in range(3)])),
            token_inputs,
            "the stream is concatenated with the branch and projected",
        ),
        refused(
            "refused_class_token",
            lambda: Embedded(Loop([ClassTokenLayer() for _ in range(3)])),
            token_inputs,
            "the stream is cut and joined inside the block",
        ),
        refused(
            "refused_masked_add",
            lambda: Embedded(Loop([MaskedLayer() for _ in range(3)])),
            token_inputs,
            "indexed residual adds: refuse, or report every block as unverified",
        ),
        refused("refused_mlp", plain_mlp, vectors, "no residual"),
        refused("refused_cnn", build_cnn, pixels, "no residual"),
        refused("refused_recurrent", PlainRecurrent, stream, "no residual"),
        refused(
            "refused_no_skip",
            lambda: Embedded(Loop([NoSkipLayer() for _ in range(3)])),
            token_inputs,
            "attention and MLP, but nothing is added",
        ),
    ]

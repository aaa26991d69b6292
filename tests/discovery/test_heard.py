"""Where the stream behind a block is heard, in models that add up their branches around lists of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_spectral import find_blocks
from lightning_spectral.measuring.block_outputs import BlockOutputs
from lightning_spectral.records import StreamAt
from lightning_spectral.records.plain import from_plain, to_plain
from lightning_spectral.tokens import token_residual

WIDTH = 8


class Attention(nn.Module):
    """Has its norm inside, so that it takes the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Layers(nn.Module):
    """A list of pairs, as in many models of images: nothing returns the stream between two of them."""

    def __init__(self, depth: int, *, last: str) -> None:
        super().__init__()
        parts = ([nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)] for _ in range(depth))
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), nn.Sequential(*mlp)]) for mlp in parts)
        self.norm = nn.LayerNorm(WIDTH) if last == "norm" else None
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = []
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
            self.seen.append(x.detach().clone())
        return x if self.norm is None else self.norm(x)


class Model(nn.Module):
    def __init__(self, last: str) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(3, WIDTH), Layers(3, last=last), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x))[:, 0])


@pytest.mark.parametrize(
    ("last", "behind"), [("norm", StreamAt("body.norm", taken=True)), ("returned", StreamAt("body"))]
)
def test_streams_between_lists_of_branches_are_heard(last: str, behind: StreamAt, generator: torch.Generator):
    model, x = Model(last), torch.randn(4, 5, 3, generator=generator)
    blocks = find_blocks(model, batch=x)
    between = [StreamAt(f"body.layers.{index}.0", taken=True) for index in (1, 2)]
    assert [block.stream for block in blocks] == [*between, behind]
    assert [block.stream for block in from_plain(to_plain(blocks))] == [block.stream for block in blocks]
    outputs = BlockOutputs(model, blocks)
    outputs.start()
    model(x)
    outputs.stop()
    assert [item.token_residual for item in outputs.values().values()] == [
        pytest.approx(float(token_residual(stream).mean()), rel=1e-5) for stream in model.body.seen
    ]


def test_blocks_that_return_their_stream_are_heard_there():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True)
    blocks = find_blocks(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    assert [block.stream for block in blocks] == [StreamAt("layers.0"), StreamAt("layers.1")]


def test_a_module_of_a_branch_is_no_place(generator: torch.Generator):
    """A norm behind the branch is its site, so that the MLP in front of it is in the name of the block."""

    class Sandwich(Model):
        def __init__(self) -> None:
            super().__init__("norm")
            self.behind = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for index, (attention, mlp) in enumerate(self.body.layers):
                x = self.behind[2 * index](attention(x)) + x
                x = self.behind[2 * index + 1](mlp(x)) + x
            return self.head(self.body.norm(x)[:, 0])

    blocks = find_blocks(Sandwich(), batch=torch.randn(4, 5, 3, generator=generator))
    assert [block.stream.module for block in blocks] == ["body.layers.1.0", "body.layers.2.0", "body.norm"]


def test_a_module_that_runs_twice_is_no_place(generator: torch.Generator):
    class Twice(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.embed(x))
            return self.head(self.body.norm(x)[:, 0])

    blocks = find_blocks(Twice("norm"), batch=torch.randn(4, 5, 3, generator=generator))
    assert [block.stream.module for block in blocks] == ["body.layers.1.0", "body.layers.2.0", None]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["body"], r"a stream is heard at \['body'\]: expected a module and whether"),
        (["body", 1], "found 1, expected a bool"),
        ("body", "expected"),
    ],
)
def test_a_place_that_nobody_wrote_is_refused(wrong: Any, said: str, generator: torch.Generator):
    plain = to_plain(find_blocks(Model("norm"), batch=torch.randn(4, 5, 3, generator=generator)))
    plain["blocks"][0]["stream"] = wrong
    with pytest.raises(ValueError, match=said):
        from_plain(plain)

"""Blocks that turn the stream over, add a branch that mixes tokens, and turn the stream back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import find_blocks, measure

WIDTH = 16


class TurnsOver(nn.Module):
    """Adds its token mixing in the layout (samples, width, tokens)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(tokens, 24), nn.GELU(), nn.Linear(24, tokens))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = F.rms_norm(x + self.tokens(x), x.shape[-1:]).transpose(1, 2)
        return F.rms_norm(x + self.mlp(x), x.shape[-1:])


class TurnsPictureOver(TurnsOver):
    """Mixes along the width of a picture (samples, rows, columns, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 1, 3, 2)
        x = (x + self.tokens(x)).permute(0, 1, 3, 2)
        return x + self.mlp(x)


class TurnsTwice(TurnsOver):
    """Begins with the branch that mixes channels, so that each block ends turned over."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        x = x.mT
        x = x + self.tokens(x)
        return x.mT


class TokensLast(TurnsOver):
    """Takes and returns what a convolution makes: (samples, width, tokens)."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.tokens(x)).mT
        return (x + self.mlp(x)).mT


class Model(nn.Module):
    def __init__(self, block: type[TurnsOver], tokens: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(tokens) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.begin = nn.Conv1d(4, WIDTH, 1) if block is TokensLast else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(2) if isinstance(self.begin, nn.Conv1d) else x.flatten(1, -2).mean(1))


SHAPES = {
    TurnsOver: (2, -1, WIDTH),
    TurnsPictureOver: (2, 5, -1, WIDTH),
    TurnsTwice: (2, -1, WIDTH),
    TokensLast: (2, 4, -1),
}


@pytest.mark.parametrize("tokens", [12, WIDTH])  # with as many tokens as channels both have one shape
@pytest.mark.parametrize("block", SHAPES)
def test_what_multiplies_the_tokens_of_a_stream_that_is_turned_over_mixes_them(block: type[TurnsOver], tokens: int):
    torch.manual_seed(0)
    model = Model(block, tokens).double()
    batch = torch.randn([tokens if size < 0 else size for size in SHAPES[block]], dtype=torch.float64)
    blocks = find_blocks(model, batch=batch)
    assert [(item.name, item.verified) for item in blocks] == [("blocks.0", True), ("blocks.1", True)]
    for found, own, layer in zip(blocks, model.blocks, measure(model, blocks, batch=batch).layers, strict=True):
        assert {branch.site: branch.kind for branch in found.branches} == {
            f"{found.name}.mlp": "mlp",
            f"{found.name}.tokens": "mixer",
        }
        mlp = torch.linalg.matrix_norm(own.mlp[2].weight @ own.mlp[0].weight, 2)
        assert layer.mlp_norm == pytest.approx(mlp.item(), rel=1e-6)
        assert layer.attention_reason == "a token mixer that is not attention has no weight linearization"


class Attention(nn.Module):
    """Attention between the places of a picture (samples, channels, rows, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).mT).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)).mT.reshape(x.shape)


class Map(nn.Module):
    """Attention and an MLP of linear layers on a picture with channels in front, without any norm."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.attention, self.tokens = Attention(), nn.Linear(tokens, tokens)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MapWithMLPFirst(Map):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.attention(x)


class MapWithTokens(Map):
    """Also has a layer that multiplies the columns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.tokens(x))


@pytest.mark.parametrize("size", [6, WIDTH])
@pytest.mark.parametrize("block", [Map, MapWithMLPFirst, MapWithTokens])
def test_attention_tells_where_the_other_branches_of_its_stream_have_their_channels(block: type[Map], size: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), block(size), block(size))
    blocks = find_blocks(model, batch=torch.randn(2, 3, 5, size))
    for found, layer in zip(blocks, measure(model, blocks).layers, strict=True):
        own = model.get_submodule(found.name)
        assert found.doubt is None
        assert found.token_dims == (2, 3)
        mixers = [branch.site for branch in found.branches if branch.kind == "mixer"]
        assert mixers == ([f"{found.name}.tokens"] if block is MapWithTokens else [])
        norm = torch.linalg.matrix_norm((own.mlp[2].weight @ own.mlp[0].weight).detach(), 2)
        assert layer.mlp_norm == pytest.approx(float(norm), rel=1e-5)

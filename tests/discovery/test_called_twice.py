"""Blocks that call one of their modules twice: attention along rows and columns, one MLP before and after attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import attach_scales, find_blocks, measure

WIDTH = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))

    def norm_by_hand(self) -> float:
        return float(torch.linalg.matrix_norm(self.out.weight @ self.qkv.weight[2 * WIDTH :], 2).detach())


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def norm_by_hand(self) -> float:
        return float(torch.linalg.matrix_norm(self[3].weight @ self[1].weight, 2).detach())


class Block(nn.Module):
    """Attention and an MLP. ``times`` are the sizes of what they add up to, in parts of one call."""

    times = (1.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class RowsAndColumns(Block):
    times = (2.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x) + self.attention(x.transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(x)


class MeanOfBoth(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * (self.attention(x) + self.attention(x.transpose(1, 2)).transpose(1, 2))
        return x + self.mlp(x)


class RowsThenColumns(Block):
    times = (2.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.attention(x.transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(x)


class OneMLPOnBothSides(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.mlp(x)
        x = x + self.attention(x)
        return x + 0.5 * self.mlp(x)


class MLPThrice(Block):
    times = (1.0, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        for _ in range(3):
            x = x + self.mlp(x)
        return x


class Model(nn.Module):
    """Blocks with weights of their own, run over and over, and at the end an MLP that every block may share."""

    def __init__(self, block: type[Block], loops: int = 1) -> None:
        super().__init__()
        self.embed, self.loops = nn.Linear(3, WIDTH), loops
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
        return x


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("kind", [Block, RowsAndColumns, MeanOfBoth, RowsThenColumns, OneMLPOnBothSides, MLPThrice])
def test_a_branch_counts_as_often_as_one_run_of_its_block_calls_it(kind: type[Block], loops: int) -> None:
    torch.manual_seed(0)
    model, grid = Model(kind, loops), torch.randn(2, 4, 5, 3)
    blocks = find_blocks(model, batch=grid)
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1"]
    assert [block.doubt for block in blocks] == [None, None]
    for block, layer in zip(model.blocks, measure(model, blocks).layers, strict=True):
        norms = (block.times[0] * block.attention.norm_by_hand(), block.times[1] * block.mlp.norm_by_hand())
        assert (layer.attention_norm, layer.mlp_norm) == pytest.approx(norms, rel=1e-5)


def test_one_block_that_runs_over_and_over_is_counted_once() -> None:
    torch.manual_seed(0)

    class Universal(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for _ in range(3):
                x = self.blocks[0](x)
            return x

    model = Universal(Block)
    (layer,) = measure(model, find_blocks(model, batch=torch.randn(2, 4, 5, 3))).layers
    assert layer.attention_norm == pytest.approx(model.blocks[0].attention.norm_by_hand(), rel=1e-5)


class OneMLP(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block.attention(x)
            x = x + self.blocks[0].mlp(x)
        return x


class OneAttention(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + self.blocks[0].attention(x)
            x = x + block.mlp(x)
        return x


class OneAttentionInAll(Model):
    """The same through the modules of the blocks."""

    def __init__(self, block: type[Block]) -> None:
        super().__init__(block)
        for other in self.blocks[1:]:
            other.attention = self.blocks[0].attention


@pytest.mark.parametrize("model", [OneMLP, OneAttention, OneAttentionInAll])
def test_a_branch_that_all_blocks_share_is_counted_once(model: type[Model]) -> None:
    torch.manual_seed(0)
    made = model(Block)
    first, *_ = measure(made, find_blocks(made, batch=torch.randn(2, 4, 5, 3))).layers
    own = made.blocks[0]
    expected = own.attention.norm_by_hand(), own.mlp.norm_by_hand()
    assert (first.attention_norm, first.mlp_norm) == pytest.approx(expected, rel=1e-5)


class SharedMLP(Block):
    """Two streams, each with its own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Attention()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x + self.attention(x), y + self.second(y)
        return x + self.mlp(x), y + self.mlp(y)


class SharedAttention(Block):
    """Two streams, each with its own MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.second = MLP()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(x)
        x = x + self.mlp(x)
        y = y + self.attention(y)
        return x, y + self.second(y)


@pytest.mark.parametrize("kind", [SharedMLP, SharedAttention])
def test_calls_on_two_streams_are_not_added_up(kind: type[Block]) -> None:
    torch.manual_seed(0)

    class Both(Model):
        def forward(self, x: Tensor) -> Tensor:
            x, y = self.embed(x), self.embed(x.flip(1)).sin()
            for block in self.blocks:
                x, y = block(x, y)
            return torch.cat([x, y], 1)

    model = Both(kind)
    blocks = find_blocks(model, batch=torch.randn(2, 4, 5, 3))
    assert [block.doubt for block in blocks] == 2 * ["its residual adds do not lie on one stream"]
    for block, layer in zip(model.blocks, measure(model, blocks).layers, strict=True):
        norm, twin = (layer.mlp_norm, block.mlp) if kind is SharedMLP else (layer.attention_norm, block.attention)
        assert norm == pytest.approx(twin.norm_by_hand(), rel=1e-5)


@pytest.mark.parametrize("kind", [RowsAndColumns, OneMLPOnBothSides])
def test_a_scale_at_a_branch_that_is_called_twice_scales_both_calls(kind: type[Block]) -> None:
    torch.manual_seed(0)
    model, grid = Model(kind), torch.randn(2, 4, 5, 3)
    blocks = find_blocks(model, batch=grid)
    before = measure(model, blocks).layers
    scales = attach_scales(model, blocks)
    with torch.no_grad():
        for parameter in scales.parameters():
            parameter.fill_(-math.inf)  # the logarithm of 0
    assert torch.equal(model(grid), model.embed(grid))
    with torch.no_grad():
        for parameter in scales.parameters():
            parameter.fill_(math.log(0.5))
    after = measure(model, blocks).layers
    assert [layer.mlp_norm for layer in after] == pytest.approx([0.5 * layer.mlp_norm for layer in before], rel=1e-5)

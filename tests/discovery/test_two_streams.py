"""Blocks that keep a stream of tokens and a stream of pairs of tokens, as models of proteins do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import History, Watch, find_blocks, measure

WIDTH, PAIRS, TOKENS = 16, 8, 5


class Attention(nn.Module):
    """Attention along the last but one dimension, with a bias for each pair of positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


class Transition(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


class Both(nn.Module):
    """Attention along rows, along columns and a transition for pairs; then attention and a transition for tokens."""

    def __init__(self, width: int = PAIRS) -> None:
        super().__init__()
        self.rows, self.columns, self.pairs = Attention(width), Attention(width), Transition(width)
        self.bias = nn.Linear(width, 1)
        self.attention, self.transition = Attention(WIDTH), Transition(WIDTH)

    def forward(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z + self.rows(z)
        z = z + self.columns(z.transpose(1, 2)).transpose(1, 2)
        z = z + self.pairs(z)
        s = s + self.attention(s, self.bias(z).squeeze(-1))
        return s + self.transition(s), z


class PairsWithoutAttention(Both):
    """Nothing attends on the stream of pairs."""

    def forward(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z + self.pairs(z)
        s = s + self.attention(s, self.bias(z).squeeze(-1))
        return s + self.transition(s), z


class Exchanging(Both):
    """The tokens also write to the pairs, so that each stream is made of the other one's past."""

    def __init__(self, width: int = PAIRS) -> None:
        super().__init__(width)
        self.left = nn.Linear(WIDTH, width)

    def forward(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        s = s + self.attention(s, self.bias(z).squeeze(-1))
        s = s + self.transition(s)
        z = z + self.left(s)[:, :, None] * self.left(s)[:, None]
        z = z + self.rows(z)
        z = z + self.columns(z.transpose(1, 2)).transpose(1, 2)
        return s, z + self.pairs(z)


class Model(nn.Module):
    def __init__(self, block: type[Both], width: int) -> None:
        super().__init__()
        self.tokens, self.begin = nn.Linear(4, WIDTH), nn.Linear(4, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        s, z = self.tokens(x), self.begin(x)[:, :, None] * self.begin(x)[:, None]
        for block in self.blocks:
            s, z = block(s, z)
        return self.head(s) + z.mean()


def norm(*factors: Tensor) -> float:
    product = factors[0]
    for factor in factors[1:]:
        product = product @ factor
    return float(torch.linalg.matrix_norm(product.detach(), 2))


def of_attention(*parts: Attention) -> float:
    """Of the sum of the branches; γ is not 1."""
    width = parts[0].out.weight.shape[0]
    return norm(sum(part.out.weight @ part.qkv.weight[2 * width :] @ part.norm.weight.diag() for part in parts))


def of_transition(part: Transition) -> float:
    return norm(part[3].weight, part[1].weight, part[0].weight.diag())


def shaken(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
    return model.double()


@pytest.mark.parametrize("block", [Both, Exchanging])
@pytest.mark.parametrize("width", [PAIRS, WIDTH])
def test_a_block_on_each_of_two_streams_is_two_blocks(block: type[Both], width: int):
    torch.manual_seed(0)
    model = shaken(Model(block, width))
    batch = torch.randn(2, TOKENS, 4, dtype=torch.float64)
    blocks = find_blocks(model, batch=batch)
    assert all(block.verified for block in blocks)
    layers = {layer.name: layer for layer in measure(model, blocks, batch=batch)}
    for i, own in enumerate(model.blocks):
        pairs = layers.pop(f"blocks.{i}.rows + blocks.{i}.pairs")
        tokens = layers.pop(f"blocks.{i}.attention + blocks.{i}.transition")
        assert pairs.mlp_norm == pytest.approx(of_transition(own.pairs), rel=1e-6)
        assert pairs.attention_norm == pytest.approx(of_attention(own.rows, own.columns), rel=1e-6)
        assert tokens.mlp_norm == pytest.approx(of_transition(own.transition), rel=1e-6)
        assert tokens.attention_norm == pytest.approx(of_attention(own.attention), rel=1e-6)
    assert not layers
    assert [("second stream" in note) for note in blocks.notes] == ([] if block is Both else [True])


def test_a_stream_of_another_width_takes_no_norm_from_a_block():
    torch.manual_seed(0)
    model = shaken(Model(PairsWithoutAttention, PAIRS))
    batch = torch.randn(2, TOKENS, 4, dtype=torch.float64)
    for i, own in enumerate(model.blocks):
        pairs, tokens = measure(model, batch=batch).layers[2 * i : 2 * i + 2]
        assert (pairs.name, pairs.reason) == (f"blocks.{i}.pairs", "attention: the block has none")
        assert pairs.mlp_norm == pytest.approx(of_transition(own.pairs), rel=1e-6)
        assert tokens.mlp_norm == pytest.approx(of_transition(own.transition), rel=1e-6)
        assert tokens.attention_norm == pytest.approx(of_attention(own.attention), rel=1e-6)


def test_the_tokens_of_both_streams_are_heard(tmp_path: Path):
    torch.manual_seed(0)
    model, batch = Model(Both, PAIRS), torch.randn(4, TOKENS, 4)
    expected = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: expected.extend([output[1], output[0]]))
    model(batch)
    optimizer = torch.optim.AdamW(model.parameters())
    with Watch(model, tmp_path, optimizers=optimizer, every_n_steps=1) as watch:
        watch.before_step(batch)
        model(batch).square().mean().backward()
        optimizer.step()
        watch.step(1)
    heard = History.read(tmp_path).values("token_residual")[:, 0]
    streams = [stream.detach().double().flatten(1, -2) for stream in expected[:4]]
    spreads = [(x - x.mean(1, keepdim=True)).norm(dim=(1, 2)) / x.norm(dim=(1, 2)) for x in streams]
    assert heard == pytest.approx([spread.mean().item() for spread in spreads], rel=1e-3)


class RemembersItsRoutes(nn.Module):
    """A gate of the MLP adds to what it was in the block before: a stream of its own, inside of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(WIDTH), Transition(WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor, routes: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x + self.attention(x)
        routes = self.down(x) if routes is None else self.down(x) + routes
        return x + self.mlp(x) * self.up(routes).sigmoid(), routes


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begin, self.blocks = nn.Linear(4, WIDTH), nn.ModuleList(RemembersItsRoutes() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, routes = self.begin(x), None
        for block in self.blocks:
            x, routes = block(x, routes)
        return x


def test_a_second_stream_inside_of_a_branch_is_the_matter_of_that_branch():
    torch.manual_seed(0)
    model = shaken(Remembering())
    blocks = find_blocks(model, batch=torch.randn(2, TOKENS, 4, dtype=torch.float64))
    assert [block.doubt for block in blocks] == [None] * 3
    for own, layer in zip(model.blocks, measure(model, blocks), strict=True):
        assert layer.attention_norm == pytest.approx(of_attention(own.attention), rel=1e-6)
        assert layer.mlp_norm == pytest.approx(of_transition(own.mlp), rel=1e-6)

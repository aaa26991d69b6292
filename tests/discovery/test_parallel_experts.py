"""Mixtures whose tokens lie sorted in one tensor, and one matrix of every expert after the other goes over it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_spectral import ExactSVD, find_blocks, measure

WIDTH, COUNT, HIDDEN, HEADS = 16, 4, 12, 2


class Stacked(nn.Module):
    """One matrix for every expert, in one parameter; the tokens of all experts lie in one tensor."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(COUNT, d_out, d_in) / d_in**0.5)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        parts = x.split(sizes)
        return torch.cat([F.linear(part, self.weight[place]) for place, part in enumerate(parts)])

    def matrices(self) -> list[Tensor]:
        return list(self.weight.detach())


class Listed(nn.Module):
    """The same with a layer for every expert."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out, bias=False) for _ in range(COUNT))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([layer(part) for layer, part in zip(self.layers, x.split(sizes), strict=True)])

    def matrices(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.layers]


class Sorted(nn.Module):
    """Sorts tokens by expert, two for each token. A router of zeros sends all tokens to one pair of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, COUNT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        values, chosen = self.router(x).topk(2)
        order = chosen.flatten().argsort(stable=True)
        sizes = torch.bincount(chosen.flatten(), minlength=COUNT).tolist()
        return order, values.softmax(-1).flatten()[order], sizes


class Mixture(nn.Module):
    def __init__(self, kind: type[Stacked | Listed]) -> None:
        super().__init__()
        self.sort, self.first, self.second = Sorted(), kind(WIDTH, HIDDEN), kind(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        order, weights, sizes = self.sort(flat)
        rows = self.second(F.gelu(self.first(flat[order // 2], sizes)), sizes) * weights[:, None]
        return torch.zeros_like(flat).index_add(0, order // 2, rows).view_as(x)

    def norms(self) -> list[float]:
        return [_norm(B @ A) for A, B in zip(self.first.matrices(), self.second.matrices(), strict=True)]


class HeadsAsExperts(nn.Module):
    """Mixture of attention: each expert has queries and an output projection, and all have the same keys and values."""

    def __init__(self, kind: type[Stacked | Listed]) -> None:
        super().__init__()
        self.sort, self.query, self.out = Sorted(), kind(WIDTH, HEADS * 4), kind(HEADS * 4, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * HEADS * 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        flat = x.flatten(0, 1)
        order, weights, sizes = self.sort(flat)
        rows = self.query(flat[order // 2], sizes)
        q = torch.zeros_like(rows).index_add(0, order, rows).view(batch, tokens, 2 * HEADS, 4)
        k, v = (part.view(batch, tokens, HEADS, 4).repeat(1, 1, 2, 1) for part in self.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        rows = self.out(y.transpose(1, 2).reshape(len(order), -1)[order], sizes) * weights[:, None]
        return torch.zeros_like(flat).index_add(0, order // 2, rows).view_as(x)

    def norms(self) -> list[float]:
        return [_norm(out @ self.kv.weight.detach()[HEADS * 4 :]) for out in self.out.matrices()]


def _norm(A: Tensor) -> float:
    return torch.linalg.matrix_norm(A, 2).item()


class Block(nn.Module):
    def __init__(self, kind: type[Stacked | Listed]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention, self.mlp = HeadsAsExperts(kind), Mixture(kind)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


@pytest.mark.parametrize("one_pair", [False, True])
@pytest.mark.parametrize("kind", [Stacked, Listed])
def test_every_expert_counts_whichever_the_example_chooses(kind: type[Stacked | Listed], one_pair: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(kind), Block(kind))
    if one_pair:
        for module in model.modules():
            if isinstance(module, Sorted):
                nn.init.zeros_(module.router.weight)
    blocks = find_blocks(model, batch=torch.randn(2, 9, WIDTH))
    assert [block.doubt for block in blocks] == [None, None]
    for block, layer in zip(model, measure(model, blocks, solver=ExactSVD()), strict=True):
        expected = max(block.attention.norms()), max(block.mlp.norms())
        assert (layer.attention_norm, layer.mlp_norm) == pytest.approx(expected, rel=1e-5)


class UnpaddedAttention(nn.Module):
    """Attention over the tokens that are not padding, with queries, keys and values in one stack."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kept = x.abs().sum(-1) > 0
        q, k, v = (x[kept] @ W for W in self.qkv)
        y = torch.zeros_like(x)
        y[kept] = self.out(F.scaled_dot_product_attention(q[None], k[None], v[None])[0])
        return y


def test_a_stack_of_queries_keys_and_values_holds_no_experts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(Stacked), Block(Stacked))
    for block in model:
        block.attention = UnpaddedAttention()
    blocks = find_blocks(model, batch=torch.randn(2, 9, WIDTH))
    for block, layer in zip(model, measure(model, blocks, solver=ExactSVD()), strict=True):
        own = block.attention
        assert layer.attention_norm == pytest.approx(_norm((own.out.weight @ own.qkv[2].mT).detach()), rel=1e-5)

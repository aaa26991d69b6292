"""Mixtures of experts in modules of their own, in every way that their outputs are added up in public code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_spectral import ExactSVD, find_blocks, measure
from lightning_spectral.discovery.chains.linear import LinearPart

WIDTH, COUNT = 32, 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, 24, bias=False) for _ in range(2))
        self.w2 = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


Way = Callable[[nn.ModuleList, Tensor, Tensor], Tensor]  # experts, x (B, T, D), weights (B, T, E)


def on_zeros_like(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for place, expert in enumerate(experts):
        total = total + expert(x) * weights[..., place, None]
    return total


def on_new_zeros_in_place(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    flat, weights = x.flatten(0, 1), weights.flatten(0, 1)
    total = flat.new_zeros(flat.shape)
    for place, expert in enumerate(experts):
        total += expert(flat) * weights[:, place, None]
    return total.view_as(x)


def on_empty_masked(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    chosen, total = weights.argmax(-1), torch.empty_like(x)
    for place, expert in enumerate(experts):
        total[chosen == place] = expert(x[chosen == place])
    return total


def on_a_number(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    return sum(expert(x) * weights[..., place, None] for place, expert in enumerate(experts))


def by_index(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    flat, (values, chosen) = x.flatten(0, 1), weights.flatten(0, 1).topk(2)
    total = torch.zeros_like(flat)
    for place, expert in enumerate(experts):
        rows, slots = torch.where(chosen == place)
        total[rows] += expert(flat[rows]) * values[rows, slots, None]
    return total.view_as(x)


def by_index_add(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    flat, (values, chosen) = x.flatten(0, 1), weights.flatten(0, 1).topk(2)
    total = torch.zeros_like(flat)
    for place, expert in enumerate(experts):
        rows, slots = torch.where(chosen == place)
        total.index_add_(0, rows, expert(flat[rows]) * values[rows, slots, None])
    return total.view_as(x)


def by_where(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    chosen, total = weights.argmax(-1, keepdim=True), torch.zeros_like(x)
    for place, expert in enumerate(experts):
        total = total + torch.where(chosen == place, expert(x), torch.zeros_like(x))
    return total


def in_front(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    return (torch.stack([expert(x) for expert in experts]) * weights.movedim(-1, 0).unsqueeze(-1)).sum(0)


def before_the_channels(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    return (torch.stack([expert(x) for expert in experts], 2) * weights.unsqueeze(-1)).sum(2)


def behind_the_channels(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    return (torch.stack([expert(x) for expert in experts], -1) * weights.unsqueeze(-2)).sum(-1)


def behind_and_expanded(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    every = weights.unsqueeze(-2).expand(-1, -1, WIDTH, -1)
    return (torch.stack([expert(x) for expert in experts]).permute(1, 2, 3, 0) * every).sum(-1)


def as_a_product(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    return (torch.stack([expert(x) for expert in experts], -1) @ weights.unsqueeze(-1)).squeeze(-1)


def sorted_and_back(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    flat, chosen = x.flatten(0, 1), weights.flatten(0, 1).argmax(-1)
    order = chosen.argsort()
    parts = flat[order].split(torch.bincount(chosen, minlength=len(experts)).tolist())
    rows = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    return rows[order.argsort()].view_as(x)


def _places(weights: Tensor, count: int, places: int) -> Tensor:
    """Return combine weights (sequences, tokens, experts, places). The first tokens get the places of an expert."""
    combined, taken = torch.zeros(*weights.shape, places), torch.zeros(len(weights), 1, weights.shape[-1])
    for choice in weights.topk(count).indices.unbind(-1):
        mask = F.one_hot(choice, weights.shape[-1]).to(weights)
        place = ((mask.cumsum(1) - 1 + taken) * mask).sum(-1).long()
        taken = taken + mask.sum(1, keepdim=True)
        kept = weights * mask * (place < places)[..., None]
        combined = combined + kept[..., None] * F.one_hot(place.clamp(max=places - 1), places)[:, :, None]
    return combined


def _in_places(experts: nn.ModuleList, x: Tensor, combined: Tensor, dispatched: Tensor) -> Tensor:
    rows = torch.einsum("btd,btep->ebpd", x, dispatched)
    rows = torch.stack([expert(part) for expert, part in zip(experts, rows, strict=True)])
    return torch.einsum("ebpd,btep->btd", rows, combined)


def in_places(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    combined = _places(weights, 1, x.shape[1])
    return _in_places(experts, x, combined, combined.bool().to(x))


def in_too_few_places(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    combined = _places(weights, 2, 5)
    return _in_places(experts, x, combined, combined.bool().to(x) + combined - combined.detach())


def in_places_of_the_batch(experts: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
    combined = _places(weights.flatten(0, 1)[None], 2, x[..., 0].numel())
    return _in_places(experts, x.flatten(0, 1)[None], combined, combined.bool().to(x)).view_as(x)


WAYS = [
    on_zeros_like,
    on_new_zeros_in_place,
    on_empty_masked,
    on_a_number,
    by_index,
    by_index_add,
    by_where,
    in_front,
    before_the_channels,
    behind_the_channels,
    behind_and_expanded,
    as_a_product,
    sorted_and_back,
    in_places,
    in_too_few_places,
    in_places_of_the_batch,
]


class Mixture(nn.Module):
    def __init__(self, way: Way, count: int) -> None:
        super().__init__()
        self.way, self.router = way, nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(Expert() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.experts, x, self.router(x).softmax(-1))


class Block(nn.Module):
    def __init__(self, way: Way, count: int = COUNT) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = Mixture(way, count)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


def built(way: Way, count: int = COUNT) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(Block(way, count) for _ in range(2))), torch.randn(2, 16, WIDTH)


@pytest.mark.parametrize("way", WAYS)
def test_the_norm_is_that_of_the_strongest_expert(way: Way) -> None:
    model, batch = built(way)
    blocks = find_blocks(model, batch=batch)
    assert blocks.notes == ()
    for block, layer in zip(blocks, measure(model, blocks, solver=ExactSVD()), strict=True):
        assert block.verified
        assert [branch.site for branch in block.branches] == [f"{block.name}.attention", f"{block.name}.mlp"]
        experts = model[block.index].mlp.experts
        norms = [
            torch.linalg.matrix_norm((expert.w2.weight @ expert.w3.weight).detach(), 2).item() for expert in experts
        ]
        assert layer.mlp_norm == pytest.approx(max(norms), rel=1e-5)
        assert layer.mlp_expert == norms.index(max(norms))


@pytest.mark.parametrize("way", [on_zeros_like, by_index, by_index_add])
def test_the_work_grows_with_the_experts_and_not_with_their_pairs(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sum of experts leads through all sums behind it, and 256 experts are common."""
    executed = []
    run = LinearPart._executed
    monkeypatch.setattr(LinearPart, "_executed", lambda self, *given: executed.append(1) or run(self, *given))
    counts = []
    for count in (8, 32):
        executed.clear()
        model, batch = built(way, count)
        found = find_blocks(model, batch=batch)
        assert [len(block.mlp.paths) for block in found if block.mlp] == [count, count]
        counts.append(len(executed))
    assert counts[1] < 6 * counts[0]  # 4 times the experts; 16 times the pairs


@pytest.mark.parametrize("way", [in_places, in_too_few_places, in_places_of_the_batch, as_a_product])
def test_the_shapes_alone_show_the_same_experts(way: Way) -> None:
    """A sum of one-hot weights and what they were made of is no stream: the made-up content has to be one-hot too."""
    model, batch = built(way)
    assert find_blocks(model.to("meta"), batch=batch.to("meta")) == find_blocks(built(way)[0], batch=batch)

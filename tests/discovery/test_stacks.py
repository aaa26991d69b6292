"""Several streams side by side: the branches between are ordinary, and what is written counts by its mean square."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from journals import read_journal
from tiny_run import LitGPT, fit
from torch import Tensor, nn

from lightning_spectral import ExactSVD, SpectralMonitor, find_blocks, measure

D, HEADS, VOCABULARY, N, BATCH, TOKENS = 16, 2, 50, 4, 2, 7


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Connection(nn.Module):
    """A branch between a read map and a write map; what each layout does with them is in ``LAYOUTS``."""

    def __init__(self, branch: nn.Module, layout: str) -> None:
        super().__init__()
        self.branch, self.layout, self.norm = branch, layout, nn.LayerNorm(D)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.read, self.write = nn.Parameter(torch.rand(N)), nn.Parameter(torch.rand(N))
        self.mix = nn.Parameter(torch.eye(N) + 0.1 * torch.randn(N, N))
        self.maps = nn.Linear(N * D if layout == "flat" else D, N)

    def forward(self, streams: Tensor) -> Tensor:
        return LAYOUTS[self.layout](self, streams)

    def run(self, x: Tensor) -> Tensor:
        return self.branch(self.norm(x))


def in_front(self: Connection, s: Tensor) -> Tensor:
    y = self.run(torch.einsum("n,nbtd->btd", self.read, s))
    return torch.einsum("mn,nbtd->mbtd", self.mix, s) + self.write[:, None, None, None] * y


def before_channels(self: Connection, s: Tensor) -> Tensor:
    y = self.run(torch.einsum("n,btnd->btd", self.read, s))
    return torch.einsum("mn,btnd->btmd", self.mix, s) + torch.einsum("n,btd->btnd", self.write, y)


def in_the_batch(self: Connection, s: Tensor) -> Tensor:
    s = s.unflatten(0, (-1, N))
    y = self.run(torch.einsum("n,bntd->btd", self.read, s))
    return (torch.einsum("mn,bntd->bmtd", self.mix, s) + torch.einsum("n,btd->bntd", self.write, y)).flatten(0, 1)


def by_product(self: Connection, s: Tensor) -> Tensor:
    y = self.run((self.read @ s).squeeze(-2))
    return self.mix @ s + self.write[:, None] * y[..., None, :]


def mean(self: Connection, s: Tensor) -> Tensor:
    return s + self.run(s.mean(2)).unsqueeze(2)


def half(self: Connection, s: Tensor) -> Tensor:
    return s + 0.5 * self.run(s.sum(2)).unsqueeze(2).expand_as(s)


def first(self: Connection, s: Tensor) -> Tensor:
    return s + self.write.view(N, 1) * self.run(s[:, :, 0]).unsqueeze(2)


def by_token(self: Connection, s: Tensor) -> Tensor:
    read, write = torch.sigmoid(self.maps(s.mean(2))), torch.tanh(self.maps(s.mean(2)))
    mix = torch.softmax(self.maps(s), -1)
    y = self.run((read.unsqueeze(-1) * s).sum(2))
    return mix.transpose(-1, -2) @ s + write.unsqueeze(-1) * y.unsqueeze(2)


def by_token_einsum(self: Connection, s: Tensor) -> Tensor:
    read, write = torch.sigmoid(self.maps(s.mean(2))), torch.tanh(self.maps(s.mean(2)))
    mix = torch.softmax(self.maps(s), -1)
    y = self.run(torch.einsum("btn,btnd->btd", read, s))
    return torch.einsum("btmn,btnd->btmd", mix, s) + torch.einsum("btn,btd->btnd", write, y)


def flat(self: Connection, s: Tensor) -> Tensor:
    gate = torch.sigmoid(self.maps(s)).unsqueeze(-1)
    y = self.run((gate * s.unflatten(-1, (N, D))).sum(-2))
    return s + (gate * y.unsqueeze(-2)).flatten(-2)


LAYOUTS: dict[str, Callable[[Connection, Tensor], Tensor]] = {
    "in front": in_front,
    "before the channels": before_channels,
    "in the batch": in_the_batch,
    "by product": by_product,
    "mean": mean,
    "half": half,
    "first": first,
    "by token": by_token,
    "by token, einsum": by_token_einsum,
    "flat": flat,
}
LEARNT = {"in front", "before the channels", "in the batch", "by product", "first"}
BY_TOKEN = {"by token", "by token, einsum", "flat"}


class Model(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout, self.tokens, self.head = layout, nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        self.layers = nn.ModuleList(
            nn.Sequential(Connection(Attention(), layout), Connection(MLP(), layout)) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        kinds = {"in front": lambda: torch.stack([x] * N), "flat": lambda: x.repeat(1, 1, N)}
        kinds["in the batch"] = lambda: x.repeat_interleave(N, 0)
        s = kinds.get(self.layout, lambda: x.unsqueeze(2).repeat(1, 1, N, 1))()
        for layer in self.layers:
            s = layer(s)
        ends = {"in front": lambda: s.sum(0), "flat": lambda: s.unflatten(-1, (N, D)).sum(-2)}
        ends["in the batch"] = lambda: s.unflatten(0, (-1, N)).sum(1)
        return self.head(ends.get(self.layout, lambda: s.sum(2))())


def by_hand(connection: Connection) -> float:
    """The norm of the branch on one stream, times the root of the mean square of what writes it."""
    branch, gain = connection.branch, connection.norm.weight
    left, right = (branch.o, branch.v) if isinstance(branch, Attention) else (branch.down, branch.up)
    number = float(torch.linalg.matrix_norm((left.weight @ right.weight * gain).detach().double(), 2))
    if connection.layout in LEARNT:
        return number * float(connection.write.detach().double().square().mean().sqrt())
    return number * (0.5 if connection.layout == "half" else 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_branches_between_streams_have_their_norms(layout: str) -> None:
    torch.manual_seed(3)
    model = Model(layout)
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    blocks = find_blocks(model, batch=ids)
    assert [block.name for block in blocks] == ["layers.0", "layers.1"]
    assert all(block.verified for block in blocks)
    assert {block.token_dims for block in blocks} == {(1,)}
    told = [note for note in blocks.notes if "4 streams side by side" in note]
    assert len(told) == (layout in BY_TOKEN)
    result = measure(model, blocks, solver=ExactSVD())
    assert [note for note in result.notes if "4 streams" in note] == told
    for measured, layer in zip(result, model.layers, strict=True):
        attention, mlp = map(by_hand, layer)
        assert measured.attention_norm == pytest.approx(attention, rel=1e-5)
        assert measured.mlp_norm == pytest.approx(mlp, rel=1e-5)


def test_a_write_vector_of_twice_the_size_writes_twice_as_much() -> None:
    """The law behind the mean square: the streams move by it, all of them together, relative to their size."""
    torch.manual_seed(3)
    model = Model("in front")
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    blocks = find_blocks(model, batch=ids)
    before = measure(model, blocks, solver=ExactSVD()).layers[0]
    with torch.no_grad():
        model.layers[0][1].write.mul_(2.0)
    after = measure(model, blocks, solver=ExactSVD()).layers[0]
    assert after.mlp_norm == pytest.approx(2 * before.mlp_norm)
    assert after.attention_norm == pytest.approx(before.attention_norm)


def test_a_run_on_several_streams_is_watched_with_its_tokens(tmp_path: Path) -> None:
    module = LitGPT()
    module.model = Model("by token")
    fit(tmp_path, SpectralMonitor(1, geometry=True, on_error="raise"), module=module, max_steps=2)
    records = read_journal(tmp_path / "spectral.jsonl")[1]
    assert all(layer["ratio"] > 0 for layer in records[-1]["layers"])

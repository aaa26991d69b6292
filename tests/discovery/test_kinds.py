"""Blocks of strange build: the norm is the exact one, or there is a reason, or the block is not verified."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import ExactSVD, find_blocks, measure
from lightning_spectral.records import LayerMeasurement

WIDTH, HIDDEN, HEADS, TOKENS = 8, 16, 2, 5
Forward = Callable[[Any, Tensor], Tensor]


def size(matrix: Tensor) -> float:
    """The spectral norm."""
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))


def unit(matrix: Tensor, groups: int = 1) -> Tensor:
    """Groups of rows, each divided by its expected size."""
    parts = matrix.chunk(groups)
    return torch.cat([part * math.sqrt(len(part)) / part.norm() for part in parts])


def rms(x: Tensor) -> Tensor:
    """A norm without gain, written out."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)


class MLP(nn.Module):
    """Two matrices."""

    def __init__(self, hidden: int = HIDDEN, factor: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.factor = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH), factor

    def forward(self, x: Tensor) -> Tensor:
        """Down, activation, up."""
        return self.down(F.gelu(self.up(x))) * self.factor

    @property
    def matrix(self) -> Tensor:
        """What is left without the activation."""
        return self.factor * self.down.weight @ self.up.weight


class Attention(nn.Module):
    """Attention whose pattern, mask and values can be changed."""

    def __init__(
        self, pattern: Forward | None = None, mask: Tensor | None = None, values: Forward | None = None
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gains = nn.Parameter(0.5 + torch.rand(HEADS, 1, 1))
        self.pattern, self.mask, self.values = pattern or (lambda self, a: a), mask, values or (lambda self, v: v)

    def forward(self, x: Tensor) -> Tensor:
        """Heads, written out."""
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.mT
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask, -math.inf)
        mixed = self.pattern(self, scores.softmax(-1)) @ self.values(self, v)
        return self.o(mixed.transpose(1, 2).flatten(2))

    @property
    def matrix(self) -> Tensor:
        """What is left without the pattern."""
        return self.o.weight @ self.v.weight


class Block(nn.Module):
    """An attention and something else."""

    def __init__(self, forward: Forward, attention: nn.Module | None = None, **parts: Any) -> None:
        super().__init__()
        self.attention = Attention() if attention is None else attention
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        """Attention first."""
        return self.function(self, x + self.attention(x))


class Stack(nn.Module):
    """Blocks in a list."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """One after another."""
        for block in self.blocks:
            x = block(x)
        return x


def found(*blocks: nn.Module, tokens: int = TOKENS) -> LayerMeasurement:
    """The measurement of the first block."""
    model = Stack(*blocks).eval()
    x = torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    return next(iter(measure(model, find_blocks(model, batch=x), solver=ExactSVD())))


def plain(self: Any, x: Tensor) -> Tensor:
    """An MLP behind the attention."""
    return x + self.mlp(x)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights every time."""
    torch.manual_seed(0)


# Terms of a sum: signs and repetitions.


class Terms(NamedTuple):
    """How two MLPs, or one of them several times, are added to the stream, and with which numbers."""

    forward: Forward
    numbers: tuple[float, float]


def _in_a_row(self: Any, x: Tensor) -> Tensor:
    y = x + self.first(x)
    return y - self.second(y)


def _again(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    return x + 2 * y - 0.5 * y


TERMS = {
    "difference": Terms(lambda self, x: x + self.first(x) - self.second(x), (1, -1)),
    "one after another": Terms(_in_a_row, (1, -1)),
    "rsub": Terms(lambda self, x: torch.rsub(self.second(x), x + self.first(x), alpha=0.5), (1, -0.5)),
    "sub with alpha": Terms(lambda self, x: torch.sub(x + self.first(x), self.second(x), alpha=0.5), (1, -0.5)),
    "difference taken away": Terms(lambda self, x: x - (self.second(x) - self.first(x)), (1, -1)),
    "twice": Terms(lambda self, x: (lambda y: x + y + y)(self.first(x)), (2, 0)),
    "again with another sign": Terms(_again, (1.5, 0)),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms_count_with_their_signs_and_as_often_as_they_are_added(name: str) -> None:
    """‖M₁ − M₂‖ is not ‖M₁ + M₂‖, and a term that is added twice counts twice."""
    forward, (first, second) = TERMS[name]
    block = Block(forward, first=MLP(), second=MLP() if second else None)
    expected = first * block.first.matrix + (second * block.second.matrix if second else 0)
    layer = found(block)
    assert layer.doubt is None
    assert layer.mlp_norm == pytest.approx(size(expected), rel=1e-5)


# Attention patterns.

PATTERNS: dict[str, tuple[Forward, str]] = {
    "a gain per head": (lambda self, a: self.gains * a, "multiplied by what is made of blocks.0.attention.gains"),
    "a difference": (
        lambda self, a: a - self.gains * a.flip(-1),
        "multiplied by what is made of blocks.0.attention.gains",
    ),
    "a number": (lambda self, a: 3 * a, "adds up to 3 at every token"),
    "centred": (lambda self, a: a - 1 / TOKENS, "adds up to 0 at every token"),
    "the identity added": (lambda self, a: a + torch.eye(TOKENS), "adds up to 2 at every token"),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_does_not_add_up_to_1_is_refused(name: str) -> None:
    """The number would count behind the pattern, so that it must not be lost on it."""
    pattern, reason = PATTERNS[name]
    layer = found(Block(plain, Attention(pattern), mlp=MLP()))
    assert layer.attention_norm is None
    assert reason in str(layer.attention_reason)


@pytest.mark.parametrize(
    "pattern",
    [
        lambda self, a: a.square() / a.square().sum(-1, keepdim=True),
        lambda self, a: (1 - self.gains.sigmoid()) * a + self.gains.sigmoid() * a.flip(-1),
        lambda self, a: F.dropout(a, 0.1, training=False),
    ],
)
def test_a_pattern_that_adds_up_to_1_passes_the_values_on(pattern: Forward) -> None:
    """However it is made: normalized anew, or a mean of two with learned shares."""
    block = Block(plain, Attention(pattern), mlp=MLP())
    assert found(block).attention_norm == pytest.approx(size(block.attention.matrix), rel=1e-5)


def test_an_attention_that_shares_its_last_matrix_with_an_mlp_has_its_own_columns() -> None:
    """Single-stream blocks that join both in front of it: no scale can tell them apart, their norms can."""

    class Joint(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH + HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([super().forward(x), F.gelu(self.up(x))], -1))

    block = Block(lambda self, x: x, Joint())
    layer, joint = found(block), block.attention
    left, right = joint.last.weight.split([WIDTH, HIDDEN], dim=1)
    assert layer.attention_norm == pytest.approx(size(left @ joint.matrix), rel=1e-5)
    assert layer.mlp_norm == pytest.approx(size(right @ joint.up.weight), rel=1e-5)
    assert "share one site" in str(layer.doubt)


def test_a_shift_that_only_the_first_token_shows_is_refused() -> None:
    """h + μ (shifted h − h) is h, but for the first token, in front of which there is nothing."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.share * (F.pad(x, (0, 0, 1, -1)) - x))

    block = Block(forward, mlp=MLP(), share=nn.Parameter(0.5 + torch.rand(WIDTH)))
    assert found(block).mlp_norm is None


# Which positions a branch moves.


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(),
        (torch.arange(TOKENS) >= 2) | torch.eye(TOKENS, dtype=torch.bool),
        ((torch.arange(TOKENS) >= 2) & (torch.arange(TOKENS) >= 2)[:, None]),  # padding that attends to nothing: NaN
    ],
    ids=["to later tokens", "padding", "padding that is NaN"],
)
def test_attention_that_does_not_read_the_first_token_is_attention(mask: Tensor) -> None:
    """Perturbing the first position alone moves no other one there."""
    block = Block(plain, Attention(mask=mask), mlp=MLP())
    layer = found(block)
    assert layer.doubt is None
    assert layer.attention_norm == pytest.approx(size(block.attention.matrix), rel=1e-5)
    assert layer.mlp_norm == pytest.approx(size(block.mlp.matrix), rel=1e-5)


def test_attention_that_is_nan_everywhere_is_not_verified() -> None:
    """Nothing shows whether it mixes tokens."""
    block = Block(plain, Attention(mask=torch.zeros(TOKENS, TOKENS, dtype=torch.bool)), mlp=MLP())
    assert "is NaN on the example input" in str(found(block).doubt)


class GatedConvolution(nn.Module):
    """A focal modulation: a convolution is the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.gate = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """One residual branch."""
        y = self.first(x)
        return x + self.last(y * self.gate(y).sigmoid())


@pytest.mark.parametrize("tokens", [1, 4])
def test_one_pixel_does_not_show_a_convolution(tokens: int) -> None:
    """On one pixel a token mixer looks like an MLP."""
    model = Stack(GatedConvolution(), GatedConvolution())
    block, _ = find_blocks(model, batch=torch.randn(2, WIDTH, tokens, tokens))
    assert ("one position cannot show" in str(block.doubt)) == (tokens == 1)


def test_one_token_with_grouped_queries_is_told_and_no_error() -> None:
    """More query heads than heads of keys and values, and one token."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (1, -1)).transpose(1, 2).chunk(2, -1)
            return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    assert "one position cannot show" in str(found(Block(plain, Grouped(), mlp=MLP()), tokens=1).doubt)


class Pooled(Block):
    """A stage of a hierarchy begins: the attention is added to a stream that is half as long."""

    def __init__(self) -> None:
        super().__init__(plain, mlp=MLP())
        self.shortcut = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Pool both."""
        x, y = (part(x).unflatten(1, (2, -1)).amax(1) for part in (self.shortcut, self.attention))
        return self.function(self, x + y)


def test_attention_before_the_stream_of_a_block_is_told() -> None:
    """The block has an attention, which is part of no residual branch."""
    assert "its first sum passes nothing on of what enters: the skip is projected" in str(
        found(Pooled(), tokens=6).doubt
    )


# Norms of single heads and groups.


def test_a_norm_of_single_heads_divides_each_head_by_its_own_size() -> None:
    """The scale of the values of one head has no effect on the function, and none on the norm."""
    block = Block(plain, Attention(values=lambda self, v: rms(v)), mlp=MLP())
    block.attention.v.weight.data[: WIDTH // HEADS] *= 5
    expected = block.attention.o.weight @ unit(block.attention.v.weight, HEADS)
    assert found(block).attention_norm == pytest.approx(size(expected), rel=1e-5)


def test_a_group_norm_divides_each_group_by_its_own_size() -> None:
    """Numbers right of the norm divide out, numbers left of it and gains count; a norm behind it counts as well."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.group_norm(2 * F.gelu(self.mlp.up(x)).flatten(0, 1), 4, self.gain).view(*x.shape[:2], -1)
        z = rms(self.other.up(x).unflatten(-1, (4, -1))).flatten(-2)
        return x + 3 * self.mlp.down(y) + F.rms_norm(self.other.down(z), (WIDTH,))

    block = Block(forward, mlp=MLP(), other=MLP(), gain=nn.Parameter(0.5 + torch.rand(HIDDEN)))
    block.mlp.up.weight.data[:4] *= 5
    expected = 3 * block.mlp.down.weight @ torch.diag(block.gain) @ unit(block.mlp.up.weight, 4)
    expected = expected + unit(block.other.down.weight @ unit(block.other.up.weight, 4))
    assert found(block).mlp_norm == pytest.approx(size(expected), rel=1e-5)


def test_channels_rearranged_behind_a_norm_of_groups_are_refused() -> None:
    """Which channel belongs to which group is no longer known."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp.down(rms(self.mlp.up(x).unflatten(-1, (4, -1))).transpose(-1, -2).flatten(-2))

    assert "rearranged behind a norm" in str(found(Block(forward, mlp=MLP())).mlp_reason)


# One branch, run several times.


@pytest.mark.parametrize("numbers", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0)])
def test_a_looped_branch_has_one_norm_if_every_call_multiplies_alike(numbers: tuple[float, ...]) -> None:
    """A number per depth belongs to a depth, and the block is listed once."""

    class Looped(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for number in numbers:
                x = x + number * self.blocks[0].attention(x)
                x = x + self.blocks[0].mlp(x)
            return x

    block = Block(plain, mlp=MLP())
    model = Looped(block).eval()
    (layer,) = measure(model, find_blocks(model, batch=torch.randn(2, TOKENS, WIDTH)), solver=ExactSVD())
    assert layer.mlp_norm == pytest.approx(size(block.mlp.matrix), rel=1e-5)
    if len(set(numbers)) == 1:
        assert layer.attention_norm == pytest.approx(size(block.attention.matrix), rel=1e-5)
    else:
        assert "runs 3 times, and what multiplies it" in str(layer.attention_reason)


# Experts.


class Mixture(nn.Module):
    """Experts that are weighted by a router, and others."""

    def __init__(
        self, forward: Callable[[Any, Tensor, Tensor], Tensor], experts: list[nn.Module], **parts: Any
    ) -> None:
        super().__init__()
        self.function, self.router = forward, nn.Linear(WIDTH, len(experts))
        for name, part in parts.items():
            setattr(self, name, part)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh."""
        return self.function(self, x, self.router(x).softmax(-1))


def weighted(self: Any, x: Tensor, p: Tensor) -> Tensor:
    """All experts at every token."""
    return sum(p[..., [i]] * expert(x) for i, expert in enumerate(self.experts))


def first_choice(self: Any, x: Tensor, p: Tensor) -> Tensor:
    """One expert per token; some are idle."""
    result = torch.zeros_like(x)
    for i, expert in enumerate(self.experts):
        here = p.argmax(-1) == i
        if here.any():
            result[here] = expert(x[here]) * p[here][:, [i]]
    return result


def test_a_gated_shared_expert_in_front_of_the_others_is_one_of_them() -> None:
    """It lies at another depth of the model than the experts of the list."""

    def forward(self: Any, x: Tensor, p: Tensor) -> Tensor:
        return self.shared(x) * self.gate(x).sigmoid() + weighted(self, x, p)

    mixture = Mixture(forward, [MLP() for _ in range(4)], shared=MLP(), gate=nn.Linear(WIDTH, 1))
    expected = max(size(expert.matrix) for expert in (mixture.shared, *mixture.experts))
    assert found(Block(plain, mlp=mixture)).mlp_norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("many", ["up", "down"])
def test_experts_may_share_one_of_their_matrices(many: str) -> None:
    """One up projection and many down projections, or the reverse: the largest product counts, not their sum."""

    def forward(self: Any, x: Tensor, p: Tensor) -> Tensor:
        if many == "down":
            y = F.gelu(self.mlp.up(x))
            return sum(p[..., [i]] * expert(y) for i, expert in enumerate(self.experts))
        return self.mlp.down(sum(p[..., [i]] * F.gelu(expert(x)) for i, expert in enumerate(self.experts)))

    sizes = (HIDDEN, WIDTH) if many == "down" else (WIDTH, HIDDEN)
    mixture = Mixture(forward, [nn.Linear(*sizes) for _ in range(4)], mlp=MLP())
    up, down = mixture.mlp.up.weight, mixture.mlp.down.weight
    products = [expert.weight @ up if many == "down" else down @ expert.weight for expert in mixture.experts]
    assert found(Block(plain, mlp=mixture)).mlp_norm == pytest.approx(max(map(size, products)), rel=1e-5)


def test_experts_with_numbers_of_their_own_are_measured_if_all_ran() -> None:
    """How an expert that did not run is built is not known when the others are not built alike."""
    numbers = [float(1 + number) for number in range(4)]
    mixture = Mixture(weighted, [MLP(factor=number) for number in numbers])
    layer = found(Block(plain, mlp=mixture))
    assert layer.mlp_norm == pytest.approx(max(size(expert.matrix) for expert in mixture.experts), rel=1e-5)
    idle = Mixture(first_choice, [MLP(factor=float(1 + number)) for number in range(32)])
    assert "not built alike, and some of them did not run" in str(found(Block(plain, mlp=idle)).mlp_reason)


# Sites and reasons.


@pytest.mark.parametrize("written", [False, True])
def test_the_site_of_a_norm_behind_a_branch_is_the_norm(written: bool) -> None:
    """Also where a number multiplies it, and where the norm is written out: what stands behind it scales nothing."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.5 + torch.rand(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * rms(x) if written else F.rms_norm(x, (WIDTH,), self.weight)

    block = Block(lambda self, x: x + 0.5 * self.norm(self.mlp(x)), mlp=MLP(), norm=Norm())
    model = Stack(block)
    blocks = find_blocks(model, batch=torch.randn(2, TOKENS, WIDTH))
    assert blocks[0].verified
    assert blocks[0].mlp is not None
    assert blocks[0].mlp.site == "blocks.0.norm"


def test_reasons_name_what_is_there() -> None:
    """A constant matrix, a weight made of two parameters, an MLP that mixes tokens."""
    turned = Block(
        lambda self, x: x + self.mlp.down(self.mlp.up(x) @ self.turn), mlp=MLP(), turn=torch.randn(HIDDEN, HIDDEN)
    )
    assert found(turned).mlp_reason == "it is multiplied by a matrix that belongs to no parameter and no buffer"
    made = Block(
        lambda self, x: x + F.linear(F.gelu(self.mlp.up(x)), self.a @ self.b),
        mlp=MLP(),
        a=nn.Parameter(torch.randn(WIDTH, 2)),
        b=nn.Parameter(torch.randn(2, HIDDEN)),
    )
    assert "its last weight is made of blocks.0.a and blocks.0.b" in str(found(made).doubt)
    pooled = Block(lambda self, x: x + self.mlp(x) * x.mean(1, keepdim=True).sigmoid(), mlp=MLP())
    assert "mixes tokens and is not attention" in str(found(pooled).mlp_reason)


def test_complex_weights_are_a_reason() -> None:
    """No SVD of real matrices says what they do."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x + (torch.complex(self.mlp.up(x), self.other(x)) @ self.weight).real

    weight = nn.Parameter(torch.randn(HIDDEN, WIDTH, dtype=torch.cfloat))
    block = Block(forward, mlp=MLP(), other=nn.Linear(WIDTH, HIDDEN), weight=weight)
    assert found(block).mlp_reason == "its matrices multiply complex numbers"


def test_a_view_that_is_written_in_part_keeps_the_rest() -> None:
    """The first of the shifted tokens is a state from outside: the others are still those of the stream."""

    def forward(self: Any, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        before[:, 0] = self.state
        return x + self.mlp(x * self.share + before * (1 - self.share))

    block = Block(
        forward, mlp=MLP(), share=nn.Parameter(0.5 + torch.rand(WIDTH)), state=nn.Parameter(torch.randn(WIDTH))
    )
    layer = found(block)
    assert layer.mlp_norm is None or layer.mlp_norm == pytest.approx(size(block.mlp.matrix), rel=1e-5)


def test_a_model_that_is_one_block_is_not_verified_with_weights_outside_of_its_branches() -> None:
    """Banks of weights: the MLP of every layer is made in the model's own loop, and cannot be scaled alone."""

    class Banks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.bank = Attention(), nn.Parameter(torch.randn(2, 2, WIDTH, WIDTH) / 4)
            self.into, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.into(ids)
            for up, down in self.bank:
                x = x + self.attention(rms(x))
                x = x + F.relu(rms(x) @ up) @ down
            return self.head(x)

    blocks = find_blocks(Banks(), batch=torch.arange(2 * TOKENS).view(2, -1) % 11)
    assert [block.verified for block in blocks] == [False]
    assert blocks[0].doubt == "bank acts outside the branches that were found"


@pytest.mark.parametrize("swapped", [False, True])
def test_two_linear_halves_have_no_gate_among_them(swapped: bool) -> None:
    """The number would depend on which of them stands first; with a name that says so, it does not."""

    class Bilinear(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            self.halves = nn.ModuleDict({name: nn.Linear(WIDTH, HIDDEN) for name in (first, second)})
            self.down = nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            first, second = (half(x) for half in self.halves.values())
            return self.down(second * first if swapped else first * second)

    layer = found(Block(plain, mlp=Bilinear("one", "two")))
    assert layer.mlp_norm is None
    assert "its two halves multiply each other and both are linear" in str(layer.mlp_reason)
    named = Bilinear("gate", "up")
    expected = size(named.down.weight @ named.halves["up"].weight)
    assert found(Block(plain, mlp=named)).mlp_norm == pytest.approx(expected, rel=1e-5)


# Where the channels stand.


class MapNorm(nn.Module):
    """A norm of maps over their channels, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """One statistic for each pixel."""
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * self.weight.view(-1, 1, 1)


class MapLength(MapNorm):
    """The same by ``F.normalize``, whose statistic is expanded to the shape of the map."""

    def forward(self, x: Tensor) -> Tensor:
        """One length for each pixel."""
        return F.normalize(x, dim=1) * math.sqrt(x.shape[1]) * self.weight.view(-1, 1, 1)


class OnMaps(nn.Module):
    """Linear layers on feature maps ``(batch, channels, height, width)``: the channels are put last and back."""

    def __init__(self, norm: Callable[[], nn.Module], last: bool) -> None:
        super().__init__()
        self.attention, self.mlp, self.last = Attention(), MLP(), last
        self.norms = nn.ModuleList(norm() for _ in range(2))
        for item in self.norms:
            for parameter in item.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)

    def normed(self, place: int, x: Tensor) -> Tensor:
        """The norm stands behind the transposition or in front of it."""
        if self.last:
            return self.norms[place](x.permute(0, 2, 3, 1))
        return self.norms[place](x).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over all pixels, and an MLP."""
        y = self.attention(self.normed(0, x).flatten(1, 2))
        x = x + y.mT.unflatten(2, x.shape[2:])
        return x + self.mlp(self.normed(1, x)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("norm", "last"),
    [
        (lambda: nn.LayerNorm(WIDTH), True),
        (lambda: nn.RMSNorm(WIDTH), True),
        (lambda: nn.BatchNorm2d(WIDTH), False),
        (lambda: MapNorm(WIDTH), False),
        (lambda: MapLength(WIDTH), False),
    ],
    ids=["layer norm", "rms norm", "batch norm", "written out", "by length"],
)
def test_linear_layers_on_feature_maps_read_the_channels_of_the_maps(norm: Callable[[], nn.Module], last: bool) -> None:
    model = Stack(*(OnMaps(norm, last) for _ in range(2))).eval()
    blocks = find_blocks(model, batch=torch.randn(2, WIDTH, 3, 4))
    assert [(block.kinds, block.token_dims, block.doubt) for block in blocks] == 2 * [
        (("attention", "mlp"), (2, 3), None)
    ]
    for block, layer in zip(model.blocks, measure(model, blocks, solver=ExactSVD()), strict=True):
        gains = [torch.diag(item.weight) for item in block.norms]
        assert layer.attention_norm == pytest.approx(size(block.attention.matrix @ gains[0]), rel=1e-5)
        assert layer.mlp_norm == pytest.approx(size(block.mlp.matrix @ gains[1]), rel=1e-5)


def test_attention_of_a_diffusion_unet_is_measured_behind_its_group_norm() -> None:
    """A group norm, linear layers over the pixels, and back to a map."""

    class OnPixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = Attention(), nn.GroupNorm(2, WIDTH)
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(self.norm(x.flatten(2)).mT).mT.reshape(x.shape)

    model = Stack(OnPixels(), OnPixels()).eval()
    blocks = find_blocks(model, batch=torch.randn(2, WIDTH, 3, 4))
    assert [(block.kinds, block.token_dims, block.doubt) for block in blocks] == 2 * [(("attention",), (2, 3), None)]
    for block, layer in zip(model.blocks, measure(model, blocks, solver=ExactSVD()), strict=True):
        expected = block.attention.matrix @ torch.diag(block.norm.weight)
        assert layer.attention_norm == pytest.approx(size(expected), rel=1e-5)


@pytest.mark.parametrize("pointwise", [True, False], ids=["convolution", "linear"])
def test_what_mixes_tokens_has_its_tokens_where_the_norm_has_no_channels(pointwise: bool) -> None:
    """MLP-Mixer: a convolution of kernel 1 whose channels are the tokens, and the same written with linear layers."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + (self.tokens(y) if pointwise else self.tokens(y.mT).mT)
        return x + self.mlp(self.norm(x))

    def layer(*sizes: int) -> nn.Module:
        return nn.Conv1d(*sizes, 1) if pointwise else nn.Linear(*sizes)

    def block() -> Block:
        tokens = nn.Sequential(layer(TOKENS, HIDDEN), nn.GELU(), layer(HIDDEN, TOKENS))
        return Block(forward, nn.Identity(), tokens=tokens, mlp=MLP(), norm=nn.LayerNorm(WIDTH))

    blocks = find_blocks(Stack(block(), block()).eval(), batch=torch.randn(2, TOKENS, WIDTH))
    assert [(block.kinds, block.token_dims) for block in blocks] == 2 * [(("mixer", "mlp"), (1,))]


class AsOneRow(Attention):
    """Attention over all pixels of a map whose channels are last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, -2)).reshape(x.shape)


@pytest.mark.parametrize(
    ("first", "shape", "attention", "dims"),
    [
        (nn.Linear(3, WIDTH), (2, TOKENS, 3), Attention, (1,)),
        (nn.Linear(3, WIDTH, bias=False), (2, 4, TOKENS, 3), AsOneRow, (1, 2)),
        (nn.Linear(3, WIDTH), (1, TOKENS, 3), Attention, (1,)),
        (nn.Identity(), (2, TOKENS, WIDTH), Attention, (1,)),
    ],
    ids=["sequences", "maps", "one sequence", "no layer in front"],
)
def test_samples_are_not_tokens_where_the_stream_begins_with_a_linear_layer(
    first: nn.Module, shape: tuple[int, ...], attention: Callable[[], nn.Module], dims: tuple[int, ...]
) -> None:
    """A linear layer multiplies (samples * tokens, channels), and the first branches read that very product."""
    model = nn.Sequential(first, Stack(*(Block(plain, attention(), mlp=MLP()) for _ in range(2)))).eval()
    blocks = find_blocks(model, batch=torch.randn(shape))
    assert [(block.kinds, block.token_dims) for block in blocks] == 2 * [(("attention", "mlp"), dims)]


@pytest.mark.parametrize("affine", [True, False])
def test_attention_in_front_of_a_fresh_batch_norm_is_attention(affine: bool) -> None:
    """A running mean of zero is no weight of zero: a mean of 1 would leave nothing positive for the ReLU."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp(x)

    norm = nn.BatchNorm1d(WIDTH, affine=affine)
    if affine:
        nn.init.normal_(norm.bias, std=0.1)
    attention = Attention()
    nn.init.normal_(attention.o.weight, std=0.02)
    nn.init.zeros_(attention.o.bias)

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm, self.out = attention, norm, nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.attention(x).mT).mT.relu())

    model = Stack(Block(forward, Behind(), mlp=MLP()), Block(forward, Attention(), mlp=MLP())).eval()
    blocks = find_blocks(model, batch=torch.randn(2, TOKENS, WIDTH))
    assert [(block.kinds, block.token_dims) for block in blocks] == 2 * [(("attention", "mlp"), (1,))]


def test_a_convolution_in_groups_is_no_matrix() -> None:
    """SqueezeBERT: every group of channels has its own matrix."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x.mT))).mT

    layers = {"up": nn.Conv1d(WIDTH, HIDDEN, 1, groups=2), "down": nn.Conv1d(HIDDEN, WIDTH, 1)}
    assert found(Block(forward, **layers)).reason == "mlp: it passes through a convolution in 2 groups of channels"


# Streams of their own.


class Joint(nn.Module):
    """Text and picture attend to each other, and the picture has a branch more."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(WIDTH, 3 * WIDTH) for name in ("text", "image")})
        self.outs = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("text", "image")})
        self.mlps = nn.ModuleDict({name: MLP() for name in ("text", "image")})
        self.second, self.keys, self.extra = Attention(), nn.Linear(WIDTH, WIDTH), extra

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """One attention over both, and an MLP for each."""
        streams = {"text": text, "image": image}
        joined = torch.cat([self.parts[name](rms(x)) for name, x in streams.items()], 1)
        mixed = F.scaled_dot_product_attention(*joined.chunk(3, -1)).split([text.shape[1], image.shape[1]], 1)
        text, image = (x + self.outs[name](y) for (name, x), y in zip(streams.items(), mixed, strict=True))
        if self.extra == "attention":
            image = image + self.second(rms(image))
        if self.extra == "cross attention":
            keys = self.keys(text.detach().square())
            image = image + self.second.o(F.scaled_dot_product_attention(self.second.q(image), keys, keys))
        if self.extra == "attention alone":
            return text, image
        return text + self.mlps["text"](rms(text)), image + self.mlps["image"](rms(image))


class Pictured(nn.Module):
    """Two streams through all blocks."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.joint = nn.ModuleList(Joint(extra) for _ in range(2))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Both."""
        for block in self.joint:
            text, image = block(text, image)
        return torch.cat([text, image], 1)


@pytest.mark.parametrize("extra", ["attention", "cross attention", "attention alone"])
def test_streams_are_blocks_of_their_own_where_one_has_more_branches(extra: str) -> None:
    """The norms of two streams are never added up."""
    model = Pictured(extra).eval()
    blocks = find_blocks(model, batch=(torch.randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS + 2, WIDTH)))
    assert [(block.index, block.doubt) for block in blocks] == [(place, None) for place in range(4)]
    layers = {layer.name: layer for layer in measure(model, blocks, solver=ExactSVD())}
    for place, joint in enumerate(model.joint):
        for name in ("text", "image"):
            path = f"joint.{place}.outs.{name}"
            (layer,) = (layer for own, layer in layers.items() if own.split(" + ")[0] == path)
            expected = joint.outs[name].weight @ joint.parts[name].weight[2 * WIDTH :]
            if name == "image" and extra == "attention":
                expected = expected + joint.second.matrix
            assert layer.attention_norm == pytest.approx(size(expected), rel=1e-5)
            if extra != "attention alone":
                assert layer.mlp_norm == pytest.approx(size(joint.mlps[name].matrix), rel=1e-5)


class Placed(nn.Module):
    """Layers that all read one code of the places, which is made of the input."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.places, self.bias = nn.Linear(2, WIDTH), nn.Linear(1, HEADS)
        self.attention = nn.ModuleList(Attention() for _ in range(3))
        self.mlps = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """A code for the queries and keys, for the logits, or for all that a branch reads."""
        code, bias = self.places(places), self.bias(torch.cdist(places, places)[..., None]).movedim(-1, 1)
        x = x + code if self.way == "start" else x
        for attention, mlp in zip(self.attention, self.mlps, strict=True):
            y = rms(x)
            z = y if self.way == "logits" else y + code
            q, k, v = (
                part(given).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for part, given in (
                    (attention.q, z),
                    (attention.k, z),
                    (attention.v, y if self.way == "queries" else z),
                )
            )
            scores = q @ k.mT + bias if self.way == "logits" else q @ k.mT
            x = x + attention.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + mlp(rms(x) + code if self.way in ("all", "start") else rms(x))
        return x


@pytest.mark.parametrize("way", ["queries", "logits", "all", "start"])
def test_a_code_of_the_places_that_every_layer_adds_is_no_second_stream(way: str) -> None:
    """From the second layer on, the stream is made of the code, too."""
    model = Placed(way).eval()
    blocks = find_blocks(model, batch=(torch.randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS, 2)))
    assert ([block.doubt for block in blocks], blocks.notes) == (3 * [None], ())
    layers = measure(model, blocks, solver=ExactSVD())
    for attention, mlp, layer in zip(model.attention, model.mlps, layers, strict=True):
        assert layer.attention_norm == pytest.approx(size(attention.matrix), rel=1e-5)
        assert layer.mlp_norm == pytest.approx(size(mlp.matrix), rel=1e-5)


@pytest.mark.parametrize("sizes", [(TOKENS,), (3, 4)], ids=["sequence", "map"])
def test_convolutions_behind_a_norm_by_length_over_the_channels_are_a_product(sizes: tuple[int, ...]) -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = nn.Conv1d if len(sizes) == 1 else nn.Conv2d
            self.attention, self.gain = Attention(), nn.Parameter(0.5 + torch.rand(WIDTH, *[1] * len(sizes)))
            self.up, self.down = kind(WIDTH, HIDDEN, 1), kind(HIDDEN, WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x.flatten(2).mT).mT.reshape(x.shape)
            return x + self.down(F.silu(self.up(F.normalize(x, dim=1) * self.gain * WIDTH**0.5)))

    model = Stack(Pointwise(), Pointwise()).eval()
    blocks = find_blocks(model, batch=torch.randn(2, WIDTH, *sizes))
    for block, layer in zip(model.blocks, measure(model, blocks, solver=ExactSVD()), strict=True):
        expected = block.down.weight.flatten(1) @ block.up.weight.flatten(1) @ torch.diag(block.gain.flatten())
        assert layer.mlp_norm == pytest.approx(size(expected), rel=1e-5)
        assert layer.attention_norm == pytest.approx(size(block.attention.matrix), rel=1e-5)

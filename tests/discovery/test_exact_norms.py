"""Norms of vision models and their kin against products of their weights that are written out by hand."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree
from zoo import example, examples
from zoo.gpt import MLP, Block, CausalSelfAttention, NanoGPT
from zoo.vision import DiT, SingleStream, dit_operators, timed

from lightning_spectral import ExactSVD, find_blocks, measure
from lightning_spectral.measuring.jacobians import update_ratios, watch_updates

WIDTH = 32


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training in float64"])
@pytest.mark.parametrize("name", [member.name for member in examples() if member.operators])
def test_the_norms_are_those_of_the_operators_by_hand(name: str, training: bool) -> None:
    """Every gain and multiplier counts, and the branches of a kind are added up; in both modes and precisions."""
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    if training:
        model.double().train()
        args, kwargs = _pytree.tree_map_only(
            Tensor, lambda item: item.double() if item.is_floating_point() else item, (args, kwargs)
        )
    assert member.operators is not None
    known = member.operators(model)
    measured = measure(model, find_blocks(model, batch=args or kwargs), solver=ExactSVD()).layers
    assert [layer.name for layer in measured] == list(known)
    for layer in measured:
        assert layer.attention_norm == pytest.approx(norm(known[layer.name]["attention"]), rel=1e-5)
        assert layer.mlp_norm == pytest.approx(norm(known[layer.name]["mlp"]), rel=1e-5)


def test_gates_at_zero_hide_no_branch() -> None:
    """With adaLN-zero nothing is added at the start of training."""
    model = DiT().eval()
    args, _ = timed(model)
    blocks = find_blocks(model, batch=args)
    assert [block.doubt for block in blocks] == [None, None]
    for layer, known in zip(
        measure(model, blocks, solver=ExactSVD()).layers, dit_operators(model).values(), strict=True
    ):
        assert layer.attention_norm == pytest.approx(norm(known["attention"]), rel=1e-5)
        assert layer.mlp_norm == pytest.approx(norm(known["mlp"]), rel=1e-5)


def test_attention_and_an_mlp_between_two_shared_matrices_are_told_apart() -> None:
    """Each has its rows and columns; their one site scales both, so no law may move it."""
    model = SingleStream().eval()
    args, _ = timed(model)
    blocks = find_blocks(model, batch=args)
    for own, block, layer in zip(model.blocks, blocks, measure(model, blocks, solver=ExactSVD()).layers, strict=True):
        assert [(branch.kind, branch.site) for branch in block.branches] == [
            ("attention", f"{block.name}.out"),
            ("mlp", f"{block.name}.out"),
        ]
        assert block.doubt == "attention and an MLP share one site, so neither can be scaled by itself"
        assert layer.attention_norm == pytest.approx(norm(own.operators()["attention"]), rel=1e-5)
        assert layer.mlp_norm == pytest.approx(norm(own.operators()["mlp"]), rel=1e-5)
    for layer in measure(model, blocks, linearization="jacobian", batch=args):
        assert layer.ratio is None
        assert "returns the sum of attention and an MLP" in str(layer.attention_reason)
    assert update_ratios(model, blocks, args, {}) == {}
    with torch.no_grad(), watch_updates(model, blocks, args, {}) as watch:
        model(*args)
    assert watch.updates == {}


class RowNorm(nn.Module):
    """LayerNorm over the channels of ``(batch, channels, length)``."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.0, 2.0, WIDTH).view(1, -1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) * (variance + 1e-6).rsqrt() * self.gain


class SoundBlock(nn.Module):
    """Attention and an MLP on ``(batch, channels, length)``; the first channel has a gain of zero."""

    def __init__(self, norms: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms(), norms()
        self.qkv, self.out = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.up, self.down = nn.Conv1d(WIDTH, 48, 1), nn.Conv1d(48, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).mT.chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).mT)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def test_norms_over_the_second_dimension_are_norms_though_a_gain_is_zero() -> None:
    model = nn.Sequential(SoundBlock(RowNorm), SoundBlock(RowNorm)).eval()
    blocks = find_blocks(model, batch=torch.randn(2, WIDTH, 9))
    for block, layer in zip(model, measure(model, blocks, solver=ExactSVD()).layers, strict=True):
        value, out, up, down = (conv.weight[..., 0].detach() for conv in (block.qkv, block.out, block.up, block.down))
        assert layer.attention_norm == pytest.approx(
            norm(out @ value[2 * WIDTH :] * block.norm1.gain[0, :, 0]), rel=1e-5
        )
        assert layer.mlp_norm == pytest.approx(norm(down @ up * block.norm2.gain[0, :, 0]), rel=1e-5)


class Masked(Block):
    """Bidirectional attention with a mask that is added to the scores."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, -1)
        x = x + self.out((q @ k.mT + self.mask).softmax(-1) @ v)
        return x + self.mlp(self.ln_2(x))


MASKS = {
    "first position is padding": torch.zeros(11, 11).index_fill(1, torch.tensor([0]), -torch.inf),
    "all attend to themselves": torch.full((11, 11), -200.0).fill_diagonal_(0.0),
}


@pytest.mark.parametrize("together", [True, False], ids=["values of all heads in one product", "head by head"])
def test_heads_in_one_parameter_are_added_up_and_are_no_experts(together: bool) -> None:
    """Head h has entry h of each parameter, and a loop adds up what the heads write."""
    heads, size = 4, 8

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Parameter(torch.randn(heads, WIDTH, size) / 4) for _ in range(3))
            self.out = nn.Parameter(torch.randn(heads, size, WIDTH) / 4)

        def forward(self, x: Tensor) -> Tensor:
            weights = (self.query, self.key, self.value)
            if together:
                seen = F.scaled_dot_product_attention(*(torch.einsum("btd,hdk->bhtk", x, item) for item in weights))
                return sum(seen[:, head] @ self.out[head] for head in range(heads))
            total = torch.zeros_like(x)
            for head in range(heads):
                total = total + F.scaled_dot_product_attention(*(x @ item[head] for item in weights)) @ self.out[head]
            return total

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = Attention(), nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(F.layer_norm(x, (WIDTH,)))
            return x + self.mlp(F.layer_norm(x, (WIDTH,)))

    model = nn.Sequential(Layer(), Layer())
    for layer, block in zip(measure(model, batch=torch.randn(2, 6, WIDTH), solver=ExactSVD()), model, strict=True):
        attention = block.attention
        whole = sum(attention.out[head].mT @ attention.value[head].mT for head in range(heads))
        assert layer.attention_norm == pytest.approx(norm(whole), rel=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_attention_whoever_is_masked(mask: str) -> None:
    """Nobody looks at the first position, or the pattern is one-hot: nothing moves when that position does."""
    for block in find_blocks(
        NanoGPT(lambda: Masked(MASKS[mask]), layers=2).eval(), batch=torch.randint(0, 61, (2, 11))
    ):
        assert [branch.kind for branch in block.branches] == ["attention", "mlp"]
        assert block.verified, block.evidence


class RoundTrip(Block):
    """Queries read a view of a view of the stream, keys and values the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        again = x.mT.contiguous().mT
        k, v = self.kv(self.ln_1(x)).chunk(2, -1)
        again = again + self.out(F.scaled_dot_product_attention(self.q(self.ln_1(again)), k, v))
        return again + self.mlp(self.ln_2(again))


def test_a_branch_reads_every_view_of_the_stream() -> None:
    for block in find_blocks(NanoGPT(RoundTrip, layers=2).eval(), batch=torch.randint(0, 61, (2, 12))):
        assert [branch.kind for branch in block.branches] == ["attention", "mlp"]
        assert block.verified, block.evidence


class Fields(NamedTuple):
    """What a module returns."""

    weights: Tensor | None
    hidden: Tensor


class Output(OrderedDict[str, Any]):
    """A mapping that torch was not told how to walk by key."""


_pytree.register_pytree_node(
    Output,
    lambda value: (list(value.values()), list(value)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
)


class Wrapped(nn.Module):
    """Returns the branch in a structure."""

    def __init__(self, fn: nn.Module, kind: str) -> None:
        super().__init__()
        self.fn, self.kind = fn, kind

    def forward(self, x: Tensor) -> Any:
        y = self.fn(x)
        return Output(hidden=y) if self.kind == "mapping" else Fields(None, y)


class Unwrapping(Block):
    """Takes its branches out of structures."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.attn, self.mlp = kind, Wrapped(CausalSelfAttention(), kind), Wrapped(MLP(), kind)

    def forward(self, x: Tensor) -> Tensor:
        take = (lambda output: output["hidden"]) if self.kind == "mapping" else (lambda output: output.hidden)
        x = x + take(self.attn(self.ln_1(x)))
        return x + take(self.mlp(self.ln_2(x)))


@dataclasses.dataclass
class Batch:
    """A batch as a data class."""

    tokens: Tensor


class Unpacking(nn.Module):
    """Takes a batch of continuous tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, batch: Batch) -> Output:
        return Output(hidden=self.blocks(batch.tokens))


@pytest.mark.parametrize(("kind", "index"), [("mapping", "hidden"), ("named tuple", 1)])
def test_structures_that_torch_cannot_walk_by_key_are_walked(kind: str, index: str | int) -> None:
    """The place in a structure is what the structure itself is asked with."""
    for block in find_blocks(NanoGPT(lambda: Unwrapping(kind), layers=2).eval()):
        assert [(branch.site, branch.output_index) for branch in block.branches] == [
            (f"{block.name}.attn", index),
            (f"{block.name}.mlp", index),
        ]


def test_tensors_in_a_data_class_are_data() -> None:
    blocks = find_blocks(Unpacking().eval(), batch=Batch(torch.randn(2, 7, WIDTH)))
    assert [(block.name, block.verified) for block in blocks] == [("blocks.0", True), ("blocks.1", True)]


class Pixelwise(nn.Module):
    """A branch that has one position to act on, or windows of one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.GroupNorm(1, WIDTH)
        self.qkv, self.out = (
            nn.Conv2d(WIDTH, 3 * WIDTH, 1),
            nn.Conv2d(WIDTH, WIDTH, 3 if kind == "kernel" else 1, padding="same"),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "kernel":
            return x + self.out(F.gelu(self.norm(x)))
        y = self.qkv(x)
        y = y.permute(0, 2, 3, 1).flatten(0, 2).unsqueeze(1) if self.kind == "windows" else y.flatten(2).mT
        q, k, v = y.chunk(3, -1)
        return x + self.out(((q @ k.mT).softmax(-1) @ v).reshape(len(x), *x.shape[2:], WIDTH).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("kind", "size"), [("picture", 1), ("kernel", 1), ("windows", 2)])
def test_one_position_shows_no_kind_in_feature_maps_and_windows(kind: str, size: int) -> None:
    model = nn.Sequential(Pixelwise(kind), Pixelwise(kind)).eval()
    for block in find_blocks(model, batch=torch.randn(2, WIDTH, size, size)):
        assert block.doubt == (
            "one position cannot show whether a branch mixes positions: pass an example of two tokens or more"
        )


class Centred(Block):
    """Takes the mean over tokens, or over channels, off the stream."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x - x.mean(self.dim, keepdim=True)


@pytest.mark.parametrize(("dim", "doubt"), [(1, "something is left of the operation 'sub' on the stream"), (2, None)])
def test_a_norm_on_the_stream_takes_its_mean_over_channels(dim: int, doubt: str | None) -> None:
    for block in find_blocks(NanoGPT(lambda: Centred(dim), layers=2).eval()):
        assert (block.doubt is None) if doubt is None else doubt in str(block.doubt)


class Widening(nn.Module):
    """Attention is added to a projection of what enters, and not to itself (Hiera, MViT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(2 * width)
        self.skip, self.qkv, self.out = (
            nn.Linear(*size) for size in ((width, 2 * width), (width, 6 * width), (2 * width,) * 2)
        )
        self.mlp = nn.Sequential(nn.Linear(2 * width, 48), nn.GELU(), nn.Linear(48, 2 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = self.skip(y) + self.out(F.scaled_dot_product_attention(*self.qkv(y).chunk(3, -1)))
        return x + self.mlp(self.norm2(x))


def test_attention_beside_a_projected_skip_is_told() -> None:
    for block in find_blocks(nn.Sequential(Widening(8), Widening(16)).eval(), batch=torch.randn(2, 9, 8)):
        assert [branch.kind for branch in block.branches] == ["mlp"]
        assert block.doubt == "its first sum passes nothing on of what enters: the skip is projected, too"


class Orthogonal(Block):
    """What lies along the stream is taken off each branch."""

    def forward(self, x: Tensor) -> Tensor:
        for branch, norm in ((self.attn, self.ln_1), (self.mlp, self.ln_2)):
            y, u = branch(norm(x)), F.normalize(x, dim=-1)
            x = x + (y - (y * u).sum(-1, keepdim=True) * u)
        return x


def test_one_weight_is_not_the_site_of_two_branches() -> None:
    for block in find_blocks(NanoGPT(Orthogonal, layers=2).eval()):
        assert [branch.site for branch in block.branches] == [f"{block.name}.attn", f"{block.name}.mlp"]
        assert "is used more than once (by a recurrence, or by a second branch)" in str(block.doubt)


class Nested(Block):
    """The MLP reads the stream and the attention, and its output alone is added."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x + self.attn(self.ln_1(x))))


def test_an_mlp_behind_attention_in_one_branch_is_neither() -> None:
    for block in find_blocks(NanoGPT(Nested, layers=2).eval()):
        assert [branch.reason for branch in block.branches] == ["attention and an MLP behind it lie in one branch"]


class RMSNorm(nn.Module):
    """Written out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class GatedSandwich(Block):
    """A norm behind each branch, and a gate of a conditioning vector behind that (Lumina 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.post_1, self.post_2, self.gate = RMSNorm(), RMSNorm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate = self.gate(c)[:, None].tanh()
        x = x + gate * self.post_1(self.attn(self.ln_1(x)))
        return x + gate * self.post_2(self.mlp(self.ln_2(x)))


def test_a_norm_is_no_gate_of_what_it_normalizes() -> None:
    """Nothing can be scaled in front of a norm: the norm is the site, whatever gates it."""
    model = GatedSandwich().eval()
    (block,) = find_blocks(model, batch=(torch.randn(2, 9, WIDTH), torch.randn(2, WIDTH)))
    assert [branch.site for branch in block.branches] == ["post_1", "post_2"]
    assert block.verified, block.evidence


ACTIVATIONS = {
    "GELU": (lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)), 1.0),
    "GELU by tanh": (lambda h: 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * h**3))), 1.0),
    "Mish": (lambda h: h * torch.tanh(F.softplus(h)), 1.0),
    "Snake": (lambda h: h + torch.sin(h) ** 2, 1.0),
    "Snake, the wave first": (lambda h: torch.sin(h) ** 2 + h, 1.0),
    "half SiLU": (lambda h: 0.5 * F.silu(h), 0.5),
    "SiLU and a shortcut": (lambda h: h + F.silu(h), 2.0),
    "a wave": (torch.sin, 1.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_counts_by_its_slope_far_from_zero_however_it_is_written(name: str) -> None:
    activation, slope = ACTIVATIONS[name]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = CausalSelfAttention()
            self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(F.layer_norm(x, (WIDTH,)))
            return x + self.down(activation(self.up(F.layer_norm(x, (WIDTH,)))))

    model = nn.Sequential(Layer(), Layer())
    for layer, block in zip(measure(model, batch=torch.randn(2, 6, WIDTH), solver=ExactSVD()), model, strict=True):
        assert layer.mlp_norm == pytest.approx(slope * norm(block.down.weight @ block.up.weight), rel=1e-5)

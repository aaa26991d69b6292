"""Norms of language models against products of their weights that are written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import example
from zoo.gpt import MLP, CausalSelfAttention, attention_matrix, mlp_matrix
from zoo.language import Language, OutputGated, Preceded

from lightning_spectral import ExactSVD, find_blocks, measure
from lightning_spectral.errors import BlocksNotFoundError, ExampleInputError


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))


@pytest.mark.parametrize("name", ["refused_highway", "refused_gtrxl"])
def test_a_gate_on_the_stream_is_named(name: str) -> None:
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    with pytest.raises(BlocksNotFoundError, match="multiplies its stream by a gate of data"):
        find_blocks(model, batch=args or kwargs)


class BranchGated(OutputGated):
    """Each branch makes its own gate."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.ln_1(x))
        x = x + torch.sigmoid(self.gate_1(y)) * y
        y = self.mlp(self.ln_2(x))
        return x + torch.sigmoid(self.gate_2(y)) * y


class SigmoidTanh(OutputGated):
    """The gate of a GRU without its memory (GTrXL)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.ln_1(x))
        x = x + torch.sigmoid(self.gate_1(y)) * torch.tanh(self.linear_1(y))
        y = self.mlp(self.ln_2(x))
        return x + torch.sigmoid(self.gate_2(y)) * torch.tanh(self.linear_2(y))

    def operators(self) -> dict[str, Tensor]:
        plain = super().operators()
        return {"attention": self.linear_1.weight @ plain["attention"], "mlp": self.linear_2.weight @ plain["mlp"]}


@pytest.mark.parametrize("block", [BranchGated, SigmoidTanh])
def test_a_branch_that_makes_its_own_gate_is_measured_and_has_no_site(block: type[OutputGated]) -> None:
    """No factor anywhere multiplies it: the weight that names the branch cannot scale it."""
    model = Language(block).eval()
    blocks = find_blocks(model, batch=torch.randint(0, 61, (2, 11)))
    for own, found, layer in zip(model.layers, blocks, measure(model, blocks, solver=ExactSVD()).layers, strict=True):
        assert not found.verified
        assert "no module or weight carries one of its branches" in found.evidence
        assert layer.attention_norm == pytest.approx(norm(own.operators()["attention"]), rel=1e-5)
        assert layer.mlp_norm == pytest.approx(norm(own.operators()["mlp"]), rel=1e-5)


class Orthogonal(Preceded):
    """What lies along the stream, all tokens together, is taken off each branch: a sum in another layout."""

    def forward(self, x: Tensor) -> Tensor:
        for branch, before in ((self.attn, self.ln_1), (self.mlp, self.ln_2)):
            y, unit = branch(before(x)).flatten(1), F.normalize(x.flatten(1), dim=-1)
            x = x + (y - (y * unit).sum(-1, keepdim=True) * unit).view_as(x)
        return x


def test_a_sum_over_tokens_and_channels_at_once_is_no_mlp() -> None:
    """Read as one long vector, attention looked like an MLP whose norm counts every token."""
    model = Language(Orthogonal).eval()
    for layer in measure(model, find_blocks(model, batch=torch.randint(0, 61, (2, 11))), solver=ExactSVD()).layers:
        assert layer.attention_norm is layer.mlp_norm is None


class Served(Language):
    """Attention by einsum on a cache, in inference mode, as code that serves models has it."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.ModuleDict({"attn": CausalSelfAttention(), "mlp": MLP()}))
        self.register_buffer("cache", torch.zeros(2, 2, 16, 4, 8), persistent=False)

    @torch.inference_mode()
    def forward(self, idx: Tensor) -> Tensor:
        x, count = self.embed(idx), idx.shape[1]
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (4, 8)) for part in layer["attn"].c_attn(x).chunk(3, dim=-1))
            self.cache[0, :, :count], self.cache[1, :, :count] = k, v
            k, v = self.cache[:, :, :count]
            pattern = (torch.einsum("bshd,bthd->bsht", q, k) / math.sqrt(8)).softmax(dim=-1)
            x = x + layer["attn"].c_proj(torch.einsum("bsht,bthd->bshd", pattern, v).flatten(2))
            x = x + layer["mlp"](x)
        return self.head(x)


def test_a_model_in_inference_mode_is_read_as_in_training() -> None:
    """Composite operations arrive there whole, and no table knows them."""
    model = Served().eval()
    blocks = find_blocks(model, batch=torch.randint(0, 61, (2, 11)))
    for own, layer in zip(model.layers, measure(model, blocks, solver=ExactSVD()).layers, strict=True):
        assert layer.attention_norm == pytest.approx(norm(attention_matrix(own["attn"])), rel=1e-5)
        assert layer.mlp_norm == pytest.approx(norm(mlp_matrix(own["mlp"])), rel=1e-5)


class Flat(Language):
    """Attention, MLP, attention, MLP, ... in one list, with a sum between that no rule understands."""

    def __init__(self, kinds: str, odd: int | None = None) -> None:
        super().__init__(nn.Identity)
        self.layers = nn.ModuleList(CausalSelfAttention() if kind == "a" else MLP() for kind in kinds)
        self.odd = odd

    def run(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = x + layer(F.layer_norm(x, (32,)))
            if place == self.odd:
                x = x + x.cumsum(1).tanh()
        return x


@pytest.mark.parametrize(
    ("kinds", "odd", "names"),
    [
        ("afafaf", None, ["0 + 1", "2 + 3", "4 + 5"]),
        ("fafafa", None, ["0 + 1", "2 + 3", "4 + 5"]),
        ("faffaf", None, ["0 + 1 + 2", "3 + 4 + 5"]),
        ("aff", None, ["0 + 1", "2"]),
        ("afafaf", 2, ["0 + 1", "2", "3", "4 + 5"]),
    ],
)
def test_entries_of_a_list_are_joined_so_that_the_fewest_are_alone(
    kinds: str, odd: int | None, names: list[str]
) -> None:
    """Behind a sum that is not understood, an MLP waits for no attention of the block behind it."""
    blocks = find_blocks(Flat(kinds, odd).eval(), batch=torch.randint(0, 61, (2, 11)))
    assert [block.name.replace("layers.", "") for block in blocks] == names


class Histogram(nn.Module):
    """Calls an operation that the device has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(x.long(), bins=3)


class Abstract(nn.Module):
    """Has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Language(Preceded)

    def forward(self, *args: Any) -> Any:
        raise NotImplementedError


def test_an_operation_that_is_not_implemented_is_no_missing_forward() -> None:
    """What the example did is told, and no parts are searched in vain."""
    with pytest.raises(ExampleInputError, match=r"cannot be run on the given example input: .*histogram_cpu"):
        find_blocks(nn.Sequential(nn.Linear(4, 4), Histogram()), batch=torch.randn(2, 4))
    assert len(find_blocks(Abstract().eval(), batch=torch.randint(0, 61, (2, 11)))) == 2

"""Every member of the zoo: its blocks, branches, kinds and sites are the known ones, or it is refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from found import Search
from torch import Tensor, nn
from zoo import example, examples
from zoo.gpt import Block, NanoGPT
from zoo.reasons import CROSS, MIXER, REASONS, expected_reasons, has_ratio

from lightning_spectral import find_blocks
from lightning_spectral.errors import BlocksNotFoundError
from lightning_spectral.records import Branch, StreamAt

ALL = [member.name for member in examples()]
WITH_BLOCKS = [member.name for member in examples() if not member.expected_refusal]
REFUSED = [member.name for member in examples() if member.expected_refusal]


def sites(branches: tuple[Branch, ...]) -> list[str]:
    return [branch.site for branch in branches]


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_are_the_known_ones_in_order(name: str, found: Search) -> None:
    """Names and indices, in the order of execution."""
    result = found(name)
    assert result.refusal is None
    assert [block.name for block in result.blocks] == [block.name for block in result.member.blocks]
    assert [block.index for block in result.blocks] == list(range(len(result.blocks)))


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_every_branch_has_an_accepted_site(name: str, found: Search) -> None:
    """As many branches as there are, each at one of the modules that carry it."""
    result = found(name)
    for block, expected in zip(result.blocks, result.member.blocks, strict=True):
        assert len(block.branches) == len(expected.branches), (block.name, sites(block.branches))
        for accepted in expected.branches:
            assert len(set(accepted).intersection(sites(block.branches))) == 1, (accepted, sites(block.branches))


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_kinds_are_the_known_ones(name: str, found: Search) -> None:
    """The token mixer is ``attention``, the branch on each token alone is ``mlp``, and the others are what they are."""
    result = found(name)
    for block, expected in zip(result.blocks, result.member.blocks, strict=True):
        kinds = {branch.site: branch.kind for branch in block.branches}
        for branch, accepted, words in (
            (block.attention, expected.attention, expected.kinds),
            (block.mlp, expected.mlp, expected.mlp_kinds),
        ):
            assert (branch is None) == (accepted is None), block
            assert branch is None or accepted is None or (branch.site in accepted and branch.kind in words), block
        for accepted, kind in zip(expected.other, expected.other_kinds, strict=True):
            assert [kinds[site] for site in accepted if site in kinds] == [kind]


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_verify_themselves(name: str, found: Search) -> None:
    """The self-check passes wherever the block does nothing but add its branches, and says so; else it says why not."""
    result = found(name)
    for block, expected in zip(result.blocks, result.member.blocks, strict=True):
        assert block.verified == expected.verified, block.evidence
        assert (block.evidence == "trace") == block.verified
        assert block.evidence.startswith("trace")


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_every_branch_is_measurable_or_says_why_not(name: str, found: Search) -> None:
    """A branch has chains of factors or a reason, and only the models of the table have reasons."""
    reasons = []
    for branch in (branch for block in found(name).blocks for branch in block.branches):
        assert bool(branch.paths) != bool(branch.reason), branch
        reasons += [branch.reason] if branch.reason else []
        assert branch.kind not in ("mixer", "cross_attention") or branch.reason in (MIXER, CROSS)
    expected = expected_reasons(name)
    assert all(any(reason.startswith(start) for start in expected) for reason in reasons), set(reasons)
    assert all(any(reason.startswith(start) for reason in reasons) for start in expected), set(reasons)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_the_blocks_with_a_ratio_are_the_known_ones(name: str, found: Search) -> None:
    """Attention and an MLP, and a chain of factors for both: what the documentation's page of architectures says."""
    result = found(name)
    for block, expected in zip(result.blocks, result.member.blocks, strict=True):
        branches = (block.attention, block.mlp)
        assert all(branch is not None and branch.paths for branch in branches) == has_ratio(result.member, expected)


def test_the_table_of_reasons_names_models_of_the_zoo() -> None:
    """No reason outlives its model."""
    assert {name for _, names in REASONS.values() for name in names} <= set(ALL)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_stack_of_branches_is_refused_or_unverified(name: str, found: Search) -> None:
    """Never wrong in silence."""
    result = found(name)
    assert not any(block.verified for block in result.blocks)
    assert all("not verified: " in block.evidence for block in result.blocks)


@pytest.mark.parametrize(
    "name",
    [
        "refused_joined_stream",
        "refused_masked_add",
        "refused_mlp",
        "refused_cnn",
        "refused_recurrent",
        "refused_no_skip",
    ],
)
def test_a_refusal_says_what_was_tried_and_shows_the_way_out(name: str, found: Search) -> None:
    """The message names the model and the input, and contains hints to copy."""
    result = found(name)
    message = str(result.refusal)
    assert f"no residual block was found in {type(result.model).__name__}" in message
    assert "Tried: one forward pass on the given example input" in message
    assert "find_blocks(model, hints={" in message
    assert '"layers.*"' in message


def test_a_refusal_names_the_guess_that_was_tried() -> None:
    """Without an example input, the guessed one is described."""
    member = example("refused_joined_stream")
    with pytest.raises(Exception, match=r"no residual block was found in Embedded.\n.*token ids below 61"):
        find_blocks(member.build())


def test_crossed_streams_are_refused_by_name(found: Search) -> None:
    """A recurrent cell is told that its sums are crossed."""
    assert "Refused: a sum of shape (2, 32) adds a branch that reads a second stream" in str(
        found("refused_recurrent").refusal
    )


def test_branches_are_listed_in_the_order_of_execution(found: Search) -> None:
    """In blocks with more than two branches and in blocks whose MLP is registered first."""
    assert [site.split(".")[3] for site in sites(found("macaron").blocks[0].branches)] == ["ffn1", "self_attn", "ffn2"]
    assert [branch.kind for branch in found("conformer").blocks[1].branches] == ["mlp", "attention", "mixer", "mlp"]
    assert [branch.kind for branch in found("nanogpt_mlp_first").blocks[2].branches] == ["attention", "mlp"]
    assert [branch.kind for branch in found("t5").blocks[2].branches] == ["attention", "cross_attention", "mlp"]


class WithoutMLP(Block):
    """Attention only."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.ln_1(x))


def test_a_block_without_mlp_in_a_short_stack_is_a_block() -> None:
    """Two blocks have few branches together; the stack is no block all the same."""
    model = NanoGPT(layers=2)
    model.transformer["h"][1] = WithoutMLP()
    blocks = find_blocks(model.eval())
    assert [block.name for block in blocks] == ["transformer.h.0", "transformer.h.1"]
    assert [len(block.branches) for block in blocks] == [2, 1]


def test_one_token_does_not_make_an_mlp_of_attention_in_silence() -> None:
    """An example of one token cannot tell the kinds apart."""
    for block in find_blocks(NanoGPT().eval(), batch=torch.zeros(2, 1, dtype=torch.long)):
        assert not block.verified
        assert block.evidence.endswith("pass an example of two tokens or more")


def test_finding_twice_finds_the_same(found: Search) -> None:
    """The answer is a function of the model, for a second copy of it and for other inputs."""
    first = found("experts_modules_shared")
    member = example("experts_modules_shared")
    again = member.build()
    assert find_blocks(again, batch=member.inputs(again)[0]) == first.blocks
    assert find_blocks(again) == first.blocks
    assert hash(first.blocks) == hash(find_blocks(again))


class SummedExperts(nn.Module):
    """Adds its experts up one by one, so that only the whole sum is returned by a module."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        total = self.experts[0](x)
        for expert in self.experts[1:]:
            total = total + expert(x)
        return total


@pytest.mark.parametrize("count", [2, 3, 5])
def test_experts_that_are_added_up_are_one_branch(count: int):
    model = NanoGPT().eval()
    width = model.transformer["h"][0].ln_1.normalized_shape[0]
    for block in model.transformer["h"]:
        block.mlp = SummedExperts(count, width)
    for block in find_blocks(model):
        assert [branch.site for branch in block.branches] == [f"{block.name}.attn", f"{block.name}.mlp"]
        assert len(block.mlp.paths) == count


def test_blocks_outside_of_any_list_are_the_modules_that_hold_their_branches() -> None:
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    class Plain(nn.Module):
        def __init__(self, **layers: nn.Module) -> None:
            super().__init__()
            for name, module in layers.items():
                self.add_module(name, module)

        def forward(self, x: Tensor) -> Tensor:
            for module in self.children():
                x = module(x)
            return x

    class ClassToken(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0]

    models = {
        ("encoder",): ClassToken(encoder=layer()),
        ("first", "second"): Plain(first=layer(), second=layer()),
        ("inner.a", "inner.b"): Plain(inner=Plain(a=layer(), b=layer()), norm=nn.LayerNorm(8)),
        ("one", "body.0", "body.1"): Plain(one=layer(), body=nn.Sequential(layer(), layer())),
        ("",): layer(),
    }
    for names, model in models.items():
        blocks = find_blocks(model, batch=torch.randn(2, 5, 8))
        assert tuple(block.name for block in blocks) == names
        assert [block.stream for block in blocks] == [StreamAt(name) for name in names]
        assert all(block.verified and block.modules == (block.name,) for block in blocks)


def test_sums_of_integers_are_no_streams() -> None:
    """Graphs of different size lie in a row, and go to their places in a batch: index arithmetic of torch_geometric."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor, graph: Tensor) -> Tensor:
            counts = torch.zeros(2, dtype=torch.long).scatter_add(0, graph, torch.ones_like(graph))
            begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            place = torch.arange(len(graph)) - begins[graph]
            place = place + graph * 5
            dense = x.new_zeros(10, 8)
            dense[place] = x
            return self.encoder(dense.view(2, 5, 8)).flatten(0, 1)[place]

    blocks = find_blocks(Packed(), batch=(torch.randn(8, 8), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])))
    assert [(block.name, block.verified) for block in blocks] == [("encoder", True)]
    assert blocks.notes == ()


@pytest.mark.parametrize("error", [KeyError, AttributeError, AssertionError, ZeroDivisionError])
def test_what_nobody_foresaw_costs_one_branch_and_is_told(error: type[Exception]) -> None:
    """An operator of a library that fails where it is run again, in ways of its own."""

    @torch.library.custom_op(f"strange::squash_{error.__name__.lower()}", mutates_args=())
    def squash(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise error("nobody ran it in another precision")
        return x.tanh()

    squash.register_autograd(lambda ctx, gradient: gradient)

    class Layer(nn.Module):
        def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.up, self.down, self.activation = nn.Linear(8, 12), nn.Linear(12, 8), activation

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.activation(self.up(x)))

    blocks = find_blocks(nn.Sequential(Layer(torch.relu), Layer(squash)), batch=torch.randn(2, 5, 8))
    assert [(block.name, block.verified) for block in blocks] == [("0", True)]
    (note,) = blocks.notes
    assert note.startswith("no branch of a block: what a sum of shape (2, 5, 8) adds could not be told: ")
    assert f"{error.__name__}: " in note
    with pytest.raises(BlocksNotFoundError, match=r"Refused: what a sum of shape \(2, 5, 8\) adds could not be told"):
        find_blocks(nn.Sequential(Layer(squash), Layer(squash)), batch=torch.randn(2, 5, 8))


class FewQueries(nn.Module):
    """Attention whose queries are those of the first token alone."""

    def __init__(self, to_all: bool) -> None:
        super().__init__()
        self.norm, self.to_all = nn.LayerNorm(8), to_all
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = (x if self.to_all else x[:, :1]) + self.attention(y[:, :1], y, y, need_weights=False)[0]
        return x + self.mlp(x)


@pytest.mark.parametrize(
    ("to_all", "told"),
    [
        (False, r"a sum of shape \(2, 1, 8\) adds to a part of a stream of shape \(2, 5, 8\)"),
        (
            True,
            r"a sum of shape \(2, 5, 8\) adds a branch of shape \(2, 1, 8\) to all of a stream of shape \(2, 5, 8\)",
        ),
    ],
)
def test_a_branch_of_fewer_tokens_than_its_stream_is_told(to_all: bool, told: str):
    first = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    blocks = find_blocks(nn.Sequential(first, FewQueries(to_all)), batch=torch.randn(2, 5, 8))
    assert [branch.kind for block in blocks for branch in block.branches] == ["attention", "mlp", "mlp"]
    (note,) = blocks.notes
    assert re.fullmatch(rf"no branch of a block: {told}: it is not of the form x \+ f\(x\)", note)

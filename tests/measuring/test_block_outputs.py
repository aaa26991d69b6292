"""Token geometry of a real forward pass: the right tokens of the right tensor, on any architecture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_run import TinyGPT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import example, examples

from lightning_spectral import find_blocks
from lightning_spectral.measuring.block_outputs import BlockOutputs, as_sequences
from lightning_spectral.tokens import effective_rank, token_residual

MEMBERS = [
    member.name
    for member in examples()
    if not member.expected_refusal and not member.needs_process_group and member.callable and not member.compiled
]
# In these a block is a head on a pooled token, or no module takes or returns the stream by itself.
WITHOUT = {"siglip_vision": 1, "mmdit": 2, "x_transformers_macaron": 1}
ONE_TOKEN = {"vit_cait": 2}  # blocks of a class token alone
TOKENS_FIRST = {
    "tokens_first",
    "bare_encoder_pre_tokens_first",
    "bare_encoder_post_tokens_first",
    "torch_transformer_pre",
    "torch_transformer_post",
    "xlnet",
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", MEMBERS)
def test_every_block_of_every_architecture_is_heard(name: str):
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    blocks = find_blocks(model, batch=args or kwargs)
    if name in TOKENS_FIRST:
        assert {block.token_dims for block in blocks} == {(0,)}
    outputs = BlockOutputs(model, blocks)
    outputs.start()
    with torch.no_grad():
        model(*args, **kwargs)
    outputs.stop()
    found = outputs.values()
    assert len(found) == len(blocks) - WITHOUT.get(name, 0)
    known = [values for values in found.values() if None not in values[:3]]
    assert len(known) == len(found) - ONE_TOKEN.get(name, 0)
    assert all(0 < values.token_residual <= 1 and 0 < values.typical_token_residual <= 1 for values in known)
    assert all(values.effective_rank >= 1 for values in known)
    assert all(0 < values.rms < values.norm < math.inf for values in found.values())
    assert all(values.sample_residual is None or 0 <= values.sample_residual <= 1 for values in found.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_values_are_those_of_the_stream(generator: torch.Generator):
    model = TinyGPT().eval()
    blocks = find_blocks(model)
    ids = torch.randint(32, (3, 8), generator=generator)
    outputs = BlockOutputs(model, blocks)
    outputs.start()
    model(ids)
    outputs.stop()
    x = model.tokens(ids)
    for block, found in zip(model.blocks, outputs.values().values(), strict=True):
        x = block(x).detach()
        twin = [float((s - s.mean(0)).norm() / s.norm()) for s in x]
        assert found.typical_token_residual == found.token_residual == pytest.approx(sum(twin) / 3, rel=1e-5)
        assert found.effective_rank == pytest.approx(float(effective_rank(x[:1], power=2).mean()), rel=1e-5)
        assert found.sample_residual == pytest.approx(float((x - x.mean(0)).norm() / x.norm()), rel=1e-5)
        assert found.norm == pytest.approx(float(x.norm()), rel=1e-5)
        assert found.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)


def test_tokens_of_a_stream_that_begins_with_a_linear_layer_are_those_of_each_sample(generator: torch.Generator):
    """The first attention reads the product of that layer, which has samples and tokens in one dimension."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return x + self.o((q @ k.mT).softmax(-1) @ v)

    model = nn.Sequential(nn.Linear(3, 8), Attending(), Attending()).eval()
    x = torch.randn(3, 5, 3, generator=generator)
    outputs = BlockOutputs(model, find_blocks(model, batch=x))
    outputs.start()
    model(x)
    outputs.stop()
    x = model[0](x)
    for block, found in zip(model[1:], outputs.values().values(), strict=True):
        x = block(x).detach()
        twin = [float((s - s.mean(0)).norm() / s.norm()) for s in x]
        assert found.token_residual == pytest.approx(sum(twin) / 3, rel=1e-5)
        assert found.sample_residual == pytest.approx(float((x - x.mean(0)).norm() / x.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "token_dims"),
    [((0, 1, 2), (1,)), ((1, 0, 2), (0,)), ((0, 2, 1), (2,))],
)
def test_layouts_are_brought_into_one(layout: tuple[int, ...], token_dims: tuple[int, ...], generator: torch.Generator):
    X = torch.randn(2, 5, 3, generator=generator)
    assert torch.equal(as_sequences(X.permute(layout), token_dims), X)


def test_pictures_are_sequences_of_their_places(generator: torch.Generator):
    picture = torch.randn(2, 3, 4, 5, generator=generator)
    assert torch.equal(as_sequences(picture, (2, 3)), picture.flatten(2).mT)
    last = torch.randn(2, 4, 5, 3, generator=generator)
    assert torch.equal(as_sequences(last, (1, 2)), last.flatten(1, 2))
    alone = torch.randn(4, 3, generator=generator)
    assert torch.equal(as_sequences(alone, (0,)), alone[None])


def test_what_is_not_finite_is_not_measurable_and_costs_no_other_sequence():
    X = torch.randn(3, 6, 4)
    spoiled = X.clone()
    spoiled[1, 2, 3] = torch.nan
    assert torch.isnan(token_residual(spoiled)[1])

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.ModuleDict({"block": Constant()})
    outputs = BlockOutputs(model, [block_of("block")])
    for given, expected in ((spoiled, True), (torch.full((3, 6, 4), torch.nan), False)):
        outputs.start()
        model["block"](given)
        outputs.stop()
        (found,) = outputs.values().values()
        assert (found.token_residual is not None) is (found.effective_rank is not None) is expected
        assert not math.isfinite(found.norm)
        assert not math.isfinite(found.rms)
        assert found.sample_residual is None  # the mean over samples has the bad one in it


def test_a_massive_token_does_not_hide_that_the_others_are_one_vector(generator: torch.Generator):
    X = torch.ones(2, 6, 4) + 1e-3 * torch.randn(2, 6, 4, generator=generator)
    X[:, 0] = 1000 * torch.randn(4, generator=generator)
    model = nn.ModuleDict({"block": nn.Identity()})
    outputs = BlockOutputs(model, [block_of("block")])
    outputs.start()
    model["block"](X)
    (found,) = outputs.values().values()
    assert found.token_residual > 0.9
    assert found.typical_token_residual < 2e-3
    assert found.sample_residual < 2e-3


def test_numbers_whose_squares_overflow_are_finite():
    model = nn.ModuleDict({"block": nn.Identity()})
    outputs = BlockOutputs(model, [block_of("block")])
    outputs.start()
    model["block"](torch.full((2, 6, 4), 1e30))
    (found,) = outputs.values().values()
    assert found.rms == pytest.approx(1e30)
    assert found.token_residual == found.sample_residual == 0


def test_the_modes_around_a_pass_see_nothing_of_the_measuring():
    """Every operation that a mode sees costs it time."""

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    model = TinyGPT().eval()
    outputs, ids, counts = BlockOutputs(model, find_blocks(model)), torch.zeros(2, 8, dtype=torch.long), []
    for measured in (False, True):
        if measured:
            outputs.start()
        with torch.no_grad(), Counting() as mode:
            model(ids)
        counts.append(mode.count)
    outputs.stop()
    assert counts[0] == counts[1]
    assert len(outputs.values()) == 3


def block_of(name: str, **settings: Any) -> Any:
    from lightning_spectral import ResidualBlock

    return ResidualBlock(0, name, (), token_dims=(1,), **settings)


def test_a_failure_in_a_hook_is_kept_for_whoever_asks(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> Tensor:
        raise ValueError("no rank today")

    monkeypatch.setattr("lightning_spectral.measuring.block_outputs.gram", broken)
    model = TinyGPT().eval()
    outputs = BlockOutputs(model, find_blocks(model))
    outputs.start()
    model(torch.zeros(1, 8, dtype=torch.long))
    outputs.stop()
    with pytest.raises(ValueError, match="no rank today"):
        outputs.values()
    assert outputs.values() == {}

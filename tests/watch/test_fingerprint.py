"""Whether weights have changed is seen from the sums of their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import TinyGPT
from torch import nn

from lightning_spectral import attach_scales, find_blocks
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.records import Branch, Factor, Path, ResidualBlock
from lightning_spectral.watch.fingerprint import fingerprint, same_weights
from lightning_spectral.weights.model import ModelWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool, torch.complex64]


def held(tensor: torch.Tensor) -> dict[str, tuple[bool, int]]:
    model = nn.Module()
    model.register_buffer("weight", tensor)
    branch = Branch("mlp", "", paths=(Path((Factor("down", "weight"),)),))
    return fingerprint(ModelWeights(model), [ResidualBlock(0, "", (branch,))])


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), min_size=0, max_size=3),
    st.integers(0, 9),
    st.integers(0, 10**6),
)
def test_a_changed_entry_is_seen_and_a_changed_layout_is_not(
    dtype: torch.dtype, shape: list[int], offset: int, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod())
    whole = torch.randint(0, 2, (offset + count,), generator=generator).to(dtype)
    tensor = whole[offset:].view(shape)
    before = held(tensor)
    assert list(before) == ["weight"]
    assert same_weights(before, held(tensor))
    assert same_weights(before, held(tensor.mT.clone().mT)) if len(shape) > 1 and not offset else True
    if count:
        place = int(torch.randint(count, (), generator=generator))
        changed = tensor.clone().flatten()
        changed[place] = 1 - changed[place] if dtype != torch.bool else ~changed[place]
        assert not same_weights(before, held(changed.view(shape)))


def test_everything_that_a_measurement_reads_is_looked_at():
    model = TinyGPT()
    attach_scales(model, find_blocks(model))
    meter = Meter(ModelWeights(model), find_blocks(model))
    before = fingerprint(ModelWeights(model), meter.blocks)
    names = [name for name, _ in model.named_parameters() if name in before]
    assert {"blocks.0.mlp.2.weight", "blocks.2.norm1.weight", "blocks.1.attention.residual_scale.log_scale"} <= {*names}
    for name in names:
        parameter = model.get_parameter(name)
        kept = parameter.detach().clone()
        parameter.data.flatten()[-1] += 1e-3  # past the counter of versions
        assert not same_weights(before, fingerprint(ModelWeights(model), meter.blocks)), name
        parameter.data.copy_(kept)
    assert same_weights(before, fingerprint(ModelWeights(model), meter.blocks))
    del model.blocks[2]
    assert not same_weights(before, fingerprint(ModelWeights(model), meter.blocks))


def test_a_shard_says_nothing_of_the_whole():
    assert same_weights({"a": (False, 1), "b": (True, 2)}, {"a": (True, 5), "b": (True, 2)})
    assert not same_weights({"a": (False, 1), "b": (True, 2)}, {"a": (True, 5), "b": (True, 3)})


@pytest.mark.parametrize("kind", [nn.LazyLinear])
def test_what_cannot_be_read_is_left_out(kind: type[nn.Module]):
    model = nn.ModuleDict({"layer": kind(4)})
    branch = Branch("mlp", "layer", paths=(Path((Factor("down", "layer.weight"), Factor("up", "gone.weight"))),))
    assert fingerprint(ModelWeights(model), [ResidualBlock(0, "layer", (branch,))]) == {}

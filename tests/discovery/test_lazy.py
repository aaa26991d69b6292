"""Lazy layers: their weights come with the first forward pass, and a search must not be it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_journal
from lightning.pytorch import seed_everything
from pictures import assert_same_pictures, pictures
from tiny_run import VOCABULARY, WIDTH, LitGPT, fit
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_spectral import ResidualRescaler, SpectralMonitor, attach_scales, find_blocks, measure
from lightning_spectral.analysis import lyapunov_exponents
from lightning_spectral.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
IDS = torch.arange(16).view(2, 8)


class LazyHead(LitGPT):
    """Only the head is lazy, as in many a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.model.head = nn.LazyLinear(VOCABULARY)


class LazyInSetup(LazyHead):
    """Runs once in setup, so that the optimizer finds real weights; callbacks are set up before."""

    def setup(self, stage: str) -> None:
        self.model(IDS)


class LazyBlocks(LazyHead):
    """Lazy are branches, a norm, and a layer with a hook of its own that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        for block in self.model.blocks:
            block.mlp = nn.Sequential(nn.LazyLinear(4 * WIDTH), nn.GELU(), nn.LazyLinear(WIDTH))
            block.attention.proj = nn.LazyLinear(WIDTH, bias=False)
        self.model.norm = nn.LazyBatchNorm1d()
        self.model.head.register_forward_hook(self.count)

    def count(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += 1


class LazyPatches(nn.Module):
    """A lazy convolution in front: a picture is what its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.LazyConv2d(WIDTH, 4, 4), LitGPT().model.blocks

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x


def test_a_search_gives_no_weights_to_lazy_layers() -> None:
    """It finds what it finds afterwards, when they have some."""
    model = LazyBlocks()
    before, stream = pictures(model), torch.get_rng_state()
    found = find_blocks(model)
    assert_same_pictures(before, pictures(model))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(block.verified for block in found)
    patches = LazyPatches()
    assert len(find_blocks(patches, batch=torch.zeros(2, 3, 16, 16))) == 3
    assert is_lazy(patches.patches.weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model(IDS)
    assert find_blocks(model, batch=IDS) == found


def test_weights_that_are_not_there_yet_are_a_reason() -> None:
    model = LazyBlocks()
    for layer in measure(model):
        assert layer.ratio is layer.mlp_norm is layer.attention_norm is None
        assert layer.mlp_reason == (
            f"{layer.name}.mlp.2.weight has no content before the first forward pass, because its layer is lazy"
        )
    with pytest.raises(ConfigurationError, match=r"call the model once on a batch, model\(batch\), then measure"):
        measure(model, batch=IDS, linearization="jacobian")
    with pytest.raises(ConfigurationError, match=r"model.blocks.0.attention.proj.weight has no content before"):
        lyapunov_exponents(model, batch=IDS)
    scales = attach_scales(model)
    assert len(scales) == 6
    model(IDS).mean().backward()
    assert all(scale.grad is not None for scale in scales.parameters())


@pytest.mark.parametrize("kind", [LazyHead, LazyInSetup, LazyBlocks])
def test_a_run_with_lazy_layers_is_watched_and_steered(tmp_path: Path, kind: type[LitGPT]) -> None:
    """Weights are drawn as without a monitor, and no warning comes."""
    losses = {}
    ways: dict[str, list[Any]] = {
        "alone": [],
        "watched": [SpectralMonitor(2, geometry=True, on_error="raise")],
        "steered": [SpectralMonitor(2, ResidualRescaler(learnable=False), on_error="raise")],
    }
    for name, monitors in ways.items():
        seed_everything(0)
        module = kind()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*SpectralMonitor")
            fit(tmp_path / name, monitors, module=module, max_steps=4)
        losses[name] = module.losses
        if monitors:
            last = read_journal(tmp_path / name / "spectral.jsonl")[1][-1]
            assert [layer["ratio"] is not None for layer in last["layers"]] == [True] * 3
    assert losses["alone"] == losses["watched"] == losses["steered"]

"""Branches that start at zero (zero-initialized outputs, ReZero, LayerScale) are found for what they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import example

from lightning_spectral import find_blocks, measure

LAST = ("c_proj", "o_proj", "down_proj", "out_proj", "linear2", "alpha", "ls1", "ls2", "output.dense", ".w2", ".wo.")
MODELS = ["nanogpt", "llama", "gemma2", "bert", "torch_encoder_pre", "plain_rezero", "plain_layer_scale", "gpt_oss"]


@pytest.mark.parametrize("name", [*MODELS, "experts_modules", "qwen3_moe", "t5"])
def test_zero_outputs_change_nothing_in_what_is_found(name):
    chosen = example(name)
    model = chosen.build()
    args, kwargs = chosen.inputs(model)
    before = find_blocks(model, batch=args or kwargs)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(word in path for word in LAST):
                parameter.zero_()
    assert find_blocks(model, batch=args or kwargs) == before


@pytest.mark.parametrize("name", MODELS)
def test_even_a_model_of_zeros_is_understood(name):
    chosen = example(name)
    model = chosen.build()
    args, kwargs = chosen.inputs(model)
    before = find_blocks(model, batch=args or kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
    found = find_blocks(model, batch=args or kwargs)
    assert found == before
    assert all(layer.ratio is None for layer in measure(model, found))


class Offset(nn.Module):
    """A gain 1 + g."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((width,), -0.4))

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel."""
        return x * (self.g + 1.0)


def test_a_gain_that_is_made_of_a_parameter_may_begin_at_zero_too():
    """No parameter is zero there: 1 + g is, for g = −1."""
    chosen = example("plain_layer_scale")
    model = chosen.build()
    for layer in [module for module in model.modules() if hasattr(module, "ls1")]:
        layer.ls1, layer.ls2 = Offset(32), Offset(32)
    args, kwargs = chosen.inputs(model)
    before = find_blocks(model, batch=args or kwargs)
    assert all(branch.reason is None for block in before for branch in block.branches)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".g"):
                parameter.fill_(-1.0)
    assert find_blocks(model, batch=args or kwargs) == before

"""What a run says of itself at its start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_spectral import find_blocks, measure
from lightning_spectral.watch.opening import doubts, found, nothing_to_compare


@pytest.mark.parametrize(("name", "named"), [("", ""), ("layers.0", " (layers.0)")])
def test_a_block_that_is_the_whole_model_has_no_empty_brackets(name: str, named: str):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    measurement = measure(model, batch=torch.randn(2, 5, 8))
    (layer,) = measurement.layers
    assert layer.name == ""
    layer = replace(layer, name=name, mlp_norm=None, mlp_reason="it is zero", doubt="it is odd")
    measurement = replace(measurement, layers=(layer,))
    expected = f"1 block, none with a spectral ratio, so there is nothing to compare (block 0{named}: mlp: it is zero)"
    assert nothing_to_compare(measurement) == expected
    (doubt,) = doubts(measurement)
    assert doubt.endswith(f"so their numbers may be wrong ({name or 'the model'}: it is odd)")


@pytest.mark.parametrize("sites", [("self_attn.out_proj", "linear2"), ("linear2",)])
def test_a_model_whose_branches_begin_at_zero_will_have_ratios(sites: tuple[str, ...]):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    for layer in model.layers:
        for site in sites:
            nn.init.zeros_(layer.get_submodule(site).weight)
    blocks = find_blocks(model, batch=torch.randn(2, 5, 8))
    measurement = measure(model, blocks)
    assert nothing_to_compare(measurement) is None
    assert found(blocks, measurement, 10) == (
        "2 blocks, none with a ratio while norms are zero, all verified, measured every 10 steps"
    )

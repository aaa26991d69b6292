"""A state dict is measured by the blocks of its model: as the model that loads it, number for number."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from found import search
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from zoo import example

from lightning_spectral import Measurement, ResidualBlock, attach_scales, find_blocks, measure
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.runs.journal import described
from lightning_spectral.watch.fingerprint import fingerprint
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.stored import in_state_dict

PLAIN = ["llama", "gpt2", "gemma2", "bloom", "mixtral", "deepseek_v3", "t5", "nanogpt", "macaron", "torch_encoder_pre"]
SCALED = ["llama", "gpt2", "gemma2", "nanogpt", "plain_functional_params"]
PARAM_SITES = "plain_functional_params"  # no module carries its branches


def built(name: str) -> tuple[nn.Module, tuple[ResidualBlock, ...]]:
    """A model with other numbers than the one that its blocks were found in."""
    model, blocks = example(name).build(), search(name).blocks
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model, blocks


def scaled(model: nn.Module, blocks: Sequence[ResidualBlock]) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(attach_scales(model, blocks).parameters()):
            parameter.fill_(0.1 * (number + 1))
    return model


def layers(measurement: Measurement) -> list[dict[str, Any]]:
    return measurement.to_dict()["layers"]


def twin(fresh: nn.Module, state_dict: dict[str, Tensor], blocks: Any, **settings: Any) -> Measurement:
    """The slow obvious way: load the state dict into a model, and measure that."""
    dtype = next(value.dtype for value in state_dict.values() if value.is_floating_point())
    fresh = fresh.to(dtype)
    fresh.load_state_dict(state_dict)
    return measure(fresh, blocks, **settings)


def check(fresh: nn.Module, state_dict: dict[str, Tensor], blocks: Any, **settings: Any) -> Measurement:
    found = measure(state_dict, blocks, **settings)
    true = twin(fresh, state_dict, blocks, **settings)
    assert layers(found) == layers(true)
    assert (found.notes, found.linearization, found.adapters) == (true.notes, true.linearization, true.adapters)
    assert any(layer.mlp_norm is not None for layer in found)
    return found


@pytest.mark.parametrize("linearization", ["circuit", "paper"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_state_dict_is_measured_as_its_model(name: str, linearization: Any):
    model, blocks = built(name)
    check(example(name).build(), model.state_dict(), blocks, linearization=linearization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SCALED)
def test_residual_scales_are_in_it(name: str, dtype: torch.dtype):
    """On modules and on weights, by blocks that know nothing of them, rounded as the model rounds."""
    model, blocks = built(name)
    state_dict = scaled(model, blocks).to(dtype).state_dict()
    on_weights = [key for key in state_dict if key.endswith(".0.log_scale")]
    assert bool(on_weights) is (name == PARAM_SITES)
    found = check(scaled(example(name).build(), blocks), state_dict, blocks)
    assert found.layers[0].mlp_scale != 1.0
    bare = measure(example(name).build().state_dict(), blocks)
    assert {layer.mlp_scale for layer in bare} == {1.0}


def test_blocks_that_were_found_with_their_scales_do_not_count_them_twice():
    model = scaled(*built("nanogpt"))
    blocks = find_blocks(model)
    assert layers(measure(model.state_dict(), blocks)) == layers(measure(model, blocks))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net.encoder."])
@pytest.mark.parametrize("name", ["gpt2", PARAM_SITES])
def test_prefixes_of_wrappers_are_no_part_of_names(name: str, prefix: str):
    model, blocks = built(name)
    scaled(model, blocks)
    state_dict = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    # Most of a checkpoint may be something else.
    state_dict |= {f"optimizer.{number}": torch.ones(2) for number in range(5)} | {"step": 3}  # type: ignore[dict-item]
    assert layers(measure(state_dict, blocks)) == layers(measure(model, blocks))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_model_and_its_state_dict_have_one_name():
    model, blocks = built("nanogpt")
    compiled: Any = torch.compile(model)
    inner = find_blocks(compiled)
    assert inner[0].name.startswith("_orig_mod.")  # the path to the module
    assert layers(measure(compiled, inner)) == layers(measure(model, blocks))  # and what is measured has the plain name
    assert all("_orig_mod" not in str(described(block)) for block in inner)
    for state_dict in (compiled.state_dict(), model.state_dict()):
        for names in (blocks, inner):
            assert layers(measure(state_dict, names)) == layers(measure(model, blocks))


def test_some_of_the_blocks_are_enough():
    model, blocks = built("llama")
    scaled(model, blocks)
    state_dict = {key: value for key, value in model.state_dict().items() if ".layers.1." in key}
    found = measure(state_dict, blocks[1:2])
    assert layers(found) == layers(measure(model, blocks[1:2]))


def test_it_is_read_and_left_as_it_is():
    model, blocks = built("gpt2")
    state_dict = dict(model.named_parameters())
    before = {key: value.detach().clone() for key, value in state_dict.items()}
    measure(state_dict, blocks)
    assert all(torch.equal(value, before[key]) for key, value in state_dict.items())
    assert all(value.grad is None and value.requires_grad for value in state_dict.values())


def test_its_fingerprint_is_that_of_the_model():
    model = scaled(*built("nanogpt"))
    weights, blocks = in_state_dict(model.state_dict(), find_blocks(model))
    assert fingerprint(weights, blocks) == fingerprint(ModelWeights(model), blocks)


def test_what_is_missing_or_of_another_shape_is_named():
    model, blocks = built("llama")
    state_dict = model.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    less = {key: value for key, value in state_dict.items() if key != name}
    with pytest.raises(ConfigurationError, match=rf"1 of \d+ weights are missing .*: {name} is not there. Expected"):
        measure(less, blocks)
    wrong = state_dict | {name: state_dict[name][:, 1:]}
    with pytest.raises(ConfigurationError, match=rf"0 of .* 1 have another shape .*: {name} is \(32, \d+\), "):
        measure(wrong, blocks)
    with pytest.raises(ConfigurationError, match=r"of a checkpoint, checkpoint\['state_dict'\]"):
        measure({"state_dict": state_dict}, blocks)  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="is not there"):
        measure({}, blocks)


def test_two_copies_are_refused():
    model, blocks = built("llama")
    both = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in model.state_dict().items()}
    with pytest.raises(
        ConfigurationError, match=r"twice, as 'student\.' and as 'teacher\.', expected one copy"
    ) as told:
        measure(both, blocks)
    one = eval(str(told.value).partition("copy: ")[2], {"state_dict": both})
    assert layers(measure(one, blocks)) == layers(measure(model, blocks))
    key = "model.layers.0.mlp.down_proj.weight"
    again = model.state_dict() | {key.replace("mlp.", "mlp._orig_mod."): torch.zeros(())}
    with pytest.raises(ConfigurationError, match=f"has '{key}' twice, once inside of a wrapper"):
        measure(again, blocks)


def test_without_blocks_or_for_jacobians_it_is_refused():
    model, blocks = built("llama")
    with pytest.raises(
        ConfigurationError, match=r"a state dict and no blocks.*measure\(state_dict, find_blocks\(model"
    ):
        measure(model.state_dict())
    with pytest.raises(ConfigurationError, match=r"a state dict and linearization='jacobian'.*model\.load_state_dict"):
        measure(model.state_dict(), blocks, linearization="jacobian")
    with pytest.raises(ConfigurationError, match="blocks is a LlamaForCausalLM"):
        measure(model.state_dict(), model)  # type: ignore[arg-type]


def test_tensors_without_all_their_numbers_are_refused(process_group: None):
    model, blocks = built("nanogpt")
    state_dict = model.state_dict()
    name = next(key for key in state_dict if key.endswith("mlp.c_proj.weight"))
    hollow = copy.copy(state_dict) | {name: state_dict[name].to("meta")}
    with pytest.raises(
        ConfigurationError, match=f"1 weights hold no numbers, or not all: {name} is on the meta device"
    ):
        measure(hollow, blocks)
    mesh = init_device_mesh("cpu", (1,))
    cut = copy.copy(state_dict) | {name: distribute_tensor(state_dict[name], mesh)}
    with pytest.raises(ConfigurationError, match=f"{name} is a DTensor.*full_state_dict=True.*measure\\(model, blocks"):
        measure(cut, blocks)
    elsewhere = copy.copy(state_dict) | {"other": torch.ones(2, device="meta")}  # not read
    assert layers(measure(elsewhere, blocks)) == layers(measure(model, blocks))

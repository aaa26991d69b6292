"""Checkpoints of any layout are fused as a whole, or refused with the reason."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_run import TinyGPT
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_spectral import ExactSVD, attach_scales, audit, find_blocks, fuse_scales, measure
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records.plain import to_plain
from lightning_spectral.scales.attach import ResidualScale
from lightning_spectral.weights.model import ModelWeights
from lightning_spectral.weights.scaled import with_scales

IDS = torch.arange(8)[None]


class Pair(NamedTuple):
    model: Any
    step: int


def scaled(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = TinyGPT().eval()
    with torch.no_grad():
        for number, parameter in enumerate(attach_scales(model).parameters()):
            parameter.fill_(0.1 * seed + 0.2 * (number % 3) - 0.25)
    return model


MODELS = [scaled(seed) for seed in (1, 2)]
OUTPUTS = [model(IDS).detach() for model in MODELS]
PREFIXES = ["", "model.", "module.", "_orig_mod.", "module._orig_mod.model.", "ema_model.", "online_model.", "net.0."]


def state_of(number: int, prefix: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict as some wrapper or some script leaves it."""
    state = MODELS[number].state_dict()
    return {f"{prefix}{key}": value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def optimizer_state(number: int) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(MODELS[number].parameters())
    return optimizer.state_dict() | {"state": {0: {"exp_avg": torch.zeros(1)}}}


def nested(source: random.Random, depth: int = 3) -> tuple[Any, list[tuple[tuple[Any, ...], int, str]]]:
    """Return a random checkpoint, and where each model lies in it: path, number and prefix."""
    if depth == 0 or source.random() < 0.2:
        number, prefix = source.randrange(2), source.choice(PREFIXES)
        state = state_of(number, prefix)
        places = [((), number, prefix)]
        if source.random() < 0.3:  # an average beside the weights, in one state dict
            state |= state_of(1 - number, f"average.{prefix}") | {"average.n_averaged": torch.tensor(3)}
            places.append(((), 1 - number, f"average.{prefix}"))
        return (OrderedDict if source.random() < 0.5 else dict)(state), places
    parts = [nested(source, depth - 1) for _ in range(source.randrange(1, 3))]
    kind = source.choice(["dict", "list", "tuple", "pair"])
    if kind == "dict":
        names = source.sample(["state_dict", "model", "current_model_state", "ema", "state", "generator", "a.b"], 2)
        whole: Any = {name: part for name, (part, _) in zip(names, parts, strict=False)}
        places = [((name, *path), n, p) for name, (_, at) in zip(names, parts, strict=False) for path, n, p in at]
        whole |= {"epoch": 3, 7: "seven", "optimizer": optimizer_state(0), "losses": [0.5, 0.25]}
        return whole, places
    places = [((place, *path), n, p) for place, (_, at) in enumerate(parts) for path, n, p in at]
    if kind == "pair":
        return Pair(parts[0][0], 5), [place for place in places if place[0][0] == 0]
    return (list if kind == "list" else tuple)(part for part, _ in parts), places


def leaves(value: Any) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield str(key), item
        yield from leaves(item)


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def assert_fused(state: Mapping[str, Any], number: int, prefix: str) -> None:
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = {key: value for key, value in own.items() if not key.startswith(("average.", "n_averaged"))}
    plain = TinyGPT().eval()
    plain.load_state_dict(own, strict=True)
    torch.testing.assert_close(plain(IDS), OUTPUTS[number])


@pytest.mark.parametrize("seed", range(12))
def test_every_copy_in_a_checkpoint_of_any_layout_is_fused(seed: int):
    whole, places = nested(random.Random(seed))
    checkpoint = whole if isinstance(whole, Mapping) else {"all": whole}
    places = (
        places if isinstance(whole, Mapping) else [(("all", *path), number, prefix) for path, number, prefix in places]
    )
    before = copy.deepcopy(checkpoint)
    fused = fuse_scales(checkpoint)
    for path, number, prefix in places:
        assert_fused(at(fused, path), number, prefix)
    assert not [key for key, _ in leaves(fused) if "log_scale" in key or key == "optimizer"]
    for (key, old), (_, new) in zip(leaves(before), leaves(checkpoint), strict=True):  # the original is left alone
        assert not isinstance(old, Tensor) or torch.equal(old, new), key
    assert fused.get("epoch") == checkpoint.get("epoch")


def test_an_averaged_model_a_whole_model_and_casts_are_fused():
    average = AveragedModel(MODELS[0]).eval()
    checkpoint = {"ema": average.state_dict(), "half": state_of(1, "", torch.bfloat16), "whole": MODELS[1]}
    fused = fuse_scales(checkpoint)
    assert_fused(fused["ema"], 0, "module.")
    assert "n_averaged" in fused["ema"]
    assert not [module for module in fused["whole"].modules() if isinstance(module, ResidualScale)]
    torch.testing.assert_close(fused["whole"](IDS), OUTPUTS[1])
    assert any(isinstance(module, ResidualScale) for module in MODELS[1].modules())
    plain = TinyGPT().eval()
    plain.load_state_dict({key: value.float() for key, value in fused["half"].items()})
    torch.testing.assert_close(plain(IDS), OUTPUTS[1], rtol=0.1, atol=0.1)


def test_averages_of_state_dicts_by_name_are_fused():
    """As scripts average checkpoints: key by key, the recipe of each scale too."""
    one, two = (model.state_dict() for model in MODELS)
    mean = {key: (one[key] + two[key]) / 2 for key in one}
    model = scaled(3)
    model.load_state_dict(mean)
    wanted = model.eval()(IDS)
    plain = TinyGPT().eval()
    plain.load_state_dict(fuse_scales(mean))
    torch.testing.assert_close(plain(IDS), wanted)


def test_a_recipe_of_bytes_as_earlier_versions_saved_it_is_read():
    state = {
        key: value.to(torch.uint8) if key.endswith("_extra_state") else value
        for key, value in MODELS[0].state_dict().items()
    }
    assert_fused(fuse_scales(state), 0, "")


def test_a_copy_without_recipes_takes_those_of_the_model():
    names = {name for name, _ in MODELS[0].named_parameters()}
    shadow = {f"module.{name}": value for name, value in MODELS[0].state_dict().items() if name in names}
    fused = fuse_scales({"state_dict": state_of(1, "model."), "shadow": shadow})
    assert set(fused["shadow"]) == {name for name in shadow if "log_scale" not in name}
    wanted = fuse_scales(MODELS[0].state_dict())
    for name, value in fused["shadow"].items():
        assert torch.equal(value, wanted[name.removeprefix("module.")])


def changed(key: str) -> Callable[[Tensor], Tensor]:
    return lambda value: (value + 77) % 256 if key.endswith("_extra_state") else value


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (
            lambda: {"ema": dict(MODELS[0].named_parameters())},
            r"has 'blocks\.0\.attention\.residual_scale\.log_scale' but not .*_extra_state, which says what to fold it",
        ),
        (
            lambda: {"model": MODELS[0].state_dict(), "ema": {"shadow_params": list(MODELS[0].parameters())}},
            r"ema\['shadow_params'\] is a list of \d+ weights without names.*take it out of the checkpoint",
        ),
        (
            lambda: {"blocks": {"mlp": {"residual_scale": {"log_scale": torch.ones(1)}}}},
            r"nested module by module.*expected keys with dots",
        ),
        (
            lambda: {"a": {key: changed(key)(value) for key, value in MODELS[0].state_dict().items()}},
            r"_extra_state, which says what to fold the scale into, cannot be read",
        ),
        (
            lambda: [{"a": {k: v for k, v in MODELS[0].state_dict().items() if "mlp.2.weight" not in k}}],
            r"blocks\.0\.mlp: blocks\.0\.mlp\.2\.weight is not there",
        ),
    ],
    ids=["no recipe", "no names", "nested names", "damaged recipe", "no weight"],
)
def test_what_cannot_be_fused_is_refused_with_the_reason(checkpoint: Callable[[], Any], message: str):
    found = checkpoint()
    with pytest.raises(ConfigurationError, match=message):
        fuse_scales({"all": found} if isinstance(found, list) else found)


def test_the_blocks_that_a_monitor_has_left_lose_their_scales_too(tmp_path: Path):
    model = MODELS[0]
    blocks = with_scales(ModelWeights(model), find_blocks(model))
    foreign = {"lightning_spectral": 99, "blocks": "?"}
    checkpoint = {
        "state_dict": model.state_dict(),
        "callbacks": {"monitor": {"blocks": to_plain(blocks)}, "x": foreign},
    }
    checkpoint["pytorch-lightning_version"] = "2.6.6"
    torch.save(fuse_scales(checkpoint), tmp_path / "fused.ckpt")
    expected = measure(fuse_scales(copy.deepcopy(model)), solver=ExactSVD())
    assert audit(tmp_path / "fused.ckpt", solver=ExactSVD()).layers == expected.layers
    assert fuse_scales(checkpoint)["callbacks"]["x"] == foreign


def test_states_of_training_are_left_out_where_scales_were():
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), 3).state_dict()
    flat = {"state.blocks.0.mlp.residual_scale.log_scale.exp_avg": torch.ones(1), "param_groups.0.lr": 0.1}
    named = {
        "state": {"blocks.0.mlp.residual_scale.log_scale": {"exp_avg": torch.ones(1)}},
        "param_groups": [{"params": ["blocks.0.mlp.residual_scale.log_scale"]}],
    }
    checkpoint = {
        "net": state_of(0, ""),
        "opts": [named, flat],
        "sched": scheduler,
        "lightning_spectral": {"scales": []},
    }
    assert list(fuse_scales(checkpoint)) == ["net", "opts"]
    assert fuse_scales(checkpoint)["opts"] == []
    plain = {"net": TinyGPT().state_dict(), "sched": scheduler, "opt": optimizer_state(0)}
    assert fuse_scales(plain) == plain

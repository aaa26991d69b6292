"""The audit of a file says what ``measure`` says of the model, for every model of the zoo, or why it cannot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import example, examples, hugging_face, unseen

from lightning_spectral import ExactSVD, Measurement, ResidualBlock, audit, find_blocks, measure
from lightning_spectral.checkpoints import architecture as room
from lightning_spectral.checkpoints import shrink
from lightning_spectral.errors import CheckpointError
from lightning_spectral.records.plain import from_plain, to_plain

pytestmark = [
    pytest.mark.usefixtures("process_group"),  # some members are sharded
    pytest.mark.filterwarnings("ignore"),  # the library remarks on odd sizes
]

LIBRARY = [member.name for member in (*hugging_face.surveyed(), *unseen.members())]
OWN = [member.name for member in examples() if member.name not in LIBRARY and not member.expected_refusal]

NO_NORMS = "a token mixer that is not attention has no weight linearization"
REFUSED = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "convnext"), NO_NORMS),
    **dict.fromkeys(("xlstm", "whisper"), "could not be run on any guessed input"),
}
REFUSED_OWN = {
    "spectral_norm_weights": "weights are missing",
    "weight_norm_weights": "weights are missing",
}
# Of these, no narrow twin is found: the narrow model cannot be built from the widths, or its layouts hold sizes.
NOT_NARROWED = {"dbrx": "rearranged by 'reshape'", "xlstm": "could not be run", "convnext": "heads is not known"}

NOT_NARROWED |= {name: reason for name, reason in REFUSED.items() if reason != NO_NORMS and name not in NOT_NARROWED}

NOT_WIDENED = ("bamba", "granitemoehybrid", "xlnet")  # their configs check one width against another


def same(found: Measurement, true: Measurement) -> None:
    assert len(found.layers) == len(true.layers)
    for layer, other in zip(found, true, strict=True):
        assert layer.name == other.name.replace("_orig_mod.", "")
        assert (layer.index, layer.mlp_expert, layer.reason) == (other.index, other.mlp_expert, other.reason)
        for name in ("mlp_norm", "attention_norm", "mlp_scale", "attention_scale"):
            value, expected = getattr(layer, name), getattr(other, name)
            assert (value is None) == (expected is None), (layer.name, name)
            assert value is None or math.isclose(value, expected, rel_tol=1e-5), (layer.name, name)


def saved(model: Any, folder: Path, names: str) -> Path:
    """Save a model of the library, under the names of its files or under those of its modules."""
    if names == "files":
        model.save_pretrained(folder)
        return folder
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.mark.zoo
@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_with_a_config_is_refused_where_the_model_is_not_understood(name: str, tmp_path: Path):
    path = saved(example(name).build(), tmp_path, "files")
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        audit(path)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in LIBRARY if name not in REFUSED])
def test_a_folder_with_a_config_is_measured_as_the_model_is(name: str, tmp_path: Path):
    model = example(name).build()
    names = "modules" if name in ("mixtral", "bert", "vit", "t5") else "files"
    path = saved(model, tmp_path, names)
    blocks = find_blocks(model)
    same(audit(path, solver=ExactSVD()), measure(model, blocks, solver=ExactSVD()))
    assert from_plain(to_plain(blocks)) == blocks


def kept(name: str, path: Path) -> tuple[Any, tuple[ResidualBlock, ...]]:
    """Write the checkpoint of a model of one's own as a monitor leaves it; return the model and its blocks."""
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    blocks = find_blocks(model, batch=args or kwargs)
    left = {"SpectralMonitor{'prefix': 'spectral'}": {"blocks": to_plain(blocks)}, "ModelCheckpoint": {"blocks": 3}}
    content = {"state_dict": model.state_dict(), "global_step": 7, "callbacks": left}
    torch.save(content, path)
    assert from_plain(to_plain(blocks)) == blocks
    return model, blocks


@pytest.mark.zoo
@pytest.mark.parametrize("name", REFUSED_OWN)
def test_an_architecture_of_ones_own_whose_weights_are_not_in_the_file_is_refused(name: str, tmp_path: Path):
    _, blocks = kept(name, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=REFUSED_OWN[name]):
        audit(tmp_path / "last.ckpt", blocks)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in OWN if name not in REFUSED_OWN])
def test_an_architecture_of_ones_own_is_measured_by_its_blocks(name: str, tmp_path: Path):
    """By those that the user gives, and by those that a monitor has left in the checkpoint."""
    model, blocks = kept(name, tmp_path / "last.ckpt")
    found = audit(tmp_path / "last.ckpt", blocks, solver=ExactSVD())
    assert found.step == 7
    same(found, measure(model, blocks, solver=ExactSVD()))
    assert audit(tmp_path / "last.ckpt", solver=ExactSVD()) == found


def widened(entries: dict[str, Any], factor: int = 4) -> dict[str, Any]:
    """The config of a model that is wider and else the same."""
    result = {}
    for key, value in entries.items():
        is_width = isinstance(key, str) and shrink._WIDTH.fullmatch(key) and not shrink._NO_WIDTH.search(key)
        if isinstance(value, dict):
            value = widened(value, factor)
        elif isinstance(value, int) and not isinstance(value, bool) and is_width:
            value *= factor
        result[key] = value
    return result


def wide(name: str) -> Any:
    """Return what builds a model of the library four times as wide."""
    model: Any = example(name).build()
    entries = widened(model.config.to_dict()) | {"architectures": [type(model).__name__]}
    return room._Architecture(entries, most_weights=100_000, most_numbers=10**8)


@pytest.mark.zoo
@pytest.mark.parametrize("name", NOT_NARROWED)
def test_a_model_that_has_no_narrow_twin_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    make = wide(name)
    monkeypatch.setattr(room, "_SMALL", 0)
    with pytest.raises(CheckpointError, match=NOT_NARROWED[name]):
        room._blocks(make, make.model({}, "meta"))


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in LIBRARY if name not in NOT_WIDENED and name not in NOT_NARROWED])
def test_blocks_found_in_a_narrow_model_are_those_of_the_wide_one(name: str, monkeypatch: pytest.MonkeyPatch):
    make = wide(name)
    whole = make.model({}, "cpu")
    monkeypatch.setattr(room, "_SMALL", 0)
    blocks, truth = room._blocks(make, make.model({}, "meta")), find_blocks(whole)
    for block, true in zip(blocks, truth, strict=True):
        assert (block.index, block.name) == (true.index, true.name)
        for branch, other in zip(block.branches, true.branches, strict=True):
            assert (branch.kind, branch.site, branch.paths) == (other.kind, other.site, other.paths)


def test_a_layout_that_holds_sizes_is_not_widened():
    """Shares that are no whole numbers, selections of another size, unknown steps: refused, one and all."""
    for layout, narrow, wide, message in (
        ((("narrow", 0, 1, 2),), (4, 2), (6, 2), "1 of 4 is no whole number of 6"),
        ((("select", 0, 1),), (4, 2, 2), (8, 2, 2), "selects from a dimension whose size changed"),
        ((("reshape", (2, 2)),), (4,), (8,), "rearranged by 'reshape'"),
        ((), (4,), (4, 2), "another number of dimensions"),
    ):
        factor = shrink.Factor("up", "w", layout=layout)
        with pytest.raises(shrink.NotScaledError, match=message):
            shrink._factor(factor, {"w": narrow}, {"w": wide}, 2)
    adapted = shrink.Factor("up", "w", adapters=((shrink.Factor("up", "a"),),))
    with pytest.raises(shrink.NotScaledError, match="a matrix has adapters"):
        shrink._factor(adapted, {"w": (4,)}, {"w": (8,)}, 2)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_sharded_folder_is_put_together(name: str, tmp_path: Path):
    """Experts are stored one by one, and those of one layer may lie in several files."""
    model: Any = example(name).build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    same(audit(tmp_path, solver=ExactSVD()), measure(model, solver=ExactSVD()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix", ["model.", "net.inner.", "_orig_mod.model."])
def test_a_checkpoint_of_a_training_run_has_a_prefix(name: str, prefix: str, tmp_path: Path):
    model: Any = example(name).build()
    saved(model, tmp_path, "modules")
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "run.ckpt")
    same(audit(tmp_path / "run.ckpt", solver=ExactSVD()), measure(model, solver=ExactSVD()))


def test_two_copies_of_a_model_are_not_chosen_from(tmp_path: Path):
    model: Any = example("llama").build()
    saved(model, tmp_path, "modules")
    state = {prefix + key: value for prefix in ("student.", "teacher.") for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"found the weights of the model twice, as 'student\.' and as 'teacher"):
        audit(tmp_path / "both.pt")

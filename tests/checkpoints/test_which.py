"""Folders and files with more than one thing in them: the right weights are measured, or all candidates are named."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from zoo import example

from lightning_spectral import ExactSVD, ResidualBlock, attach_scales, audit, find_blocks, fuse_scales, measure
from lightning_spectral.errors import CheckpointError, ConfigurationError

ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def weights(factor: float) -> dict[str, Tensor]:
    """Of a GPT-2 whose MLPs are stronger by a factor."""
    state = example("gpt2").build().state_dict()
    return {key: value * factor if "mlp.c_fc" in key else value.clone() for key, value in state.items()}


def saved(folder: Path) -> Path:
    """A folder with the config of the model, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    example("gpt2").build().config.save_pretrained(folder)
    return folder


def write(folder: Path, name: str, state: dict[str, Tensor]) -> None:
    """Write weights into a file of a name, or into a shard with an index of that name."""
    stem, _, suffix = name.removesuffix(".index.json").partition(".")
    if name.endswith(".index.json"):
        shard = f"{stem}-00001-of-00001.{suffix}"
        weight_map = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
        (folder / name).write_text(json.dumps(weight_map))
        name = shard
    if suffix == "bin":
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name, {"format": "pt"})


def strength(path: Path, blocks: Any = None, **options: Any) -> float:
    """The factor of the weights that are measured."""
    return round((audit(path, blocks, solver=ExactSVD(), **options).layers[0].ratio or 0) / plain(), 3)


@functools.cache
def plain() -> float:
    model = example("gpt2").build()
    return measure(model, solver=ExactSVD()).layers[0].ratio or 0


def refused(path: Path, blocks: Any = None, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as info:
        audit(path, blocks, **options)
    message = str(info.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_a_folder_is_read_in_the_order_of_transformers(first: int, tmp_path: Path):
    """What is left of older saves stands beside it, and the library says which of them it takes."""
    saved(tmp_path)
    for number, name in enumerate(ORDER[first:]):
        write(tmp_path, name, weights(2.0 + number))
    write(tmp_path, "model.fp16.safetensors", weights(9.0))  # a variant, which is taken only by its name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert strength(tmp_path) == 2.0
    assert (measure(loaded, solver=ExactSVD()).layers[0].ratio or 0) / plain() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("name", ["other.safetensors", "other.safetensors.index.json"])
def test_a_config_names_its_weights(name: str, tmp_path: Path):
    saved(tmp_path)
    write(tmp_path, "model.safetensors", weights(1.0))
    write(tmp_path, name, weights(3.0))
    config = json.loads((tmp_path / "config.json").read_text())

    def naming(value: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": value}))
        return tmp_path

    loaded = transformers.AutoModelForCausalLM.from_pretrained(naming(name))
    assert (measure(loaded, solver=ExactSVD()).layers[0].ratio or 0) / plain() == pytest.approx(3.0, rel=1e-4)
    assert strength(tmp_path) == 3.0
    assert strength(naming(None)) == 1.0
    for wrong in ("../other.safetensors", "absent.safetensors", "a\nb.safetensors"):
        assert "which is not a file beside it" in refused(naming(wrong))
    for wrong in (3, "weights.bin", ["a"]):
        assert "expected the name of a *.safetensors or a *.safetensors.index.json" in refused(naming(wrong))


def test_a_link_into_a_cache_is_followed(tmp_path: Path):
    snapshot = saved(tmp_path / "models--someone--x" / "snapshots" / "abc")
    blobs = tmp_path / "models--someone--x" / "blobs"
    blobs.mkdir()
    save_file(weights(1.0), blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert strength(snapshot) == strength(snapshot / "model.safetensors") == 1.0
    assert "snapshots/abc')" in refused(tmp_path / "models--someone--x")
    (blobs / "123").unlink()
    for path in (snapshot, snapshot / "model.safetensors"):
        assert "it is a link to one that is not there, as an incomplete download leaves it" in refused(path)


def lay(folder: Path, *files: str) -> Path:
    """Lay files into a folder: weights, text, or what needs no content."""
    state = weights(1.0)
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(state, path)
        elif path.suffix in (".json", ".txt", ".py", ".h5", ".msgpack", ".pb"):
            path.write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
        else:
            torch.save({"state_dict": state}, path)
    return folder


# Files in a folder, and what the refusal says; {} stands for the folder.
FOLDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "variants": (
        ("model.fp16.safetensors", "model.fp32.safetensors"),
        ("found model.fp16.safetensors, model.fp32.safetensors in this folder", "audit('{}/model.fp32.safetensors')"),
    ),
    "training": (
        ("checkpoint-90/model.safetensors", "checkpoint-1000/model.safetensors", "trainer_state.json"),
        ("found no weights in this folder", "checkpoint-90, checkpoint-1000", "audit('{}/checkpoint-1000')"),
    ),
    "lightning": (
        ("version_0/checkpoints/epoch=0-step=10.ckpt", "version_0/checkpoints/last.ckpt", "hparams.yaml"),
        ("epoch=0-step=10.ckpt, ", "audit('{}/version_0/checkpoints/last.ckpt')"),
    ),
    "pipeline": (
        ("model_index.json", "text_encoder/model.safetensors", "unet/weights.bin", "optimizer.bin"),
        ("text_encoder, unet/weights.bin",),
    ),
    "a single file of torch": (("consolidated.00.pth", "params.json"), ("audit('{}/consolidated.00.pth')",)),
    "model parallel": (
        ("consolidated.00.pth", "consolidated.01.pth"),
        ("consolidated.00.pth is one of several model-parallel parts, as consolidated.01.pth beside it says",),
    ),
    "no index": (
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("found model-00001-of-00002.safetensors, model-00002", "the index that says what is in them, model.saf"),
    ),
    "one of two shards": (
        ("model-00001-of-00002.safetensors", "config.json"),
        ("it is number 1 of 2 files that hold the model together: name the folder that has all of them",),
    ),
    "adapters": (
        ("adapter_config.json", "adapter_model.safetensors"),
        ("found only adapters, adapter_config.json, for the weights of 'someone/base'", "merge_and_unload"),
    ),
    "adapters beside weights": (
        ("adapter_config.json", "adapter_model.safetensors", "model.safetensors"),
        ("found model.safetensors and the adapters of adapter_config.json", "audit('{}/model.safetensors')"),
    ),
    "deepspeed": (
        ("zero_to_fp32.py", "latest.txt", "global_step5/mp_rank_00_model_states.pt"),
        ("found a checkpoint of DeepSpeed", "zero_to_fp32.py", "audit('{}/global_step5/mp_rank_00_model_states.pt')"),
    ),
    "deepspeed in parts": (
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("found a checkpoint of DeepSpeed, in parts",),
    ),
    "megatron": (
        ("latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"),
        ("found the model-parallel parts that Megatron writes",),
    ),
    "tensorflow and flax": (("tf_model.h5", "flax_model.msgpack"), ("found only flax_model.msgpack, tf_model.h5",)),
    "saved model": (("saved_model.pb",), ("found saved_model.pb, a TensorFlow graph",)),
    "cut tensors": (
        ("shard-00000-model-00001-of-00001.safetensors",),
        ("holds a part of every tensor", "consolidate_safetensors_files"),
    ),
    "no weights": (("optimizer.pt", "training_args.bin", "README.txt"), ("found no weights in this folder, expected",)),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_is_meant_of_a_folder_is_asked(kind: str, tmp_path: Path):
    files, messages = FOLDERS[kind]
    said = refused(lay(tmp_path, *files))
    for message in messages:
        assert message.format(tmp_path) in said


def test_adapters_of_a_model_without_a_name_are_told(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}', encoding="utf-8")
    assert "found only adapters, adapter_config.json: merge them first" in refused(tmp_path)


def test_two_formats_of_a_model_in_one_folder_are_told_apart(tmp_path: Path, blocks: Any, state: Any):
    write(saved(tmp_path), "model.safetensors", weights(2.0))
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    said = refused(tmp_path)
    assert f"audit('{tmp_path / '.metadata'}') or audit('{tmp_path / 'model.safetensors'}')" in said
    assert strength(tmp_path / ".metadata", blocks) == 1.0
    assert strength(tmp_path / "model.safetensors") == 2.0


# Names of files, of which the first is named, and what the refusal says; None where it is whole.
PARTS: dict[tuple[str, ...], str | None] = {
    ("consolidated.00.pth",): None,
    ("consolidated.01.pth",): "as its number says",
    ("consolidated.01.pth", "consolidated.00.pth"): "as consolidated.00.pth beside it says",
    ("mp_rank_00_model_states.pt",): None,
    ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"): "mp_rank_01_model_states.pt beside it",
    ("zero_pp_rank_0_mp_rank_00_model_states.pt",): "a part of every tensor, as DeepSpeed writes them",
    ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"): "mp_rank_00 is one of several model-parallel",
    ("mp_rank_00_000/model.pt", "mp_rank_00_001/model.pt"): "as mp_rank_00_001 beside it says",
    ("tp_rank_00_pp_rank_000/w.ckpt", "tp_rank_01_pp_rank_000/w.ckpt"): "tp_rank_01_pp_rank_000 beside it",
    ("model_rank0.pt", "model_rank1.pt"): "as model_rank1.pt beside it says",
    ("x-model_part-0.pt", "x-model_part-1.pt"): "x-model_part-1.pt beside it",
    ("pytorch_model-00002-of-00003.bin",): "it is number 2 of 3 files that hold the model together",
    ("pytorch_model-00001-of-00001.bin",): None,
    # Numbers of steps, of epochs, of models, and the rank of adapters count nothing that belongs together.
    ("epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt"): None,
    ("checkpoint_0.pt", "checkpoint_1.pt"): None,
    ("model_0.pt", "model_1.pt"): None,  # an ensemble
    ("model0/model.pt", "model1/model.pt"): None,
    ("lora_rank8.ckpt", "lora_rank16.ckpt"): None,
}


@pytest.mark.parametrize("names", PARTS, ids=lambda names: names[0].replace("/", "-") + f"-{len(names)}")
def test_one_of_several_files_is_not_measured_as_the_model(names: tuple[str, ...], blocks: Any, tmp_path: Path):
    lay(tmp_path, *names)
    message = PARTS[names]
    if message is None:
        assert len(audit(tmp_path / names[0], blocks).layers) == 3
    else:
        assert message in refused(tmp_path / names[0], blocks)


def rows(value: Tensor) -> Tensor:
    return value[: value.shape[0] // 2].clone()


def columns(value: Tensor) -> Tensor:
    return value[:, : value.shape[1] // 2].clone()


LLAMA_PARTS = {"v_proj": rows, "q_proj": rows, "k_proj": rows, "o_proj": columns, "gate_proj": rows, "up_proj": rows}


@pytest.mark.parametrize("structure", ["blocks", "config", "monitor"])
def test_a_part_of_every_matrix_is_told_by_its_shape(structure: str, tmp_path: Path):
    """The parts of one file fit together, and are alone in their folder: only sizes say that they are no whole."""
    from lightning_spectral.records.plain import to_plain

    model: Any = example("llama").build()
    blocks = find_blocks(model)
    cut: dict[str, Callable[[Tensor], Tensor]] = LLAMA_PARTS | {"down_proj": columns}
    part = {key: cut.get(key.split(".")[-2], torch.clone)(value) for key, value in model.state_dict().items()}
    left = {"callbacks": {"monitor": {"blocks": to_plain(blocks)}}} if structure == "monitor" else {}
    torch.save({"state_dict": part} | left, tmp_path / "weights.pt")
    if structure == "config":
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(tmp_path)
    said = refused(tmp_path / "weights.pt", blocks if structure == "blocks" else None)
    assert "12 have another shape" in said
    assert "Each of these is one of 2 equal parts of a matrix, as model-parallel training stores it" in said


STORED: dict[str, tuple[Callable[[str, Tensor], dict[str, Tensor]], str]] = {
    "two numbers in a byte": (
        lambda name, value: {name: value[:, ::2].to(torch.uint8)},
        "They are quantized, which is not read: load the model, dequantize it",
    ),
    "GPTQ": (
        lambda name, value: {name.replace("weight", "qweight"): value.int(), name.replace("weight", "scales"): value},
        "They are quantized, which is not read",
    ),
    "FSDP": (
        lambda name, value: {name.replace("weight", "_flat_param"): value.flatten()},
        "FSDP has flattened them, which is not read: save the model with its full state dict",
    ),
}


@pytest.mark.parametrize("kind", STORED)
def test_weights_in_another_form_are_no_parts_of_matrices(kind: str, state: Any, blocks: Any, tmp_path: Path):
    store, message = STORED[kind]
    stored: dict[str, Tensor] = {}
    for key, value in state.items():
        stored |= store(key, value) if value.ndim > 1 else {key: value}
    torch.save(stored, tmp_path / "a.pt")
    assert message in refused(tmp_path / "a.pt", blocks)


def longer(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A model with more layers, which are like the last one."""
    more = {
        key.replace(".h.2.", f".h.{number}."): value
        for number in range(3, layers)
        for key, value in state.items()
        if ".h.2." in key
    }
    return state | more


@pytest.mark.parametrize("structure", ["blocks", "config"])
def test_layers_that_are_not_read_are_told(structure: str, state: Any, blocks: Any, tmp_path: Path):
    path = saved(tmp_path) / "a.pt"
    torch.save({"net." + key: value for key, value in longer(state, 6).items()}, path)
    found = audit(path, blocks if structure == "blocks" else None)
    begin = "12 matrices of the file belong to none of 3 blocks, though their like do: "
    assert found.notes == (f"{begin}net.transformer.h.3, net.transformer.h.4, net.transformer.h.5",)
    assert str(found).splitlines()[-1] == f"note: {found.notes[0]}"
    assert found.to_dict()["notes"] == list(found.notes)
    torch.save(state, path)
    whole = audit(path, blocks)
    assert whole.notes == ()  # embeddings, heads, queries and keys are read by nobody
    assert "notes" not in whole.to_dict()
    assert [layer.ratio for layer in found] == [layer.ratio for layer in whole]


def test_experts_that_are_not_read_are_told(tmp_path: Path):
    model: Any = example("mixtral").build()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    more = {
        key.replace("experts.1.", "experts.9."): value.clone() for key, value in state.items() if "experts.1." in key
    }
    save_file(state | more, tmp_path / "model.safetensors", {"format": "pt"})
    said = refused(tmp_path)
    assert "which is put together from" in said
    assert "expected (4, " in said


def test_a_layer_that_is_stored_twice_is_read_once_and_not_told(tmp_path: Path):
    model: Any = example("nanogpt").build()
    first, second, _ = model.transformer.h
    second.mlp, second.ln_2 = first.mlp, first.ln_2
    blocks = find_blocks(model, batch=example("nanogpt").inputs(model)[0])
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert audit(tmp_path / "a.pt", blocks).notes == ()


@pytest.mark.parametrize("name", ["lora_A.weight", "lora_a.weight", "lora_B.default.weight", "lora_magnitude_vector"])
@pytest.mark.parametrize("structure", ["blocks", "config"])
def test_adapters_that_no_block_knows_are_not_passed_over(
    name: str, structure: str, state: Any, blocks: Any, tmp_path: Path
):
    adapter = {f"transformer.h.1.attn.c_proj.{name}": torch.ones(2, 32)}
    path = saved(tmp_path) / "a.pt"
    torch.save(state | adapter, path)
    said = refused(path, blocks if structure == "blocks" else None)
    assert f"found 1 weights of adapters, such as transformer.h.1.attn.c_proj.{name}, on matrices that" in said
    torch.save(adapter, path)
    assert "It has weights of adapters" in refused(path, blocks)


NESTED: dict[str, Callable[[Any, Any], Any]] = {
    "ema alone": lambda state, other: {"ema": state, "opt": {"exp_avg": state}, "step": 3},
    "deepspeed": lambda state, other: {"module": state, "ds_version": "0.1", "optimizer": None},
    "composer": lambda state, other: {"state": {"model": state, "optimizers": {"Adam": {"state": state}}}, "rng": []},
    "wrapped": lambda state, other: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    "parts of a system": lambda state, other: {"generator": state, "discriminator": {"a.weight": torch.ones(3, 3)}},
    "among other modules": lambda state, other: (
        {f"net.{key}": value for key, value in state.items()} | {"head.weight": torch.ones(3, 3), "config": {"lr": 0.1}}
    ),
    "lightning": lambda state, other: {
        "pytorch-lightning_version": "2.6",
        "state_dict": state,
        "callbacks": {"Average": {"current_model_state": other}},
    },
}


@pytest.mark.parametrize("kind", NESTED)
def test_the_one_state_dict_is_found_where_it_stands(kind: str, state: Any, blocks: Any, tmp_path: Path):
    torch.save(NESTED[kind](state, weights(2.0)), tmp_path / "a.pt")
    assert strength(tmp_path / "a.pt", blocks) == 1.0


SEVERAL: dict[str, tuple[Callable[[Any, Any], Any], str, str]] = {
    "average": (lambda state, other: {"model": state, "model_ema": other, "epoch": 3}, "model", "model_ema"),
    "timm": (lambda state, other: {"state_dict": state, "state_dict_ema": other}, "state_dict", "state_dict_ema"),
    "deep": (lambda state, other: {"s": {"raw": state, "ema": other, "optimizer": {}}}, "raw", "ema"),
    "modules": (
        lambda state, other: (
            {f"student.{key}": value for key, value in state.items()}
            | {f"teacher.{key}": value for key, value in longer(other, 5).items()}
        ),
        "student",
        "teacher",
    ),
    "trained in a wrapper": (
        lambda state, other: state | {f"_average.module.{key}": value for key, value in other.items()},
        "transformer",
        "_average.module",
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_several_models_one_is_chosen_by_its_key(kind: str, state: Any, blocks: Any, tmp_path: Path):
    content, one, two = SEVERAL[kind]
    torch.save(content(state, weights(2.0)), tmp_path / "a.pt")
    said = refused(tmp_path / "a.pt", blocks)
    assert "found the weights of the model twice" in said
    assert f"key={two!r}" in said
    if kind != "trained in a wrapper":  # of which one is no part of the other
        assert f"key={one!r}" in said
        assert strength(tmp_path / "a.pt", blocks, key=one) == 1.0
    assert strength(tmp_path / "a.pt", blocks, key=two) == 2.0
    said = refused(tmp_path / "a.pt", blocks, key="nothing")
    assert "no name in it begins with the key 'nothing', expected something like" in said


def test_a_key_leads_into_a_checkpoint_of_lightning(state: Any, blocks: Any, tmp_path: Path):
    """And into one of several processes, and into a file of another format."""
    torch.save(NESTED["lightning"](state, weights(2.0)), tmp_path / "a.ckpt")
    assert strength(tmp_path / "a.ckpt", blocks, key="callbacks.Average.current_model_state") == 2.0
    assert strength(tmp_path / "a.ckpt", blocks, key="state_dict") == 1.0
    both = {f"net.{key}": value for key, value in state.items()}
    both |= {f"ema.{key}": value for key, value in weights(2.0).items()}
    save_file(both, tmp_path / "a.safetensors")
    assert strength(tmp_path / "a.safetensors", blocks, key="ema") == 2.0
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save({"model": state, "ema": weights(2.0)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert strength(tmp_path / "dcp", blocks, key="ema") == 2.0
    assert "found the weights of the model twice" in refused(tmp_path / "dcp", blocks)


def test_a_copy_without_scales_is_a_copy(tmp_path: Path):
    """It has fewer names, and is no less a model."""
    model: Any = example("gpt2").build()
    blocks = find_blocks(model)
    attach_scales(model, blocks)
    torch.save({"model": model.state_dict(), "ema": fuse_scales(model.state_dict())}, tmp_path / "a.pt")
    assert "found the weights of the model twice" in refused(tmp_path / "a.pt", blocks)


def test_a_dict_that_holds_itself_ends(tmp_path: Path):
    inner: dict[str, Any] = {"w": torch.ones(2, 2)}
    inner["again"] = inner
    torch.save({"a": inner, "b": {"c": inner}}, tmp_path / "a.pt")
    assert "found 1 tensors (1 x w)" in refused(tmp_path / "a.pt")


def test_tensors_of_other_kinds_are_named(state: Any, blocks: Any, tmp_path: Path):
    name = "transformer.h.0.attn.c_proj.weight"
    torch.save(state | {name: state[name].to_sparse()}, tmp_path / "a.pt")
    assert "1 of 18 weights are missing" in refused(tmp_path / "a.pt", blocks)
    assert "tensors of these kinds were not read: torch.sparse_coo" in refused(tmp_path / "a.pt", blocks)
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "a.pt")
    assert "found no tensors, expected the weights of a model (tensors of these kinds" in refused(tmp_path / "a.pt")


def test_names_that_become_equal_without_wrappers_are_told_apart(state: Any, blocks: Any, tmp_path: Path):
    for wrapper in ("_orig_mod.", "transformer._fsdp_wrapped_module."):
        other = {
            wrapper + key if wrapper[0] == "_" else key.replace("transformer.", wrapper, 1): value
            for key, value in weights(2.0).items()
        }
        torch.save(state | other, tmp_path / "a.pt")
        said = refused(tmp_path / "a.pt", blocks)
        assert "twice, as 'transformer." in said
        assert "with different numbers, expected one copy" in said
    torch.save(state | {f"_orig_mod.{key}": value for key, value in state.items()}, tmp_path / "a.pt")
    assert strength(tmp_path / "a.pt", blocks) == 1.0  # the same numbers, once too often


def test_a_weight_under_an_old_and_a_new_name_is_told(tmp_path: Path):
    """The library reads gains as ``gamma`` and as ``weight``, whichever a file has."""
    model: Any = example("bert").build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    (gain, *_) = [key for key in state if key.endswith("output.LayerNorm.weight")]
    old = gain.replace("weight", "gamma")
    torch.save(state | {old: 3 * state[gain]}, tmp_path / "a.pt")
    said = refused(tmp_path / "a.pt")
    assert f"found {gain} twice" in said
    assert repr(old) in said
    torch.save({old if key == gain else key: value for key, value in state.items()}, tmp_path / "a.pt")
    assert len(audit(tmp_path / "a.pt").layers) > 0


def test_the_files_of_an_index_are_of_one_model(tmp_path: Path):
    """Missing, of another model, or with more in them than the index says, which the library takes too."""
    model: Any = example("gpt2").build()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    first, second = sorted(tmp_path.glob("model-*.safetensors"))
    assert strength(index) == strength(tmp_path) == 1.0
    assert f"name the index, audit('{index}'), or the folder" in refused(first)
    from safetensors.torch import load_file

    parts = load_file(first), load_file(second)
    moved = "transformer.h.2.mlp.c_proj.weight"
    assert moved in parts[1]
    entries = json.loads(index.read_text())
    kept = {key: value for key, value in entries["weight_map"].items() if key != moved}
    index.write_text(json.dumps(entries | {"weight_map": kept}))
    assert strength(tmp_path) == 1.0  # the tensor is in a file that is read
    save_file(parts[0] | {moved: parts[1][moved]}, first, {"format": "pt"})
    said = refused(tmp_path)
    assert f"{moved} is in {first.name} and in {second.name}: they are not of one model" in said
    second.unlink()
    assert f"1 of its 2 files are not there, {second.name}: no such file" in refused(tmp_path)


def test_a_model_is_no_blocks(tmp_path: Path, state: Any):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(
        ConfigurationError, match=r"blocks is a GPT2LMHeadModel, expected what find_blocks returns: audit\(path, find"
    ):
        audit(tmp_path / "a.pt", example("gpt2").build())  # type: ignore[arg-type]


def test_blocks_know_the_shapes_they_were_found_with(blocks: tuple[ResidualBlock, ...]):
    shapes = {name: tuple(value.shape) for name, value in example("gpt2").build().state_dict().items()}
    factors = [factor for block in blocks for branch in block.branches for factor in branch.factors]
    assert all(factor.shape == shapes[factor.parameter or ""] for factor in factors)

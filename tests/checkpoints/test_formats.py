"""What is no checkpoint that the audit reads is named, with the way from it to one that is. Nothing is run for that."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import zipfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from zoo import example

from lightning_spectral import audit, find_blocks, measure
from lightning_spectral.checkpoints.architecture import _cleaned
from lightning_spectral.checkpoints.shrink import narrower
from lightning_spectral.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def refused(path: str | Path, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=re.escape(str(path) if len(str(path)) < 1000 else "xxx")) as info:
        audit(path, **options)
    message = str(info.value)
    assert message.isprintable()
    assert len(message) < 700
    for advice in ("weights_only=True", "PyTorch 2.6", "allowlist", "pytorch.org", "KeyError", "\\x1b"):
        assert advice not in message
    return message


def archive(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, inside in files.items():
            file.writestr(name.replace("__", "/").replace("_dot_", "."), inside)
    return content.getvalue()


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        file.addfile(tarfile.TarInfo("model_weights.ckpt"), io.BytesIO())
    return content.getvalue()


FOREIGN: dict[str, tuple[str, bytes, str]] = {
    "LFS safetensors": ("model.safetensors", POINTER, "found a Git LFS pointer in place of the weights"),
    "LFS bin": ("pytorch_model.bin", POINTER, "git lfs pull"),
    "LFS ckpt": ("last.ckpt", POINTER, "git lfs pull"),
    "ONNX": ("model.onnx", b"\x08\x08\x12\x07pytorch" + bytes(64), "found an ONNX model"),
    "ONNX without its suffix": ("model.bin", b"\x08\x07\x12\x07pytorch" + bytes(64), "found an ONNX model"),
    "GGUF without anything": ("model.gguf", b"GGUF\x03\0\0\0" + bytes(64), "has no general.architecture"),
    "GGUF of big computers": ("model.gguf", b"GGUF\0\0\0\x03" + bytes(64), "its version is 50331648, expected 2 or 3"),
    "GGML": ("model.bin", b"tjgg" + bytes(64), "found a GGML file from before GGUF"),
    "Keras": ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "found an HDF5 file, as Keras and TensorFlow write it"),
    "Keras 3": ("model.keras", archive(config_dot_json=b"{}", model_dot_weights_dot_h5=b"x"), "found a Keras archive"),
    "Flax": ("flax_model.msgpack", b"\x81\xa6params", "found a msgpack file, as Flax writes it"),
    "TFLite": ("model.bin", bytes(4) + b"TFL3" + bytes(64), "found a TFLite model"),
    "TensorFlow": ("saved_model.pb", b"\x08\x01\x12" + bytes(64), "found a TensorFlow graph"),
    "npy": ("weights.npy", b"\x93NUMPY\x01\0" + bytes(64), "found a single array of numpy"),
    "tar": ("model.nemo", tar(), "found a tar archive, as .nemo files are"),
    "gzip": ("model.pt", b"\x1f\x8b\x08" + bytes(64), "found a file that was compressed by gzip"),
    "zip": ("model.pt", archive(readme_dot_txt=b"x"), "found a zip archive that torch.save has not written"),
    "web page": ("model.safetensors", b"<!DOCTYPE html><html>" + bytes(64), "found a web page"),
    "error of a server": ("model.safetensors", b'{"error":"Repository not found"}', "found JSON text without weights"),
    "config": ("config.json", b'{"model_type": "gpt2"}', "name the file of weights, or their folder"),
    "YAML": ("hparams.yaml", b"lr: 0.1\n", "found a YAML file"),
    "code": ("train.py", b"import torch\n", "found a Python file"),
    "text": ("notes.ckpt", b"101 dogs", "it begins with b'101 dogs', as no known format does"),
    "empty": ("model.ckpt", b"", "the file is empty, expected a checkpoint"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_format_that_is_not_read_is_named(kind: str, tmp_path: Path):
    name, content, message = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    said = refused(tmp_path / name)
    assert message in said
    assert name in said


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")  # torch 2.15
def test_what_torch_and_numpy_write_besides_state_dicts_is_named(tmp_path: Path):
    module, batch = nn.Linear(3, 3), torch.randn(1, 3)
    torch.jit.save(torch.jit.trace(module, batch), tmp_path / "script.pt")
    assert "found a TorchScript archive" in refused(tmp_path / "script.pt")
    assert "torch.jit.load(path).state_dict()" in refused(tmp_path / "script.pt")
    torch.export.save(torch.export.export(module, (batch,)), tmp_path / "program.pt2")
    assert "found a program of torch.export" in refused(tmp_path / "program.pt2")
    np.savez(tmp_path / "weights.npz", a=np.ones((2, 2)))
    assert "found an archive of numpy arrays (.npz), as numpy and MLX write it" in refused(tmp_path / "weights.npz")
    assert "safetensors.numpy.save_file(dict(numpy.load(path)), ...)" in refused(tmp_path / "weights.npz")


class Model(nn.Module):
    """Somebody's model, saved whole."""


NAMED: dict[str, tuple[Any, str]] = {
    "arguments": ({"model": {}, "args": Namespace(lr=1e-3)}, "argparse.Namespace"),
    "a whole module": (Model(), f"{Model.__module__}.Model"),
    "a path": ({"state_dict": {}, "dir": Path("a")}, "pathlib"),
    "a number of numpy": ({"model": {}, "loss": np.float64(1.0)}, "numpy._core.multiarray.scalar"),
    "a defaultdict": ({"model": defaultdict(list)}, "collections.defaultdict"),
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", NAMED)
def test_a_class_in_a_pickle_is_named_and_not_imported(kind: str, new: bool, tmp_path: Path):
    content, name = NAMED[kind]
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    said = refused(tmp_path / "a.pt")
    assert "a.pt: not readable as a file of torch.save that holds tensors and plain values only: it names" in said
    assert f"it names {name}" in said
    assert "save the state dict alone: torch.save(model.state_dict(), 'weights.pt')" in said


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_anything_else_is_no_checkpoint(protocol: int, tmp_path: Path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": [1, 2]}, protocol))
    assert "not readable as a file of torch.save" in refused(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta-llama/Llama-2-7b-hf", "hf download meta-llama/Llama-2-7b-hf --local-dir FOLDER"),
        ("Qwen/Qwen2.5-0.5B", "If that is the name of a model on a hub: nothing is downloaded"),
        ("gpt2", "hf download gpt2 --local-dir FOLDER"),
        ("https://huggingface.co/gpt2/resolve/main/model.safetensors", "https://huggingface.co/gpt2/resolve/main/"),
        ("hf://gpt2/model.safetensors", "found a URL, and nothing is downloaded"),
        ("s3://bucket/last.ckpt", "found a URL, and nothing is downloaded"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_a_name_that_is_no_path_is_told_apart(name: str, message: str):
    assert message in refused(name)


@pytest.mark.parametrize("name", ["runs/last.ckpt", "model.safetensors", "/absent/folder"])
def test_a_path_to_nothing_is_no_name_of_a_hub(name: str):
    assert refused(name) == f"{name}: no such file, expected a checkpoint file or a model folder"


def test_an_architecture_of_ones_own_is_told_the_way(state: Any, tmp_path: Path):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "my_llama", "auto_map": {"AutoModel": "x.Y"}}))
    said = refused(tmp_path)
    assert "model_type is 'my_llama'" in said
    assert "pass the blocks of the model, audit(path, find_blocks(model))" in said
    assert len(audit(tmp_path, find_blocks(example("gpt2").build())).layers) == 3


KINDS = ("bert", "clip", "detr", "gemma3", "llava", "mask2former", "qwen2_vl", "rt_detr", "t5", "whisper", "zamba2")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_config_is_lost_on_the_way(kind: str):
    """Read, written out and read again: labels have numbers as keys, nested configs have nested ones, and so on."""
    made = transformers.CONFIG_MAPPING[kind](num_labels=3)
    once = type(made).from_dict(_cleaned(json.loads(made.to_json_string(use_diff=False))))
    twice = type(made).from_dict(_cleaned(once.to_dict()))
    assert twice.to_dict() == once.to_dict()
    assert (once.num_labels, once.id2label) == (3, made.id2label)
    assert narrower(once.to_dict(), 2, 8)["id2label"] == made.id2label
    assert not {"torch_dtype", "dtype", "auto_map", "transformers_weights"} & set(
        _cleaned({"torch_dtype": "float16", "auto_map": {}, "transformers_weights": "x"})
    )


def test_a_model_that_needs_its_labels_is_built(tmp_path: Path):
    """Queries of a detector are initialized by the number of its labels; sub-configs and labels have words as names."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")} | {"d_model": 64, "encoder_hidden_dim": 64}
    config = transformers.RTDetrConfig(
        **sizes,
        decoder_layers=2,
        encoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        backbone_config=backbone,
        encoder_in_channels=[32, 32, 64],
        decoder_in_channels=[64, 64, 64],
        id2label={0: "_dog", 1: "dtype", 2: "num_heads"},
        num_queries=10,
        num_denoising=0,
    )
    torch.manual_seed(0)
    model = transformers.RTDetrForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    found = audit(tmp_path)
    blocks = find_blocks(model, batch={"pixel_values": torch.randn(2, 3, 64, 64)})
    pairs = [(layer.mlp_norm, other.mlp_norm) for layer, other in zip(found, measure(model, blocks), strict=True)]
    wrong = [one for one, two in pairs if one != pytest.approx(two)]
    # A guessed picture may be too small to tell tokens apart; then the numbers are in doubt, and that is said.
    assert bool(wrong) <= any("the self-check failed on" in note for note in found.notes)

"""GGUF files, as llama.cpp writes them, are measured as the model that they were converted from."""

from __future__ import annotations

import math
import random
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lightning_spectral import ExactSVD, Measurement, audit, find_blocks, measure
from lightning_spectral.errors import CheckpointError

DENSE = {
    r"input_layernorm": "attn_norm",
    r"post_attention_layernorm": "ffn_norm",
    r"self_attn\.([qkv])_proj": r"attn_\1",
    r"self_attn\.([qk])_norm": r"attn_\1_norm",
    r"self_attn\.o_proj": "attn_output",
    r"mlp\.(gate|up|down)_proj": r"ffn_\1",
}
SANDWICH = DENSE | {
    r"post_attention_layernorm": "post_attention_norm",
    r"pre_feedforward_layernorm": "ffn_norm",
    r"post_feedforward_layernorm": "post_ffw_norm",
}
QWEN_MOE = DENSE | {r"mlp\.gate": "ffn_gate_inp", r"mlp\.experts\.\d+\.(gate|up|down)_proj": r"ffn_\1_exps"}
MIXTRAL = DENSE | {
    r"block_sparse_moe\.gate": "ffn_gate_inp",
    r"block_sparse_moe\.experts\.\d+\.w1": "ffn_gate_exps",
    r"block_sparse_moe\.experts\.\d+\.w3": "ffn_up_exps",
    r"block_sparse_moe\.experts\.\d+\.w2": "ffn_down_exps",
}
PHI = DENSE | {r"self_attn\.qkv_proj": "attn_qkv", r"mlp\.gate_up_proj": "ffn_up"}
AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 48}
# Class, settings, architecture in the file, names of weights in a layer, what is added to gains.
FAMILIES = {
    "llama": ("Llama", {}, "llama", DENSE, 0),
    "mixtral": ("Mixtral", EXPERTS, "llama", MIXTRAL, 0),
    "qwen2": ("Qwen2", {}, "qwen2", DENSE, 0),
    "qwen3": ("Qwen3", {"head_dim": 16}, "qwen3", DENSE, 0),
    "qwen3moe": ("Qwen3Moe", EXPERTS | {"head_dim": 8}, "qwen3moe", QWEN_MOE, 0),
    "gemma": ("Gemma", {"head_dim": 16}, "gemma", DENSE, 1),
    "gemma2": ("Gemma2", {"head_dim": 16}, "gemma2", SANDWICH, 1),
    "gemma3": ("Gemma3", {"head_dim": 16}, "gemma3", SANDWICH, 1),
    "phi3": ("Phi3", {"pad_token_id": None}, "phi3", PHI, 0),
}


def built(name: str) -> Any:
    """A tiny model of a family, whose norms have gains."""
    family, settings, *_ = FAMILIES[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**sizes, **heads, **settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def permuted(weight: Tensor, heads: int) -> Tensor:
    """The rows of queries and keys as llama.cpp has them, for rotations of neighbouring channels."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def converted(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a converted model."""
    model = built(name)
    model.save_pretrained(folder)
    _, _, architecture, names, offset = FAMILIES[name]
    tensors: dict[str, list[Tensor]] = {}
    for key, value in load_file(folder / "model.safetensors").items():
        inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if inner is None:
            owner, _, kind = key.rpartition(".")
            new = f"{AROUND[owner]}.{kind}"
        else:
            (leaf,) = [re.sub(old, new, inner[2]) for old, new in names.items() if re.fullmatch(old, inner[2])]
            new = f"blk.{inner[1]}.{leaf}.{inner[3]}"
        if architecture == "llama" and re.search(r"attn_[qk]\.", new):
            value = permuted(value, 4 if "attn_q" in new else 2)
        tensors.setdefault(new, []).append(value + offset if new.endswith("norm.weight") else value)
    config, start = model.config, f"{architecture}."
    facts = {
        "general.architecture": architecture,
        f"{start}embedding_length": 32,
        f"{start}block_count": 2,
        f"{start}feed_forward_length": 64,
        f"{start}attention.head_count": 4,
        f"{start}attention.head_count_kv": 2,
        f"{start}attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.tokens": [f"token {number}" for number in range(96)],
        "tokenizer.ggml.scores": [0.5] * 96,
        "tokenizer.ggml.add_bos_token": True,
    }
    if "head_dim" in FAMILIES[name][1]:
        facts[f"{start}attention.key_length"] = config.head_dim
    if "num_experts" in FAMILIES[name][1]:
        facts |= {f"{start}expert_count": 4, f"{start}expert_used_count": 2, f"{start}expert_feed_forward_length": 48}
    return facts, {key: value[0] if len(value) == 1 else torch.stack(value) for key, value in tensors.items()}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def fact(value: Any) -> tuple[int, bytes]:
    """The type of a value, and the value, as the format writes them."""
    if isinstance(value, list):
        kinds = [fact(item) for item in value]
        return 9, struct.pack("<IQ", kinds[0][0], len(value)) + b"".join(content for _, content in kinds)
    if isinstance(value, str):
        return 8, text(value)
    code, number = {bool: ("?", 7), int: ("I", 4), float: ("f", 6)}[type(value)]
    return number, struct.pack(f"<{code}", value)


def write(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str = "F32") -> Path:
    """Write a GGUF file: matrices in some type, the rest in 32 bits."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    for name, value in facts.items():
        number, content = fact(value)
        header += text(name) + struct.pack("<I", number) + content
    data = b""
    for name, tensor in tensors.items():
        number, content = stored(tensor, kind if tensor.ndim > 1 else "F32")
        sizes = struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape))
        header += text(name) + struct.pack("<I", tensor.ndim) + sizes + struct.pack("<IQ", number, len(data))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def stored(tensor: Tensor, kind: str) -> tuple[int, bytes]:
    if kind in ("F32", "F16", "BF16"):
        number, dtype = {"F32": (0, torch.float32), "F16": (1, torch.float16), "BF16": (30, torch.bfloat16)}[kind]
        return number, tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    quantization = GGMLQuantizationType[kind]
    return int(quantization), quantize(tensor.float().numpy(), quantization).tobytes()


def same(found: Measurement, true: Measurement, tolerance: float) -> None:
    assert len(found.layers) == len(true.layers) == 2
    for layer, other in zip(found, true, strict=True):
        assert (layer.index, layer.name, layer.reason, layer.mlp_expert) == (
            other.index,
            other.name,
            other.reason,
            other.mlp_expert,
        )
        for name in ("mlp_norm", "attention_norm"):
            assert math.isclose(getattr(layer, name), getattr(other, name), rel_tol=tolerance), (layer.name, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_is_measured_as_the_model(name: str, tmp_path: Path):
    facts, tensors = converted(name, tmp_path)
    found = audit(write(tmp_path / "model.gguf", facts, tensors), solver=ExactSVD())
    same(found, measure(built(name), solver=ExactSVD()), 1e-5)
    assert found.notes == ()  # nothing was rounded


def test_its_blocks_and_its_config_fit_as_well(tmp_path: Path):
    """Names are those of the model that was converted, and so are its blocks; half precision is read as it is."""
    facts, tensors = converted("llama", tmp_path)
    path, model = write(tmp_path / "half.gguf", facts, tensors, "BF16"), built("llama")
    same(audit(path, find_blocks(model), solver=ExactSVD()), measure(model.bfloat16(), solver=ExactSVD()), 1e-3)
    assert audit(path, config=tmp_path, solver=ExactSVD()) == audit(path, solver=ExactSVD())


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0"])
def test_quantized_weights_are_dequantized_and_that_is_told(kind: str, tmp_path: Path):
    number = pytest.importorskip("gguf").GGMLQuantizationType[kind]
    from gguf.quants import dequantize, quantize

    name = "mixtral"  # whose experts are dequantized one by one
    facts, tensors = converted(name, tmp_path)
    found = audit(write(tmp_path / "model.gguf", facts, tensors, kind), solver=ExactSVD())
    rounded = {
        key: torch.from_numpy(dequantize(quantize(value.numpy(), number), number)) if value.ndim > 1 else value
        for key, value in tensors.items()
    }
    same(found, audit(write(tmp_path / "rounded.gguf", facts, rounded), solver=ExactSVD()), 1e-6)
    same(found, measure(built(name), solver=ExactSVD()), 0.1)
    count = sum(value.ndim > 1 for value in tensors.values())
    assert found.notes == (f"the weights were dequantized from {kind} ({count} tensors)",)
    assert str(found).endswith(f"note: the weights were dequantized from {kind} ({count} tensors)")


def test_names_are_those_of_the_format():
    """What the package of llama.cpp itself calls every weight."""
    gguf = pytest.importorskip("gguf")
    for name, (_, _, architecture, names, _) in FAMILIES.items():
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
        for old, new in names.items():
            for part in ("q", "k", "v") if "[qkv]" in old else ("q", "k") if "[qk]" in old else ("gate", "up", "down"):
                path = re.sub(r"\(.*?\)", part, old.replace(r"\.\d+", "")).replace("\\", "")
                leaf = new.replace(r"\1", part)
                assert known.get_name(f"model.layers.1.{path}") in (f"blk.1.{leaf}", None), (name, path)


def test_without_the_package_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is not quantized needs none."""
    facts, tensors = converted("llama", tmp_path)
    for module in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(sys.modules, module, None)
    content = bytearray(write(tmp_path / "a.gguf", facts, tensors).read_bytes())
    assert len(audit(tmp_path / "a.gguf").layers) == 2
    place = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    content[place : place + 4] = struct.pack("<I", 12)
    (tmp_path / "q.gguf").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"q\.gguf: it is a quantized GGUF file, and reading it needs the package "
    ):
        audit(tmp_path / "q.gguf")


def test_what_is_not_known_is_refused(tmp_path: Path):
    facts, tensors = converted("llama", tmp_path)

    def says(changes: Mapping[str, Any], others: Mapping[str, Tensor] = tensors) -> str:
        kept = {key: value for key, value in (facts | changes).items() if value is not None}
        with pytest.raises(CheckpointError, match=r"\.gguf: ") as info:
            audit(write(tmp_path / "x.gguf", kept, others))
        return str(info.value)

    assert "of the architecture 'mamba', expected one of llama, qwen2" in says({"general.architecture": "mamba"})
    assert "its metadata has no general.architecture" in says({"general.architecture": None})
    assert "feed_forward_length is [64, 32], expected one number for all layers" in says(
        {"llama.feed_forward_length": [64, 32]}
    )
    assert "weights are missing" in says({"llama.block_count": 3})
    assert "(32, 64), expected (32, 80)" in says({"llama.feed_forward_length": 80})
    assert "weights are missing" in says({}, {key: value for key, value in tensors.items() if "attn_v" not in key})
    several = write(tmp_path / "model-00001-of-00002.gguf", facts, tensors)
    with pytest.raises(
        CheckpointError, match="it is number 1 of 2 files that hold the model together: merge them first"
    ):
        audit(several)


def test_damaged_files_are_measured_or_refused(tmp_path: Path):
    """Three hundred: bits, cuts, and numbers that no file has; none takes memory or time."""
    facts, tensors = converted("llama", tmp_path)
    content = write(tmp_path / "whole.gguf", facts | {"tokenizer.ggml.tokens": ["a"]}, tensors).read_bytes()
    blocks, source, outcomes = find_blocks(built("llama")), random.Random(0), {True: 0, False: 0}
    for _ in range(300):
        data, place = bytearray(content), source.randrange(1200 if source.random() < 0.8 else len(content))
        how = source.randrange(4)
        if how == 0:
            data[place] ^= 1 << source.randrange(8)
        elif how == 1:
            del data[place:]
        elif how == 2:
            data[place : place + 8] = source.choice([b"\xff" * 8, bytes(8), struct.pack("<Q", 2**40)])
        else:
            data[place:place] = source.randbytes(source.randrange(1, 20))
        (tmp_path / "x.gguf").write_bytes(data)
        try:
            audit(tmp_path / "x.gguf", blocks)
        except CheckpointError as error:
            message = str(error)
        else:
            outcomes[True] += 1
            continue
        outcomes[False] += 1
        assert message.isprintable()
        assert len(message) < 1200
    assert min(outcomes.values()) > 10

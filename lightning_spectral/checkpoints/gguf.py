"""Open a GGUF file of llama.cpp: its weights under the names of transformers, dequantized one at a time.

llama.cpp reorders only the rows of queries and keys. No branch contains queries or keys, so the order does not matter.
"""

from __future__ import annotations

import math
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.checkpoints.gguf_header import Stored, read_header
from lightning_spectral.checkpoints.untrusted import Opened, damage, printable
from lightning_spectral.errors import CheckpointError

__all__ = ["open_gguf"]

_EXPECTED = "a GGUF file"
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QWEN_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")}
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
_AROUND = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, slots=True)
class _Family:
    """An architecture: its class in transformers, its names in a layer, and the offset that llama.cpp adds to gains."""

    model_type: str
    architecture: str
    names: Mapping[str, str]
    offset: float = 0.0


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", _LAYER),
    "llama with experts": _Family("mixtral", "MixtralForCausalLM", _LAYER | _MIXTRAL_EXPERTS),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM", _LAYER),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", _LAYER),
    "qwen3moe": _Family("qwen3_moe", "Qwen3MoeForCausalLM", _LAYER | _QWEN_EXPERTS | {"ffn_gate_inp": "mlp.gate"}),
    "gemma": _Family("gemma", "GemmaForCausalLM", _LAYER, 1.0),
    "gemma2": _Family("gemma2", "Gemma2ForCausalLM", _SANDWICH, 1.0),
    "gemma3": _Family("gemma3_text", "Gemma3ForCausalLM", _SANDWICH, 1.0),
    "phi3": _Family(
        "phi3", "Phi3ForCausalLM", _LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    ),
}
_ENTRIES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_local_experts": "expert_count",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}


def open_gguf(path: Path) -> Opened:
    """Open a GGUF file: its tensors by the names that they have in transformers.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is damaged, or its architecture or quantization is unknown.
    """
    with damage(path, _EXPECTED):
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        facts, stored = read_header(content)
        if "general.architecture" not in facts:
            raise ValueError("its metadata has no general.architecture")
        architecture = str(facts["general.architecture"])
        family = _family(path, architecture, facts)
        kinds = Counter(_kind(path, item.kind) for item in stored if item.kind not in _PLAIN)
        readers = dict(_readers(content, stored, family))
        shapes = {name: shape for name, (shape, _) in readers.items()}
        config = _config(facts, architecture, family, shapes)

    def read(name: str) -> Tensor:
        with damage(path, _EXPECTED):
            return readers[name][1]()

    listed = ", ".join(f"{kind} ({count} tensors)" for kind, count in kinds.most_common())
    notes = (f"the weights were dequantized from {listed}",) if kinds else ()
    return Opened(shapes, read, copied=True, config=config, notes=notes)


def _family(path: Path, architecture: str, facts: Mapping[str, Any]) -> _Family:
    experts = architecture == "llama" and facts.get("llama.expert_count")
    family = _FAMILIES.get(architecture + (" with experts" if experts else ""))
    if family is None:
        raise CheckpointError(
            f"{printable(path)}: it is a GGUF file of the architecture {printable(architecture, 40)!r}, expected one "
            f"of {', '.join(name for name in _FAMILIES if ' ' not in name)}: audit the model that it was converted from"
        )
    return family


def _kind(path: Path, kind: int) -> str:
    """Return the name of a quantization."""
    try:
        from gguf.constants import GGMLQuantizationType
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{printable(path)}: it is a quantized GGUF file, and reading it needs the package gguf: pip install gguf"
        ) from None
    return str(GGMLQuantizationType(kind).name)


def _readers(
    content: mmap.mmap, stored: list[Stored], family: _Family
) -> Iterator[tuple[str, tuple[tuple[int, ...], Callable[[], Tensor]]]]:
    """Yield name in transformers, shape and reader of every weight. Stacked experts are yielded one by one."""
    for item in stored:
        name, whole = _renamed(item.name, family.names), _bytes(item)
        if item.start + whole > len(content):
            raise ValueError(f"{printable(item.name, 60)} does not lie inside of the file")
        offset = family.offset if name.endswith("norm.weight") else 0.0
        if "*" not in name:
            yield name, (item.shape, partial(_read, content, item, offset=offset))
            continue
        experts, *shape = item.shape
        size, rest = divmod(whole, experts)
        if rest or not size:
            raise ValueError(f"{printable(item.name, 60)} has no whole experts")
        for expert in range(experts):
            part = Stored(item.name, tuple(shape), item.kind, item.start + expert * size)
            yield name.replace("*", str(expert)), (part.shape, partial(_read, content, part))


def _renamed(name: str, layer: Mapping[str, str]) -> str:
    inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if inner is not None and inner[2] in layer:
        return f"model.layers.{inner[1]}.{layer[inner[2]]}.{inner[3]}"
    head, _, tail = name.rpartition(".")
    return f"{_AROUND[head]}.{tail}" if head in _AROUND else name


def _read(content: mmap.mmap, item: Stored, offset: float = 0.0) -> Tensor:
    raw = torch.frombuffer(bytearray(content[item.start : item.start + _bytes(item)]), dtype=torch.uint8)
    if item.kind in _PLAIN:
        tensor = raw.view(_PLAIN[item.kind]).view(item.shape)
    else:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = raw.view(math.prod(item.shape[:-1]), -1).numpy()
        tensor = torch.from_numpy(dequantize(rows, GGMLQuantizationType(item.kind))).view(item.shape)
    return tensor - offset if offset else tensor


def _bytes(item: Stored) -> int:
    """Return the size of a tensor in bytes."""
    numbers = math.prod(item.shape)
    if item.kind in _PLAIN:
        return numbers * _PLAIN[item.kind].itemsize
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    together, size = map(int, GGML_QUANT_SIZES[GGMLQuantizationType(item.kind)])
    if not item.shape or item.shape[-1] % together:
        raise ValueError(f"{printable(item.name, 60)} has rows that are no multiple of {together}")
    return numbers // together * size


def _config(
    facts: Mapping[str, Any], architecture: str, family: _Family, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the entries of a config that branches depend on."""
    found = {name: facts.get(f"{architecture}.{key}") for name, key in _ENTRIES.items()}
    entries = {name: value for name, value in found.items() if value is not None}
    for name, value in entries.items():
        if not isinstance(value, int):
            raise ValueError(f"{_ENTRIES[name]} is {printable(value, 60)}, expected one number for all layers")
    entries.setdefault("num_key_value_heads", entries.get("num_attention_heads"))
    return entries | {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": shapes.get("model.embed_tokens.weight", (1,))[0],
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "pad_token_id": None,
    }

"""Tiny Hugging Face models: the surveyed ones and some that the survey has never seen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers.utils import logging

from . import survey
from .example import BATCH, HEADS, HIDDEN, SOURCE_TOKENS, TOKENS, VOCABULARY, Example, Inputs, floats, seeded, tokens

BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
logging.set_verbosity_error()  # remarks on odd sizes and missing kernels
SCHEMES = {"none (ReZero)": "none", "post-ish: residual taken AFTER the norm": "after_norm"}

RESCALED = ("doge", "zaya", "rwkv")  # the residual is multiplied, shifted or normalized in some block
UNCACHED = ("xlstm", "rwkv")  # a cache that does not fit small heads; one that is written in place, gradients or not


def surveyed() -> list[Example]:
    """Every surveyed model that transformers provides."""
    return [_surveyed(entry) for entry in survey.entries().values() if entry["group"] not in ("plain", "torch")]


def _surveyed(entry: survey.Entry) -> Example:
    return Example(
        name=entry["name"],
        build=seeded(functools.partial(build, entry["class"], entry["overrides"])),
        inputs=uncached_inputs if entry["name"] in UNCACHED else INPUTS[entry["group"]],
        blocks=survey.expected_blocks(entry),
        norm_scheme=SCHEMES.get(entry["norm_scheme"], entry["norm_scheme"]),
        identity=entry["norm_scheme"] not in ("post", *SCHEMES) and entry["name"] not in RESCALED,
        survey=True,
        note=entry["note"],
    )


def build(class_name: str, overrides: dict[str, Any]) -> nn.Module:
    """Build a model class on the base configuration."""
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class
    fields = {field.name for field in dataclasses.fields(config_class)}
    renamed = {config_class.attribute_map.get(key, key): value for key, value in BASE.items()}
    settings = {key: value for key, value in renamed.items() if key in fields}
    return model_class(config_class(**(settings | overrides)))


def causal_inputs(model: nn.Module) -> Inputs:
    """Token ids by keyword."""
    return (), {"input_ids": tokens(BATCH, TOKENS)}


def uncached_inputs(model: nn.Module) -> Inputs:
    """Token ids and no cache."""
    return (), {"input_ids": tokens(BATCH, TOKENS), "use_cache": False}


def encoder_decoder_inputs(model: nn.Module) -> Inputs:
    """Token ids for both stacks, of different lengths."""
    return (), {
        "input_ids": tokens(BATCH, SOURCE_TOKENS),
        "decoder_input_ids": tokens(BATCH, TOKENS, seed=1),
    }


def vision_inputs(model: nn.Module) -> Inputs:
    """Two small pictures: the patch grid dictates the token count."""
    return (), {"pixel_values": floats(BATCH, 3, 16, 16)}


INPUTS: dict[str, Callable[[nn.Module], Inputs]] = {
    "causal": causal_inputs,
    "encoder": causal_inputs,
    "encdec": encoder_decoder_inputs,
    "vision": vision_inputs,
}

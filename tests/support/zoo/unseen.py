"""Hugging Face models that the survey has never seen; their sites were found and checked numerically."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .example import BATCH, TOKENS, Example, ExpectedBlock, Inputs, NormScheme, blocks_of, floats, pairs, seeded, tokens
from .hugging_face import build, causal_inputs, encoder_decoder_inputs, vision_inputs

MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "mlp", "attention", "moe"],
    "num_hidden_layers": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "chunk_size": 4,
    "n_groups": 1,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
}
TWO_STACKS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 13, "max_target_positions": 64}
WAV2VEC2 = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
CONVNEXT = {
    "num_stages": 2,
    "hidden_sizes": [8, 16],
    "depths": [2, 2],
    "layer_scale_init_value": 0.5,
    "image_size": 16,
    "patch_size": 2,
}


def sound_inputs(model: nn.Module) -> Inputs:
    """Raw sound, long enough for 13 frames."""
    return (), {"input_values": floats(BATCH, 140)}


def spectrogram_inputs(model: nn.Module) -> Inputs:
    """Mel features of 26 frames, two of which make one token, and decoder token ids."""
    return (), {"input_features": floats(BATCH, 8, 26), "decoder_input_ids": tokens(BATCH, TOKENS, seed=1)}


def _decoder(
    container: str, attention: tuple[str, ...], mlp: tuple[str, ...], **flags: Any
) -> tuple[ExpectedBlock, ...]:
    return blocks_of(container, range(3), attention, mlp, **flags)


def _two_stacks() -> tuple[ExpectedBlock, ...]:
    attention, cross = ("self_attn", "self_attn.out_proj"), ("encoder_attn", "encoder_attn.out_proj")
    return blocks_of("encoder.layers", range(2), attention, "fc2") + blocks_of(
        "decoder.layers", range(2), attention, "fc2", (cross,), other_kinds=("cross_attention",)
    )


def _granite_hybrid() -> tuple[ExpectedBlock, ...]:
    flags: dict[str, Any] = {
        "mlp": ("block_sparse_moe", "block_sparse_moe.experts"),
        "other": (("shared_mlp", "shared_mlp.output_linear"),),
        "other_kinds": ("mlp",),
    }
    first, last = blocks_of("model.layers", (0, 2), ("mamba", "mamba.out_proj"), kinds=("mixer",), **flags)
    return first, *blocks_of("model.layers", (1,), ("self_attn", "self_attn.o_proj"), **flags), last


def _nemotron_h() -> tuple[ExpectedBlock, ...]:
    layers = (
        *blocks_of("model.layers", (0,), ("mixer", "mixer.out_proj"), None, kinds=("mixer",)),
        *blocks_of("model.layers", (1,), None, ("mixer", "mixer.down_proj")),
        *blocks_of("model.layers", (2,), ("mixer", "mixer.o_proj"), None),
        *blocks_of("model.layers", (3,), None, "mixer"),
    )
    return pairs(layers)


def _stages(
    container: str, blocks: str, attention: tuple[str, ...], mlp: tuple[str, ...] | None, **flags: Any
) -> tuple[ExpectedBlock, ...]:
    return tuple(
        block
        for stage in range(2)
        for block in blocks_of(f"{container}.{stage}.{blocks}", range(2), attention, mlp, **flags)
    )


def _member(
    name: str,
    class_name: str,
    blocks: tuple[ExpectedBlock, ...],
    overrides: dict[str, Any] | None = None,
    inputs: Callable[[nn.Module], Inputs] = causal_inputs,
    norm_scheme: NormScheme = "pre",
    note: str = "",
) -> Example:
    return Example(
        name=name,
        build=seeded(functools.partial(build, class_name, overrides or {})),
        inputs=inputs,
        blocks=blocks,
        norm_scheme=norm_scheme,
        identity=norm_scheme != "post",
        note=note,
    )


def decoders() -> list[Example]:
    """Language models."""
    llama = ("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")
    return [
        _member(
            "bloom",
            "BloomForCausalLM",
            _decoder("transformer.h", ("self_attention.dense",), ("mlp.dense_4h_to_h",)),
            note="attention module and MLP module both add the residual themselves",
        ),
        _member(
            "codegen",
            "CodeGenForCausalLM",
            _decoder(
                "transformer.h", ("attn", "attn.out_proj", "attn.resid_dropout"), ("mlp", "mlp.fc_out", "mlp.dropout")
            ),
            {"rotary_dim": 4},
            norm_scheme="par",
            note="fused q|v|k of four model-parallel shards, interleaved per shard",
        ),
        _member(
            "phi3",
            "Phi3ForCausalLM",
            _decoder(
                "model.layers",
                ("self_attn", "self_attn.o_proj", "resid_attn_dropout"),
                ("mlp", "mlp.down_proj", "resid_mlp_dropout"),
            ),
        ),
        _member(
            "falcon_new",
            "FalconForCausalLM",
            _decoder("transformer.h", ("self_attention", "self_attention.dense"), ("mlp", "mlp.dense_4h_to_h")),
            {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
            norm_scheme="par",
            note="rows per key/value head: its queries, its key, its value; two norms; adds in place",
        ),
        _member("xglm", "XGLMForCausalLM", _decoder("model.layers", ("self_attn", "self_attn.out_proj"), ("fc2",))),
        _member(
            "exaone4",
            "Exaone4ForCausalLM",
            _decoder("model.layers", ("post_attention_layernorm",), ("post_feedforward_layernorm",)),
            {"sliding_window": 4},
            norm_scheme="branchpost",
        ),
        _member("seed_oss", "SeedOssForCausalLM", _decoder("model.layers", *llama), {"head_dim": 16}),
        _member(
            "glm4",
            "Glm4ForCausalLM",
            _decoder("model.layers", ("post_self_attn_layernorm",), ("post_mlp_layernorm",)),
            {"head_dim": 8},
            norm_scheme="sandwich",
            note="post_attention_layernorm is the MLP's pre-norm",
        ),
        _member(
            "granitemoehybrid",
            "GraniteMoeHybridForCausalLM",
            _granite_hybrid(),
            MAMBA
            | {
                "layers_block_type": ["mamba", "attention", "mamba"],
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "shared_intermediate_size": 24,
                "residual_multiplier": 0.22,
            },
            note="routed experts and shared MLP are two modules, summed, then times 0.22",
        ),
        _member(
            "nemotron_h",
            "NemotronHForCausalLM",
            _nemotron_h(),
            NEMOTRON_H,
            note="every block has one branch, always called mixer, of four kinds",
        ),
        _member(
            "falcon_mamba",
            "FalconMambaForCausalLM",
            blocks_of("backbone.layers", range(3), ("mixer", "mixer.out_proj"), None, kinds=("mixer",)),
            {"state_size": 4, "time_step_rank": 4},
        ),
        _member(
            "phimoe",
            "PhimoeForCausalLM",
            _decoder("model.layers", ("self_attn", "self_attn.o_proj"), ("mlp", "mlp.experts")),
            {"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
    ]


def encoders() -> list[Example]:
    """Text, sound and picture encoders, and encoder-decoders."""
    bert = ("attention.output.dense", "attention.output.dropout"), ("output.dense", "output.dropout")
    return [
        _member(
            "xlm_roberta_xl",
            "XLMRobertaXLModel",
            _decoder("encoder.layer", bert[0], ("output.dense",)),
            note="the modules of BERT, but pre-norm",
        ),
        _member(
            "esm",
            "EsmModel",
            _decoder("encoder.layer", *bert),
            {"mask_token_id": 3, "position_embedding_type": "rotary"},
            note="the modules of BERT, but pre-norm",
        ),
        _member(
            "deberta_v2",
            "DebertaV2Model",
            _decoder("encoder.layer", *bert),
            {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
            norm_scheme="post",
            note="disentangled attention: positions pass the key and query projections too",
        ),
        _member(
            "xlnet",
            "XLNetModel",
            _decoder("layer", ("param:rel_attn.o",), ("ff.layer_2",)),
            {"d_inner": 48},
            norm_scheme="post",
            note="layout (tokens, batch, width); attention from raw parameters, its only module a shared dropout",
        ),
        _member("mbart", "MBartModel", _two_stacks(), TWO_STACKS, encoder_decoder_inputs),
        _member("marian", "MarianModel", _two_stacks(), TWO_STACKS, encoder_decoder_inputs, norm_scheme="post"),
        _member("whisper", "WhisperModel", _two_stacks(), TWO_STACKS | WHISPER, spectrogram_inputs),
        _member(
            "wav2vec2",
            "Wav2Vec2Model",
            (
                ExpectedBlock("encoder.pos_conv_embed", ("encoder.pos_conv_embed",), kinds=("mixer",)),
                *_decoder(
                    "encoder.layers",
                    ("attention", "attention.out_proj", "dropout"),
                    ("feed_forward", "feed_forward.output_dense", "feed_forward.output_dropout"),
                ),
            ),
            WAV2VEC2,
            sound_inputs,
            norm_scheme="post",
            note="the first block is a convolution of the positions, added to the stream",
        ),
        _member(
            "siglip_vision",
            "SiglipVisionModel",
            (
                *_decoder("encoder.layers", ("self_attn", "self_attn.out_proj"), ("mlp", "mlp.fc2")),
                ExpectedBlock("head", None, ("head.mlp", "head.mlp.fc2"), whole=False),
            ),
            {"image_size": 16, "patch_size": 8},
            vision_inputs,
            note="the head pools by attention, and adds an MLP to what it pooled",
        ),
        _member(
            "swin",
            "SwinModel",
            _stages("encoder.layers", "blocks", ("drop_path", "attention", "attention.o_proj"), ("mlp", "mlp.fc2")),
            SWIN,
            vision_inputs,
            note="windows, shifted in every other block; stages of widths 16 and 32",
        ),
        _member(
            "convnext",
            "ConvNextModel",
            _stages("encoder.stages", "layers", ("drop_path", "pwconv2"), None, kinds=("mixer",)),
            CONVNEXT,
            vision_inputs,
            note="one branch: a convolution and an MLP in one",
        ),
    ]


def members() -> list[Example]:
    """Every model of this module."""
    return decoders() + encoders()

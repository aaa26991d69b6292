"""Which members of the zoo have branches without a weight linearization, and why; which blocks have a ratio.

The tests of discovery hold this table, and the documentation's page of architectures is made from it.
"""

from __future__ import annotations

from .example import Example, ExpectedBlock

MIXER = "a token mixer that is not attention has no weight linearization"
CROSS = "cross-attention reads another sequence and is not part of the ratio"
MULTIPLIER = "a multiplier on the path cannot be read"

# Every model of the zoo that has a branch without a norm, and why. No other model may have a reason.
REASONS = {
    "state space": (MIXER, ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "nemotron_h", "granitemoehybrid")),
    "recurrence": (MIXER, ("rwkv", "recurrent_gemma", "xlstm", "qwen3_next", "qwen3_5_text", "minimax", "hybrid")),
    "convolution": (MIXER, ("lfm2", "convnext", "conformer", "wav2vec2")),
    "no weights, or weights over tokens": (MIXER, ("fnet", "mlp_mixer")),
    "encoder-decoder": (
        CROSS,
        (
            *("t5", "bart", "mbart", "marian", "whisper", "bare_decoder", "torch_decoder_pre", "torch_decoder_post"),
            *("torch_transformer_pre", "torch_transformer_post", "detr", "whisper_openai", "retro_chunked"),
        ),
    ),
    "difference of two attentions": (MULTIPLIER, ("diffllama",)),
}


def expected_reasons(name: str) -> list[str]:
    """What the reasons of a member's branches begin with."""
    return [reason for reason, names in REASONS.values() if name in names]


def has_ratio(member: Example, block: ExpectedBlock) -> bool:
    """Tell whether a block has attention and an MLP, and both have a weight linearization."""
    if block.attention is None or block.mlp is None or "mixer" in block.kinds:
        return False
    return not set(expected_reasons(member.name)) - {MIXER, CROSS}

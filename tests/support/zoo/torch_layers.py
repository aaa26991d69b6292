"""Stacks of ``torch.nn``'s own Transformer layers."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from . import survey
from .example import (
    BATCH,
    HEADS,
    HIDDEN,
    SOURCE_TOKENS,
    TOKENS,
    VOCABULARY,
    Example,
    ExpectedBlock,
    Inputs,
    blocks_of,
    float_inputs,
    floats,
    seeded,
    token_inputs,
    tokens,
)

LAYER: dict[str, Any] = {"d_model": HIDDEN, "nhead": HEADS, "dim_feedforward": 48}
SELF = ("dropout1", "self_attn[0]")
CROSS = ("dropout2", "multihead_attn[0]")
MLP = ("dropout2", "linear2")
DECODER_MLP = ("dropout3", "linear2")


class TorchEncoder(nn.Module):
    """Embedding, ``nn.TransformerEncoder``, head."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, HIDDEN)
        layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True, norm_first=norm_first)
        self.enc = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids to logits."""
        return self.head(self.enc(self.emb(idx)))


class TorchDecoder(nn.Module):
    """Embedding, ``nn.TransformerDecoder`` on a given memory, head."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, HIDDEN)
        layer = nn.TransformerDecoderLayer(**LAYER, batch_first=True, norm_first=norm_first)
        self.dec = nn.TransformerDecoder(layer, 3)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, idx: Tensor, memory: Tensor) -> Tensor:
        """Token ids and memory to logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        return self.head(self.dec(self.emb(idx), memory, tgt_mask=mask, tgt_is_causal=True))


class DecoderOnly(nn.Module):
    """A causal language model on encoder layers, each of them kept by the user, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(**LAYER, batch_first=True, norm_first=True, activation="gelu", bias=False)
            for _ in range(3)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids to logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        x = self.emb(idx)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


def decoder_inputs(model: nn.Module) -> Inputs:
    """Token ids and a memory of another length."""
    return (tokens(BATCH, TOKENS), floats(BATCH, SOURCE_TOKENS, HIDDEN)), {}


def memory_inputs(model: nn.Module) -> Inputs:
    """Token vectors and a memory of another length."""
    return (floats(BATCH, TOKENS, HIDDEN), floats(BATCH, SOURCE_TOKENS, HIDDEN, seed=1)), {}


def sequence_inputs(model: nn.Module) -> Inputs:
    """Source and target vectors ``(tokens, batch, width)``."""
    return (floats(SOURCE_TOKENS, BATCH, HIDDEN), floats(TOKENS, BATCH, HIDDEN, seed=1)), {}


def tokens_first_inputs(model: nn.Module) -> Inputs:
    """Token vectors ``(tokens, batch, width)``."""
    return (floats(TOKENS, BATCH, HIDDEN),), {}


def _matrices(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    """The branches of every layer: value rows are the last third of ``in_proj_weight``."""
    return {
        name: {
            "attention": [(layer.self_attn.out_proj.weight @ layer.self_attn.in_proj_weight[2 * HIDDEN :]).detach()],
            "mlp": [(layer.linear2.weight @ layer.linear1.weight).detach()],
        }
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    }


def _encoder(norm_first: bool, batch_first: bool, **kwargs: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**LAYER, norm_first=norm_first, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, **kwargs)


def _transformer(norm_first: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")  # not to be set from outside
        return nn.Transformer(**LAYER, num_encoder_layers=2, num_decoder_layers=2, norm_first=norm_first)


def _decoder_blocks(container: str, count: int) -> tuple[ExpectedBlock, ...]:
    return blocks_of(container, range(count), SELF, DECODER_MLP, (CROSS,), other_kinds=("cross_attention",))


def _surveyed(name: str, model_class: type[nn.Module], norm_first: bool) -> Example:
    entry = survey.entries()[name]
    return Example(
        name=name,
        build=seeded(lambda: model_class(norm_first)),
        inputs=token_inputs if model_class is TorchEncoder else decoder_inputs,
        blocks=survey.expected_blocks(entry),
        norm_scheme="pre" if norm_first else "post",
        identity=norm_first,
        matrices=_matrices,
        survey=True,
        note=entry["note"],
    )


def members() -> list[Example]:
    """Every model of this module."""
    found = [
        _surveyed("torch_encoder_pre", TorchEncoder, True),
        _surveyed("torch_encoder_post", TorchEncoder, False),
        _surveyed("torch_decoder_pre", TorchDecoder, True),
        _surveyed("torch_decoder_post", TorchDecoder, False),
    ]
    for norm_first in (True, False):
        for batch_first in (True, False):
            found.append(
                Example(
                    name=f"bare_encoder_{'pre' if norm_first else 'post'}_{'batch' if batch_first else 'tokens'}_first",
                    build=seeded(lambda n=norm_first, b=batch_first: _encoder(n, b)),  # type: ignore[misc]
                    inputs=float_inputs if batch_first else tokens_first_inputs,
                    blocks=blocks_of("layers", range(2), SELF, MLP),
                    norm_scheme="pre" if norm_first else "post",
                    identity=norm_first,
                    matrices=_matrices,
                    note="the container itself is the model",
                )
            )
        found.append(
            Example(
                name=f"torch_transformer_{'pre' if norm_first else 'post'}",
                build=seeded(lambda n=norm_first: _transformer(n)),  # type: ignore[misc]
                inputs=sequence_inputs,
                blocks=blocks_of("encoder.layers", range(2), SELF, MLP) + _decoder_blocks("decoder.layers", 2),
                norm_scheme="pre" if norm_first else "post",
                identity=norm_first,
                matrices=_matrices,
                note="layout (tokens, batch, width)",
            )
        )
    found += [
        Example(
            "bare_decoder",
            seeded(
                lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**LAYER, batch_first=True, norm_first=True), 2)
            ),
            memory_inputs,
            _decoder_blocks("layers", 2),
            matrices=_matrices,
        ),
        Example(
            "encoder_layers_in_a_list",
            seeded(DecoderOnly),
            token_inputs,
            blocks_of("blocks", range(3), SELF, MLP),
            matrices=_matrices,
            note="causal mask, no biases",
        ),
        Example(
            "one_encoder_layer",
            seeded(lambda: nn.TransformerEncoderLayer(**LAYER, batch_first=True, norm_first=True)),
            float_inputs,
            (ExpectedBlock("", ("dropout1", "self_attn"), ("dropout2", "linear2")),),
            matrices=_matrices,
            note="the model itself is the block",
        ),
    ]
    return found

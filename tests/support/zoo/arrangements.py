"""Where blocks end and who adds: parents, wrappers, flat lists, extra branches, other mixers, changing widths."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .example import (
    BATCH,
    HIDDEN,
    VOCABULARY,
    Example,
    ExpectedBlock,
    Inputs,
    blocks_of,
    floats,
    pairs,
    seeded,
    token_inputs,
)
from .gpt import ATTENTION_SITES, BLOCKS, MLP, MLP_SITES, Block, CausalSelfAttention, NanoGPT, block_matrices

Build = Callable[[], nn.Module]


class Embedded(nn.Module):
    """Embedding, any body on ``(batch, tokens, width)``, head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = body
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids to logits."""
        return self.head(self.body(self.embed(idx)))


class FeedForward(nn.Module):
    """Norm, up, activation, down: the norm lives inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, HIDDEN)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token alone."""
        return self.net(x)


class NormedAttention(CausalSelfAttention):
    """Self-attention with its norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then mix."""
        return super().forward(self.norm(x))


class Pairs(nn.Module):
    """A list of pairs; the parent adds (lucidrains' style)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([NormedAttention(), FeedForward()]) for _ in range(3))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Add in the loop."""
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        return self.norm(x)


class PreNorm(nn.Module):
    """A norm in front of anything."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then call."""
        return self.fn(self.norm(x))


class PreNormPairs(Pairs):
    """The same with ``PreNorm`` wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([PreNorm(CausalSelfAttention()), PreNorm(MLP())]) for _ in range(3))


class Residual(nn.Module):
    """A norm, a branch and the add."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.fn(self.norm(x))


class AddWithDropout(nn.Module):
    """The sub-layer connection of the Annotated Transformer: the branch comes as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Add what the function makes."""
        return x + self.dropout(sublayer(self.norm(x)))


class AnnotatedLayer(nn.Module):
    """One layer of the Annotated Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = CausalSelfAttention()
        self.feed_forward = MLP()
        self.sublayer = nn.ModuleList([AddWithDropout(), AddWithDropout()])

    def forward(self, x: Tensor) -> Tensor:
        """Two sub-layers."""
        x = self.sublayer[0](x, lambda h: self.self_attn(h))
        return self.sublayer[1](x, self.feed_forward)


class Loop(nn.Module):
    """A module list, called in order."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Call them in order."""
        for layer in self.layers:
            x = layer(x)
        return x


class Numbered(nn.Module):
    """Blocks as attributes ``block_0``, ``block_1``: no container at all."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            self.add_module(f"block_{i}", Block())

    def forward(self, x: Tensor) -> Tensor:
        """Call them by name."""
        return self.block_2(self.block_1(self.block_0(x)))


class ConvolutionModule(nn.Module):
    """Pointwise, gated, depthwise, pointwise, as in the Conformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.pointwise_1 = nn.Conv1d(HIDDEN, 2 * HIDDEN, 1)
        self.depthwise = nn.Conv1d(HIDDEN, HIDDEN, 5, padding=2, groups=HIDDEN)
        self.pointwise_2 = nn.Conv1d(HIDDEN, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbours."""
        h = F.glu(self.pointwise_1(self.norm(x).transpose(1, 2)), dim=1)
        return self.pointwise_2(F.silu(self.depthwise(h))).transpose(1, 2)


class MacaronLayer(nn.Module):
    """Half an MLP, attention, half an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn1 = FeedForward()
        self.self_attn = NormedAttention()
        self.ffn2 = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        """Three branches."""
        x = x + 0.5 * self.ffn1(x)
        x = x + self.self_attn(x)
        return x + 0.5 * self.ffn2(x)


class ConformerLayer(MacaronLayer):
    """Half an MLP, attention, convolution, half an MLP, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvolutionModule()
        self.final_norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Four branches and a norm behind them."""
        x = x + self.ffn1(x) * 0.5
        x = x + self.self_attn(x)
        x = x + self.conv(x)
        return self.final_norm(x + self.ffn2(x) * 0.5)


class Recurrent(nn.Module):
    """A GRU as token mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(HIDDEN, 24, batch_first=True)
        self.out = nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Run along the tokens."""
        return self.out(self.gru(x)[0])


class ShortConvolution(nn.Module):
    """A gated causal convolution as token mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=2, groups=HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, gate, project."""
        h, gate = self.into(x).chunk(2, dim=-1)
        h = self.conv(h.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.out(h * gate)


class MixerBlock(Block):
    """A pre-norm block around any token mixer."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.attn = mixer


class TokenMLP(nn.Module):
    """An MLP over the positions of a fixed number of tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.up = nn.Linear(tokens, 24)
        self.down = nn.Linear(24, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every channel alone."""
        return self.down(F.gelu(self.up(x)))


class MLPMixerLayer(nn.Module):
    """Token mixing on the transposed stream, then channel mixing."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.token_mlp = TokenMLP(tokens)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.channel_mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class MLPMixer(nn.Module):
    """Patches to classes, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, HIDDEN, 4, stride=4)
        self.layers = nn.Sequential(*(MLPMixerLayer(9) for _ in range(3)))
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures to logits."""
        return self.head(self.layers(self.stem(pixels).flatten(2).transpose(1, 2)).mean(1))


class WideBlock(nn.Module):
    """A pre-norm block of any width on ``(batch, height, width, channels)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLP(width=channels)

    def attention(self, x: Tensor) -> Tensor:
        """Attend over all positions."""
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours become one, twice as wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate and project."""
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class Stage(nn.Module):
    """Blocks of one width, then a merge."""

    def __init__(self, channels: int, merge: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WideBlock(channels) for _ in range(2))
        self.downsample = PatchMerging(channels) if merge else None

    def forward(self, x: Tensor) -> Tensor:
        """Blocks, then the merge."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Pyramid(nn.Module):
    """Stages of widths 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.stages = nn.ModuleList([Stage(16, merge=True), Stage(32, merge=False)])
        self.head = nn.Linear(32, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures to logits."""
        x = self.stem(pixels).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((1, 2)))


class VisionTransformer(nn.Module):
    """Class token and positions in front, pre-norm blocks in a Sequential, head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, HIDDEN, 4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, HIDDEN))
        self.positions = nn.Parameter(torch.zeros(1, 10, HIDDEN))
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures to logits."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(x)[:, 0])


class LowRank(nn.Module):
    """A frozen linear layer and a trained low-rank update beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.base(x) + 0.5 * self.lora_b(self.lora_a(x))


def low_rank() -> nn.Module:
    """A GPT with low-rank updates in every linear layer of its blocks; the rest is frozen."""
    model = NanoGPT().requires_grad_(False)
    for block in model.transformer["h"]:
        for owner in (block.attn, block.mlp):
            for name, layer in list(owner.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(owner, name, LowRank(layer))
    return model


def parametrized(parametrization: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A GPT whose linear layers compute their weights."""
    model = NanoGPT()
    for block in model.transformer["h"]:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                parametrization(layer)
    return model


def merged_low_rank(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    """The matrices with the low-rank updates added in."""

    def merged(layer: nn.Module) -> Tensor:
        return (layer.base.weight + 0.5 * layer.lora_b.weight @ layer.lora_a.weight).detach()

    return {
        f"{BLOCKS}.{i}": {
            "attention": [merged(block.attn.c_proj) @ merged(block.attn.c_attn)[2 * HIDDEN :]],
            "mlp": [merged(block.mlp.c_proj) @ merged(block.mlp.c_fc)],
        }
        for i, block in enumerate(model.get_submodule(BLOCKS))
    }


def alternating() -> nn.Module:
    """Attention layers and MLP layers take turns in one flat list."""
    return Embedded(Loop([Residual(CausalSelfAttention() if i % 2 == 0 else MLP()) for i in range(6)]))


def hybrid() -> nn.Module:
    """A GRU, attention, a convolution, attention."""
    mixers = (Recurrent, CausalSelfAttention, ShortConvolution, CausalSelfAttention)
    return Embedded(Loop([MixerBlock(mixer()) for mixer in mixers]))


def pixels_12(model: nn.Module) -> Inputs:
    """Pictures of nine patches."""
    return (floats(BATCH, 3, 12, 12),), {}


def pixels_16(model: nn.Module) -> Inputs:
    """Pictures of sixteen patches."""
    return (floats(BATCH, 3, 16, 16),), {}


def _fn(prefix: str, sites: tuple[str, ...]) -> tuple[str, ...]:
    """The sites of a branch that stands under another name."""
    return tuple(prefix + site[len(sites[0]) :] for site in sites)


def _pyramid_blocks() -> tuple[ExpectedBlock, ...]:
    return tuple(
        block for stage in range(2) for block in blocks_of(f"stages.{stage}.blocks", range(2), "proj", MLP_SITES)
    )


def _alternating_blocks(container: str) -> tuple[ExpectedBlock, ...]:
    layers = (
        blocks_of(container, (i,), _fn("fn", ATTENTION_SITES), None)[0]
        if i % 2 == 0
        else blocks_of(container, (i,), None, _fn("fn", MLP_SITES))[0]
        for i in range(6)
    )
    return pairs(tuple(layers))


def _hybrid_blocks() -> tuple[ExpectedBlock, ...]:
    recurrent, _, convolution, _ = (
        blocks_of("body.layers", (i,), ("attn", "attn.out"), MLP_SITES, kinds=("mixer",))[0] for i in range(4)
    )
    attention = blocks_of("body.layers", (1, 3), ATTENTION_SITES, MLP_SITES)
    return recurrent, attention[0], convolution, attention[1]


def _tokens(name: str, build: Build, blocks: tuple[ExpectedBlock, ...], **flags: object) -> Example:
    return Example(name, seeded(build), token_inputs, blocks, **flags)  # type: ignore[arg-type]


def members() -> list[Example]:
    """Every model of this module."""
    layers = "body.layers"
    pair = ("1", "1.net", "1.net.4")
    feed_forward = ("ffn1", "ffn1.net", "ffn1.net.4")
    second = (("ffn2", "ffn2.net", "ffn2.net.4"),)
    convolved = (("conv",), *second)
    attention = _fn("self_attn", ATTENTION_SITES)
    return [
        _tokens(
            "pairs_in_the_parent",
            lambda: Embedded(Pairs()),
            blocks_of(layers, range(3), _fn("0", ATTENTION_SITES), pair),
            note="the block is a ModuleList that is never called",
        ),
        _tokens(
            "pre_norm_wrappers",
            lambda: Embedded(PreNormPairs()),
            blocks_of(layers, range(3), ("0", *_fn("0.fn", ATTENTION_SITES)), ("1", *_fn("1.fn", MLP_SITES))),
            note="the block is a ModuleList that is never called",
        ),
        _tokens(
            "residual_wrappers",
            lambda: Embedded(
                nn.Sequential(*(nn.Sequential(Residual(CausalSelfAttention()), Residual(MLP())) for _ in range(3)))
            ),
            blocks_of("body", range(3), _fn("0.fn", ATTENTION_SITES), _fn("1.fn", MLP_SITES)),
            note="a Sequential of Sequentials: the block is the inner one",
        ),
        _tokens("alternating_list", alternating, _alternating_blocks(layers), note="two entries of a list are a block"),
        _tokens(
            "attention_only",
            lambda: Embedded(Loop([Residual(CausalSelfAttention()) for _ in range(3)])),
            blocks_of(layers, range(3), _fn("fn", ATTENTION_SITES), None),
            note="blocks with one branch",
        ),
        _tokens(
            "mlp_only",
            lambda: Embedded(Loop([Residual(MLP()) for _ in range(3)])),
            blocks_of(layers, range(3), None, _fn("fn", MLP_SITES)),
            note="blocks with one branch",
        ),
        _tokens(
            "alternating_sequential",
            lambda: Embedded(
                nn.Sequential(*(Residual(CausalSelfAttention() if i % 2 == 0 else MLP()) for i in range(6)))
            ),
            _alternating_blocks("body"),
            note="two entries of a Sequential are a block",
        ),
        _tokens(
            "annotated_transformer",
            lambda: Embedded(Loop([AnnotatedLayer() for _ in range(3)])),
            blocks_of(
                layers,
                range(3),
                ("sublayer.0.dropout", *attention),
                ("sublayer.1.dropout", *_fn("feed_forward", MLP_SITES)),
            ),
            note="the branch is handed over as a function; norm and add live beside it",
        ),
        _tokens(
            "numbered_attributes",
            lambda: Embedded(Numbered()),
            tuple(
                ExpectedBlock(
                    f"body.block_{i}",
                    tuple(f"body.block_{i}.{s}" for s in ATTENTION_SITES),
                    tuple(f"body.block_{i}.{s}" for s in MLP_SITES),
                )
                for i in range(3)
            ),
            note="no container",
        ),
        _tokens(
            "macaron",
            lambda: Embedded(Loop([MacaronLayer() for _ in range(3)])),
            blocks_of(layers, range(3), attention, feed_forward, second, other_kinds=("mlp",)),
            note="two half-step MLPs",
        ),
        _tokens(
            "conformer",
            lambda: Embedded(Loop([ConformerLayer() for _ in range(3)])),
            blocks_of(layers, range(3), attention, feed_forward, convolved, other_kinds=("mixer", "mlp")),
            norm_scheme="post",
            identity=False,
            note="a norm behind the last of four branches",
        ),
        _tokens("hybrid", hybrid, _hybrid_blocks()),
        Example(
            "mlp_mixer",
            seeded(MLPMixer),
            pixels_12,
            blocks_of(
                "layers", range(3), ("token_mlp", "token_mlp.down"), _fn("channel_mlp", MLP_SITES), kinds=("mixer",)
            ),
            note="the token-mixing MLP acts on the transposed stream",
        ),
        Example("pyramid", seeded(Pyramid), pixels_16, _pyramid_blocks(), note="stages of widths 16 and 32"),
        Example(
            "vision_transformer",
            seeded(VisionTransformer),
            pixels_12,
            blocks_of("blocks", range(3), ATTENTION_SITES, MLP_SITES),
            matrices=lambda model: block_matrices(model, "blocks"),
            note="only the class token is read",
        ),
        _tokens(
            "low_rank_updates",
            low_rank,
            blocks_of(BLOCKS, range(3), ATTENTION_SITES, MLP_SITES),
            matrices=merged_low_rank,
            note="an add inside every linear layer",
        ),
        _tokens(
            "spectral_norm_weights",
            lambda: parametrized(parametrizations.spectral_norm),
            blocks_of(BLOCKS, range(3), ATTENTION_SITES, MLP_SITES),
            matrices=block_matrices,
            note="weights are computed; reading one in training mode advances the power iteration",
        ),
        _tokens(
            "weight_norm_weights",
            lambda: parametrized(parametrizations.weight_norm),
            blocks_of(BLOCKS, range(3), ATTENTION_SITES, MLP_SITES),
            matrices=block_matrices,
            note="weights are computed",
        ),
    ]

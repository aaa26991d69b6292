"""Plain PyTorch language models: the surveyed ones and every common place for a norm, a scale or an add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import survey
from .example import (
    BATCH,
    HEADS,
    HIDDEN,
    TOKENS,
    VOCABULARY,
    Example,
    ExpectedBlock,
    Inputs,
    blocks_of,
    seeded,
    token_inputs,
    tokens,
)
from .gpt import ATTENTION_SITES, BLOCKS, MLP, MLP_SITES, Block, CausalSelfAttention, NanoGPT, attend, block_matrices


class MLPFirstBlock(Block):
    """The MLP is registered before the attention but runs after it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.mlp = MLP()
        self.ln_2 = nn.LayerNorm(HIDDEN)
        self.ln_1 = nn.LayerNorm(HIDDEN)
        self.attn = CausalSelfAttention()


class InlineBlock(nn.Module):
    """No attention module, no MLP module, and the residual is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.n1 = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.n2 = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Write both branches out."""
        branch = self.out(attend(*self.qkv(self.n1(x)).chunk(3, dim=-1)))
        branch += x
        x = branch
        branch = self.down(F.gelu(self.up(self.n2(x))))
        branch += x
        return branch


class MHABlock(nn.Module):
    """A block on ``nn.MultiheadAttention``, whose ``out_proj`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.n1 = nn.LayerNorm(HIDDEN)
        self.sa = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.n2 = nn.LayerNorm(HIDDEN)
        self.ff = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Attend with a causal mask."""
        h = self.n1(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.sa(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.ff(self.n2(x))


class FuncBlock(nn.Module):
    """No sub-modules: raw parameters and einsum."""

    def __init__(self) -> None:
        super().__init__()
        head = HIDDEN // HEADS
        self.g1 = nn.Parameter(torch.ones(HIDDEN))
        self.Wqkv = nn.Parameter(torch.randn(3, HIDDEN, HEADS, head))
        self.Wo = nn.Parameter(torch.randn(HEADS, head, HIDDEN))
        self.g2 = nn.Parameter(torch.ones(HIDDEN))
        self.W1 = nn.Parameter(torch.randn(HIDDEN, 4 * HIDDEN))
        self.W2 = nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Everything by einsum."""
        q, k, v = torch.einsum("btd,cdhk->cbhtk", F.rms_norm(x, (HIDDEN,), self.g1), self.Wqkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + torch.einsum("bhtk,hkd->btd", mixed, self.Wo)
        return x + F.gelu(F.rms_norm(x, (HIDDEN,), self.g2) @ self.W1) @ self.W2


class ReZeroBlock(nn.Module):
    """One learned multiplier for both branches and one for the residual; no norms."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = CausalSelfAttention()
        self.mlp = MLP()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.lam = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the residual and the branch."""
        x = self.lam * x + self.alpha * self.attn(x)
        return self.lam * x + self.alpha * self.mlp(x)


class TwoAlphaBlock(nn.Module):
    """ReZero as published: one multiplier per branch, the residual untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = CausalSelfAttention()
        self.mlp = MLP()
        self.alpha_attn = nn.Parameter(torch.full((1,), 0.6))
        self.alpha_mlp = nn.Parameter(torch.full((1,), -0.8))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each branch."""
        x = x + self.attn(x) * self.alpha_attn
        return x + self.mlp(x) * self.alpha_mlp


class PostNormBlock(Block):
    """The norm stands behind the add."""

    def forward(self, x: Tensor) -> Tensor:
        """Add, then normalize."""
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class SandwichBlock(Block):
    """A norm before and a norm behind each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_3 = nn.LayerNorm(HIDDEN, bias=False)
        self.ln_4 = nn.LayerNorm(HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize what goes in and what comes out."""
        x = x + self.ln_3(self.attn(self.ln_1(x)))
        return x + self.ln_4(self.mlp(self.ln_2(x)))


class BranchPostNormBlock(Block):
    """A norm behind each branch only."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize what comes out."""
        x = x + self.ln_1(self.attn(x))
        return x + self.ln_2(self.mlp(x))


class ParallelBlock(Block):
    """Both branches read the same stream."""

    def forward(self, x: Tensor) -> Tensor:
        """One sum of three."""
        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))


class ParallelOneNormBlock(nn.Module):
    """Both branches read the same norm, and their sum is formed before the add."""

    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(HIDDEN)
        self.attn = CausalSelfAttention()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        """Branches first, stream last."""
        h = self.ln(x)
        return (self.attn(h) + self.mlp(h)) + x


class FunctionalNormBlock(nn.Module):
    """RMS norms without modules or gains, and functional dropout on both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = CausalSelfAttention()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by hand."""
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = x + F.dropout(self.attn(h), 0.1, self.training)
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + F.dropout(self.mlp(h), 0.1, self.training)


class LayerScale(nn.Module):
    """A learned gain per channel."""

    def __init__(self, value: float = 0.6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((HIDDEN,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole samples in training."""
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *(1 for _ in x.shape[1:])) >= self.p
        return x * keep / (1 - self.p)


class LayerScaleBlock(Block):
    """LayerScale and DropPath modules behind each branch, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.ls1, self.ls2 = LayerScale(), LayerScale(-0.9)
        self.drop_path1, self.drop_path2 = DropPath(), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        """Scale, then drop."""
        x = x + self.drop_path1(self.ls1(self.attn(self.ln_1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.ln_2(x))))


class DropoutBlock(nn.Module):
    """Dropout wherever it can stand; one module of it serves both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(HIDDEN)
        self.attn = CausalSelfAttention(dropout=0.1)
        self.ln_2 = nn.LayerNorm(HIDDEN)
        self.mlp = MLP(dropout=0.1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Drop again before each add."""
        x = x + self.drop(self.attn(self.drop(self.ln_1(x))))
        return x + self.drop(self.mlp(self.ln_2(x)))


class SharedGPT(nn.Module):
    """One block, called four times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.block = Block()
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, idx: Tensor) -> Tensor:
        """Repeat the block."""
        x = self.embed(idx)
        for _ in range(4):
            x = self.block(x)
        return self.head(x)


class TokensFirstAttention(nn.Module):
    """Attention on ``(tokens, batch, width)``."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HIDDEN)
        self.k = nn.Linear(HIDDEN, HIDDEN)
        self.v = nn.Linear(HIDDEN, HIDDEN)
        self.o = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Scores by batched matrix product over (batch · heads)."""
        count, batch, _ = x.shape
        head = HIDDEN // HEADS
        q, k, v = (p(x).reshape(count, batch * HEADS, head).transpose(0, 1) for p in (self.q, self.k, self.v))
        scores = torch.bmm(q, k.transpose(1, 2)) / head**0.5
        scores = scores + torch.full((count, count), float("-inf")).triu(1)
        mixed = torch.bmm(scores.softmax(-1), v)
        return self.o(mixed.transpose(0, 1).reshape(count, batch, HIDDEN))


class TokensFirstGPT(nn.Module):
    """Token ids ``(tokens, batch)``, stream ``(tokens, batch, width)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        for layer in self.layers:
            layer.attn = TokensFirstAttention()
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, idx: Tensor) -> Tensor:
        """Ids to logits."""
        x = self.embed(idx)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tokens_first_inputs(model: nn.Module) -> Inputs:
    """Token ids ``(tokens, batch)``."""
    return (tokens(TOKENS, BATCH),), {}


def _surveyed(name: str, block: type[nn.Module], **flags: object) -> Example:
    entry = survey.entries()[name]
    return Example(
        name=name,
        build=seeded(lambda: NanoGPT(block)),
        inputs=token_inputs,
        blocks=survey.expected_blocks(entry),
        survey=True,
        note=entry["note"],
        **flags,  # type: ignore[arg-type]
    )


def _variant(
    name: str, block: type[nn.Module], attention: object = ATTENTION_SITES, mlp: object = MLP_SITES, **flags: object
) -> Example:
    return Example(
        name=name,
        build=seeded(lambda: NanoGPT(block)),
        inputs=token_inputs,
        blocks=blocks_of(BLOCKS, range(3), attention, mlp),  # type: ignore[arg-type]
        matrices=block_matrices,
        **flags,  # type: ignore[arg-type]
    )


def _inline_matrices(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    return {
        f"{BLOCKS}.{i}": {
            "attention": [(b.out.weight @ b.qkv.weight[2 * HIDDEN :]).detach()],
            "mlp": [(b.down.weight @ b.up.weight).detach()],
        }
        for i, b in enumerate(model.get_submodule(BLOCKS))
    }


def _mha_matrices(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    return {
        f"{BLOCKS}.{i}": {
            "attention": [(b.sa.out_proj.weight @ b.sa.in_proj_weight[2 * HIDDEN :]).detach()],
            "mlp": [(b.ff[2].weight @ b.ff[0].weight).detach()],
        }
        for i, b in enumerate(model.get_submodule(BLOCKS))
    }


def _functional_matrices(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    return {
        f"{BLOCKS}.{i}": {
            "attention": [(b.Wo.flatten(0, 1).T @ b.Wqkv[2].flatten(1).T).detach()],
            "mlp": [(b.W2.T @ b.W1.T).detach()],
        }
        for i, b in enumerate(model.get_submodule(BLOCKS))
    }


def _tokens_first_matrices(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    return {
        f"layers.{i}": {
            "attention": [(b.attn.o.weight @ b.attn.v.weight).detach()],
            "mlp": [(b.mlp.c_proj.weight @ b.mlp.c_fc.weight).detach()],
        }
        for i, b in enumerate(model.get_submodule("layers"))
    }


def members() -> list[Example]:
    """Every model of this module."""
    shared = ExpectedBlock(
        name="block",
        attention=tuple(f"block.{site}" for site in ATTENTION_SITES),
        mlp=tuple(f"block.{site}" for site in MLP_SITES),
        calls=4,
    )
    return [
        _surveyed("nanogpt", Block, matrices=block_matrices),
        _surveyed("nanogpt_fused_residual", InlineBlock, matrices=_inline_matrices),
        _surveyed("mha_custom_block", MHABlock, matrices=_mha_matrices),
        _surveyed("plain_functional_params", FuncBlock, matrices=_functional_matrices),
        _surveyed("plain_rezero", ReZeroBlock, norm_scheme="none", identity=False, matrices=block_matrices),
        _variant("nanogpt_mlp_first", MLPFirstBlock, note="the MLP is registered before the attention"),
        _variant("plain_post_norm", PostNormBlock, norm_scheme="post", identity=False),
        _variant("plain_sandwich", SandwichBlock, "ln_3", "ln_4", norm_scheme="sandwich"),
        _variant("plain_branch_post_norm", BranchPostNormBlock, "ln_1", "ln_2", norm_scheme="branchpost"),
        _variant("plain_parallel", ParallelBlock, norm_scheme="par"),
        _variant("plain_parallel_one_norm", ParallelOneNormBlock, norm_scheme="par"),
        _variant("plain_functional_norm", FunctionalNormBlock),
        _variant("plain_two_alphas", TwoAlphaBlock, norm_scheme="none", note="one of the multipliers is negative"),
        _variant("plain_layer_scale", LayerScaleBlock, ("ls1", "drop_path1"), ("ls2", "drop_path2")),
        _variant("plain_dropout", DropoutBlock, note="`drop` serves both branches and stands inside one: no site"),
        Example(
            "untied_head",
            seeded(lambda: NanoGPT(tied=False)),
            token_inputs,
            blocks_of(BLOCKS, range(3), ATTENTION_SITES, MLP_SITES),
            matrices=block_matrices,
        ),
        Example(
            "one_layer",
            seeded(lambda: NanoGPT(layers=1)),
            token_inputs,
            blocks_of(BLOCKS, range(1), ATTENTION_SITES, MLP_SITES),
            matrices=block_matrices,
        ),
        Example(
            "shared_block",
            seeded(SharedGPT),
            token_inputs,
            (shared,),
            note="no container: one module called four times",
        ),
        Example(
            "tokens_first",
            seeded(TokensFirstGPT),
            tokens_first_inputs,
            blocks_of("layers", range(3), ("attn", "attn.o"), MLP_SITES),
            matrices=_tokens_first_matrices,
            note="layout (tokens, batch, width)",
        ),
    ]

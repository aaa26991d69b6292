"""Fused projections in every layout that occurs, grouped queries and latent attention, with the matrices they mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .example import HEADS, HIDDEN, Example, blocks_of, seeded, token_inputs
from .gpt import BLOCKS, MLP, MLP_SITES, CausalSelfAttention, NanoGPT, attention_matrix, mlp_matrix

HEAD = HIDDEN // HEADS
INNER = 48


def scores_times_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on ``(batch, heads, tokens, channels)``, heads joined at the end."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def heads_first(x: Tensor) -> Tensor:
    """``(batch, tokens, heads · channels)`` to ``(batch, heads, tokens, channels)``."""
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


class Attention(nn.Module):
    """One fused projection of the given width; subclasses cut it up."""

    width = 3 * HIDDEN

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(HIDDEN, self.width, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project, cut, attend, project."""
        return self.wo(scores_times_values(*self.cut(self.wqkv(x))))

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, heads first, with as many key and value heads as query heads."""
        raise NotImplementedError

    def value_rows(self) -> Tensor:
        """The output rows of ``wqkv`` that are the value of each query head, in order."""
        raise NotImplementedError


class KQV(Attention):
    """Rows k|q|v."""

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, q, v = (heads_first(part) for part in fused.chunk(3, dim=-1))
        return q, k, v

    def value_rows(self) -> Tensor:
        return torch.arange(2 * HIDDEN, 3 * HIDDEN)


class VQK(Attention):
    """Rows v|q|k."""

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, q, k = (heads_first(part) for part in fused.chunk(3, dim=-1))
        return q, k, v

    def value_rows(self) -> Tensor:
        return torch.arange(HIDDEN)


class PerHead(Attention):
    """Rows interleaved: per head q, k, v."""

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = fused.unflatten(-1, (HEADS, 3 * HEAD)).transpose(1, 2).chunk(3, dim=-1)
        return q, k, v

    def value_rows(self) -> Tensor:
        return torch.arange(3 * HIDDEN).view(HEADS, 3, HEAD)[:, 2].flatten()


class PerChannel(Attention):
    """Rows interleaved channel by channel: q, k, v of one channel of one head stand side by side."""

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = fused.unflatten(-1, (HEADS, HEAD, 3)).transpose(1, 2).unbind(-1)
        return q, k, v

    def value_rows(self) -> Tensor:
        return torch.arange(3 * HIDDEN).view(HIDDEN, 3)[:, 2]


class ThreeFirst(Attention):
    """Rows q|k|v, cut by the reshape and permute of vision transformers."""

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = fused.unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def value_rows(self) -> Tensor:
        return torch.arange(2 * HIDDEN, 3 * HIDDEN)


class GroupedInterleaved(Attention):
    """Two key/value heads; rows per key/value head: its queries, its key, its value (InternLM 2, Falcon 40B)."""

    width = 2 * 4 * HEAD

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped = fused.unflatten(-1, (2, 4, HEAD))
        q = grouped[..., :2, :].flatten(2, 3).transpose(1, 2)
        k = grouped[..., 2, :].transpose(1, 2).repeat_interleave(2, dim=1)
        v = grouped[..., 3, :].transpose(1, 2).repeat_interleave(2, dim=1)
        return q, k, v

    def value_rows(self) -> Tensor:
        return torch.arange(self.width).view(2, 4, HEAD)[:, 3].repeat_interleave(2, dim=0).flatten()


class GroupedRows(Attention):
    """Two key/value heads; rows q|k|v."""

    width = (4 + 2 + 2) * HEAD

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_first(part) for part in fused.split([4 * HEAD, 2 * HEAD, 2 * HEAD], dim=-1))
        return q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)

    def value_rows(self) -> Tensor:
        return torch.arange(6 * HEAD, 8 * HEAD).view(2, HEAD).repeat_interleave(2, dim=0).flatten()


class GroupedTiled(GroupedRows):
    """The same rows, but query head i reads key/value head i modulo 2."""

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_first(part) for part in fused.split([4 * HEAD, 2 * HEAD, 2 * HEAD], dim=-1))
        return q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)

    def value_rows(self) -> Tensor:
        return torch.arange(6 * HEAD, 8 * HEAD).repeat(2)


class MultiQuery(Attention):
    """One key/value head, broadcast; rows q|k|v."""

    width = (4 + 1 + 1) * HEAD

    def cut(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = fused.split([4 * HEAD, HEAD, HEAD], dim=-1)
        expanded = (x.unsqueeze(1).expand(-1, HEADS, -1, -1) for x in (k, v))
        return heads_first(q), *expanded

    def value_rows(self) -> Tensor:
        return torch.arange(5 * HEAD, 6 * HEAD).repeat(HEADS)


class Conv1D(nn.Module):
    """A linear layer that stores its weight as ``(in, out)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """One ``addmm`` on flattened tokens."""
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Columns(nn.Module):
    """Fused projection stored transposed: columns q|k|v."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = Conv1D(HIDDEN, 3 * HIDDEN)
        self.wo = Conv1D(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Project, cut, attend, project."""
        q, k, v = (heads_first(part) for part in self.wqkv(x).chunk(3, dim=-1))
        return self.wo(scores_times_values(q, k, v))

    def matrix(self) -> Tensor:
        """W_o · W_v."""
        return self.wo.weight.T @ self.wqkv.weight[:, 2 * HIDDEN :].T


class QueryAndFusedKV(nn.Module):
    """A query projection beside one fused key/value projection."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.to_kv = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.to_out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Project, cut, attend, project."""
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return self.to_out(scores_times_values(heads_first(self.to_q(x)), heads_first(k), heads_first(v)))

    def matrix(self) -> Tensor:
        """W_o · W_v."""
        return self.to_out.weight @ self.to_kv.weight[HIDDEN:]


class SeparateGrouped(nn.Module):
    """Separate projections, heads wider than ``hidden / heads``, two key/value heads, rotated queries and keys."""

    channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * self.channels, bias=False)
        self.k_proj = nn.Linear(HIDDEN, 2 * self.channels, bias=False)
        self.v_proj = nn.Linear(HIDDEN, 2 * self.channels, bias=False)
        self.o_proj = nn.Linear(HEADS * self.channels, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project, rotate, attend, project."""
        q, k, v = (
            p(x).unflatten(-1, (-1, self.channels)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        angle = torch.arange(x.shape[1])[:, None] / 100 ** (torch.arange(self.channels // 2) / (self.channels // 2))
        q, k = rotate(q, angle), rotate(k, angle)
        return self.o_proj(scores_times_values(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))

    def matrix(self) -> Tensor:
        """W_o · W_v↑."""
        v = self.v_proj.weight.unflatten(0, (2, self.channels)).repeat_interleave(2, dim=0).flatten(0, 1)
        return self.o_proj.weight @ v


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary position embedding, halves convention."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class Latent(nn.Module):
    """Multi-head latent attention: one latent for keys and values beside one shared rotary key."""

    latent, rotary, nope, value = 12, 4, 8, 6

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.q_a = nn.Linear(HIDDEN, 16, bias=False)
        self.q_b = nn.Linear(16, HEADS * (self.nope + self.rotary), bias=False)
        self.kv_a = nn.Linear(HIDDEN, self.latent + self.rotary, bias=False)
        self.kv_norm = nn.RMSNorm(self.latent) if norm else nn.Identity()
        self.kv_b = nn.Linear(self.latent, HEADS * (self.nope + self.value), bias=False)
        self.o = nn.Linear(HEADS * self.value, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compress, expand per head, attend, project."""
        q = self.q_b(self.q_a(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        latent, k_rotary = self.kv_a(x).split([self.latent, self.rotary], dim=-1)
        k_nope, v = (
            self.kv_b(self.kv_norm(latent))
            .unflatten(-1, (HEADS, -1))
            .transpose(1, 2)
            .split([self.nope, self.value], dim=-1)
        )
        angle = torch.arange(x.shape[1])[:, None] / 100 ** (torch.arange(self.rotary // 2) / (self.rotary // 2))
        q_nope, q_rotary = q.split([self.nope, self.rotary], dim=-1)
        k_rotary = rotate(k_rotary, angle).unsqueeze(1).expand(-1, HEADS, -1, -1)
        q = torch.cat([q_nope, rotate(q_rotary, angle)], dim=-1)
        return self.o(scores_times_values(q, torch.cat([k_nope, k_rotary], dim=-1), v))

    def matrix(self) -> Tensor:
        """W_o · W_kv_b (value rows) · W_kv_a (latent rows)."""
        rows = self.kv_b.weight.unflatten(0, (HEADS, -1))[:, self.nope :].flatten(0, 1)
        return self.o.weight @ rows @ self.kv_a.weight[: self.latent]


class Gated(nn.Module):
    """A gated MLP with separate projections; the gate is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.w3 = nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)
        self.w1 = nn.Linear(HIDDEN, INNER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def up(self) -> Tensor:
        """The linear half."""
        return self.w3.weight


class GateUp(nn.Module):
    """Fused, rows gate|up."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)

    def up(self) -> Tensor:
        """The linear half."""
        return self.w13.weight[INNER:]


class UpGate(GateUp):
    """Fused, rows up|gate (GEGLU of lucidrains and of diffusers)."""

    def forward(self, x: Tensor) -> Tensor:
        """GEGLU."""
        up, gate = self.w13(x).chunk(2, dim=-1)
        return self.w2(up * F.gelu(gate))

    def up(self) -> Tensor:
        """The linear half."""
        return self.w13.weight[:INNER]


class Interleaved(GateUp):
    """Fused, even rows gate, odd rows up."""

    def forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        fused = self.w13(x)
        return self.w2(F.silu(fused[..., ::2]) * fused[..., 1::2])

    def up(self) -> Tensor:
        """The linear half."""
        return self.w13.weight[1::2]


class SquaredReLU(nn.Module):
    """Not gated, but the activation is a product: relu(x)·relu(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Square what is positive."""
        h = F.relu(self.w1(x))
        return self.w2(h * h)

    def up(self) -> Tensor:
        """The only other matrix."""
        return self.w1.weight


class PreNormBlock(nn.Module):
    """A pre-norm RMS block around any attention and any MLP."""

    def __init__(self, attention: Callable[[], nn.Module], mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN)
        self.attention = attention()
        self.ffn_norm = nn.RMSNorm(HIDDEN)
        self.feed_forward = mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


def attention_branch(attention: nn.Module) -> Tensor:
    if isinstance(attention, CausalSelfAttention):
        return attention_matrix(attention)
    if isinstance(attention, Attention):
        return attention.wo.weight @ attention.wqkv.weight[attention.value_rows()]
    return attention.matrix()


def mlp_branch(mlp: nn.Module) -> Tensor:
    return mlp_matrix(mlp) if isinstance(mlp, MLP) else mlp.w2.weight @ mlp.up()


def matrices(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    """The matrices of every block of this module."""
    return {
        f"{BLOCKS}.{i}": {
            "attention": [attention_branch(block.attention).detach()],
            "mlp": [mlp_branch(block.feed_forward).detach()],
        }
        for i, block in enumerate(model.get_submodule(BLOCKS))
    }


def _member(name: str, attention: Callable[[], nn.Module], mlp: Callable[[], nn.Module], *inner: str) -> Example:
    """``inner``: the modules inside attention and MLP whose output is the branch too."""
    out, down = inner
    return Example(
        name=name,
        build=seeded(lambda: NanoGPT(lambda: PreNormBlock(attention, mlp), layers=2)),
        inputs=token_inputs,
        blocks=blocks_of(
            BLOCKS,
            range(2),
            ("attention", f"attention.{out}"),
            tuple(site.replace("mlp", "feed_forward") for site in MLP_SITES)
            if mlp is MLP
            else ("feed_forward", f"feed_forward.{down}"),
        ),
        matrices=matrices,
        note=(attention.__doc__ or "") if mlp is MLP else (mlp.__doc__ or ""),
    )


def members() -> list[Example]:
    """Every model of this module."""
    attentions: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "qkv_rows_kqv": (KQV, "wo"),
        "qkv_rows_vqk": (VQK, "wo"),
        "qkv_per_head": (PerHead, "wo"),
        "qkv_per_channel": (PerChannel, "wo"),
        "qkv_three_first": (ThreeFirst, "wo"),
        "qkv_grouped_interleaved": (GroupedInterleaved, "wo"),
        "qkv_grouped_rows": (GroupedRows, "wo"),
        "qkv_grouped_tiled": (GroupedTiled, "wo"),
        "qkv_multi_query": (MultiQuery, "wo"),
        "qkv_conv1d_columns": (Columns, "wo"),
        "q_and_fused_kv": (QueryAndFusedKV, "to_out"),
        "separate_grouped": (SeparateGrouped, "o_proj"),
        "latent_attention": (Latent, "o"),
        "latent_attention_norm": (lambda: Latent(norm=True), "o"),
    }
    mlps: dict[str, Callable[[], nn.Module]] = {
        "gated_separate": Gated,
        "gate_up": GateUp,
        "up_gate": UpGate,
        "gate_up_interleaved": Interleaved,
        "squared_relu": SquaredReLU,
    }
    return [_member(name, attention, MLP, out, "") for name, (attention, out) in attentions.items()] + [
        _member(name, PerHead, mlp, "wo", "w2") for name, mlp in mlps.items()
    ]

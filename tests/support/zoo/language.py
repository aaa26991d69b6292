"""Language models as people train them: lambdas on the stream, gates, fused projections, loops, experts, lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .example import HEADS, HIDDEN, VOCABULARY, Example, ExpectedBlock, blocks_of, seeded, token_inputs
from .gpt import ATTENTION_SITES, MLP_SITES, Block, attend, attention_matrix, mlp_matrix

Operators = dict[str, dict[str, Tensor]]
WIDTH = 48


def rms(x: Tensor) -> Tensor:
    """An RMS norm without gain."""
    return F.rms_norm(x, x.shape[-1:])


def normalized(behind: Tensor, gain: Tensor) -> Tensor:
    """A norm behind a matrix: its gain, and the expected size of what enters it."""
    return gain.diag() @ behind * math.sqrt(behind.shape[0]) / torch.linalg.matrix_norm(behind)


class Language(nn.Module):
    """Token ids to logits, through blocks that are called in order."""

    def __init__(self, block: Callable[[], nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def run(self, x: Tensor) -> Tensor:
        """Through the blocks."""
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, idx: Tensor) -> Tensor:
        """Ids to logits."""
        return self.head(rms(self.run(self.embed(idx))))

    def operators(self) -> Operators:
        """What the blocks say about themselves."""
        return {f"layers.{i}": layer.operators() for i, layer in enumerate(self.layers)}


class Preceded(Block):
    """A pre-norm block that knows its operators."""

    def operators(self) -> dict[str, Tensor]:
        """W_o · W_v and W_down · W_up, behind the gains."""
        return {
            "attention": attention_matrix(self.attn) @ self.ln_1.weight.diag(),
            "mlp": mlp_matrix(self.mlp) @ self.ln_2.weight.diag(),
        }


class Parallel(Preceded):
    """Both branches read the stream."""

    def forward(self, x: Tensor) -> Tensor:
        """One sum of three."""
        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))


class LongSkips(Language):
    """The first stream is mixed into every block, and a stream of the middle is added and taken off again."""

    def __init__(self) -> None:
        super().__init__(Parallel, layers=3)
        self.lambdas = nn.Parameter(torch.tensor([[1.0, 0.2], [0.9, 0.3], [1.1, 0.4]]))
        self.skip, self.backout = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.2))

    def run(self, x: Tensor) -> Tensor:
        """A skip around one block, and one around two sums."""
        first = x
        for layer, (kept, injected) in zip(self.layers[:2], self.lambdas, strict=False):
            middle = x = layer(kept * x + injected * first)
        x = self.layers[2](x + self.skip * middle)
        return x - self.backout * middle


class Looped(Language):
    """Three rounds of the same blocks; the first stream is projected into each of them."""

    def __init__(self) -> None:
        super().__init__(Preceded)
        self.join = nn.Linear(2 * HIDDEN, HIDDEN)

    def run(self, x: Tensor) -> Tensor:
        """Round by round."""
        first = x
        for _ in range(3):
            x = super().run(self.join(torch.cat([x, first], dim=-1)))
        return x


class ChatAttention(nn.Module):
    """Grouped queries; values are mixed with value embeddings by a gate per head."""

    def __init__(self) -> None:
        super().__init__()
        self.c_q, self.c_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.c_k, self.c_v = (nn.Linear(HIDDEN, HIDDEN // 2, bias=False) for _ in range(2))
        self.gate = nn.Linear(12, HEADS // 2, bias=False)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Mix the tokens."""
        q, k, v = (part(x).unflatten(-1, (-1, HIDDEN // HEADS)) for part in (self.c_q, self.c_k, self.c_v))
        v = v + 3 * torch.sigmoid(self.gate(x[..., :12])).unsqueeze(-1) * embedded.unflatten(-1, (HEADS // 2, -1))
        q, k, v = rms(q).transpose(1, 2), rms(k).transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(1.2 * q, k, v, is_causal=True, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class ChatBlock(nn.Module):
    """Norms without gains, and squared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = ChatAttention()
        self.up, self.down = nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """One branch after the other."""
        x = x + self.attn(rms(x), embedded)
        return x + self.down(F.relu(self.up(rms(x))).square())

    def operators(self) -> dict[str, Tensor]:
        """Each value head serves two query heads."""
        heads = self.attn.c_v.weight.unflatten(0, (HEADS // 2, -1)).repeat_interleave(2, 0).flatten(0, 1)
        return {"attention": self.attn.c_proj.weight @ heads, "mlp": self.down.weight @ self.up.weight}


class Chat(Language):
    """nanochat: smeared embeddings, learned numbers on the stream, value embeddings."""

    def __init__(self) -> None:
        super().__init__(ChatBlock)
        self.values = nn.ModuleList(nn.Embedding(VOCABULARY, HIDDEN // 2) for _ in range(2))
        self.lambdas = nn.Parameter(torch.tensor([[1.1, 0.2], [1.0, 0.1]]))
        self.smear = nn.Linear(24, 1, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        """Ids to logits."""
        x = rms(self.embed(idx))
        first = x = torch.cat([x[:, :1], x[:, 1:] + torch.sigmoid(self.smear(x[:, 1:, :24])) * x[:, :-1]], dim=1)
        for layer, table, (kept, injected) in zip(self.layers, self.values, self.lambdas, strict=True):
            x = layer(kept * x + injected * first, table(idx))
        return 15 * torch.tanh(self.head(rms(x)) / 15)


class ValueAttention(nn.Module):
    """Values of the first layer are mixed in by token and head, normed by head; heads are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HEADS)
        self.gains = nn.Parameter(torch.ones(HEADS, 1, HIDDEN // HEADS))
        self.heads = nn.Parameter(torch.ones(1, HEADS, 1, 1))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """The branch, and its values."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = v if first is None else torch.lerp(first, v, torch.sigmoid(self.mix(x)).mT.unsqueeze(-1))
        y = F.scaled_dot_product_attention(q, k, F.normalize(mixed, dim=-1) * math.sqrt(8) * self.gains, is_causal=True)
        return self.out((y * self.heads).transpose(1, 2).flatten(2)), v


class ValueBlock(nn.Module):
    """The options of x-transformers that act on values."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn = ValueAttention()
        self.up, self.down = nn.Linear(HIDDEN, 2 * WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.lift = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream, and the values of its attention."""
        y, values = self.attn(self.ln_1(x), first)
        x = x + y
        linear, gate = self.up(self.ln_2(x)).chunk(2, dim=-1)
        return x + self.down(linear * F.silu(gate) * self.lift), values

    def operators(self) -> dict[str, Tensor]:
        """A gain for each head and channel behind the norm."""
        values = self.attn.qkv.weight[2 * HIDDEN :] @ self.ln_1.weight.diag()
        heads = self.attn.heads.flatten().repeat_interleave(HIDDEN // HEADS)
        out = self.attn.out.weight @ heads.diag()
        heads = zip(values.chunk(HEADS), self.attn.gains.view(HEADS, -1), strict=True)
        return {
            "attention": out @ torch.cat([normalized(head, gain) for head, gain in heads]),
            "mlp": self.down.weight @ self.lift.diag() @ self.up.weight[:WIDTH] @ self.ln_2.weight.diag(),
        }


class Values(Language):
    """Value residuals."""

    def __init__(self) -> None:
        super().__init__(ValueBlock)

    def run(self, x: Tensor) -> Tensor:
        """The values of the first layer go to all."""
        first = None
        for layer in self.layers:
            x, values = layer(x, first)
            first = values if first is None else first
        return x


class Macaron(Language):
    """Half an MLP, attention, half an MLP, as entries of one flat list that the parent adds up (x-transformers)."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        blocks = [Preceded() for _ in range(4)]
        norms = [norm for i in (0, 2) for norm in (blocks[i].ln_2, blocks[i].ln_1, blocks[i + 1].ln_2)]
        parts = [part for i in (0, 2) for part in (blocks[i].mlp, blocks[i].attn, blocks[i + 1].mlp)]
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in zip(norms, parts, strict=True))

    def run(self, x: Tensor) -> Tensor:
        """Add in the loop."""
        for place, (norm, part) in enumerate(self.layers):
            x = part(norm(x)) * (1.0 if place % 3 == 1 else 0.5) + x
        return x

    def operators(self) -> Operators:
        """Both halves are added up."""
        found = {}
        for i in (0, 3):
            (n1, first), (n2, attention), (n3, second) = self.layers[i : i + 3]
            found[" + ".join(f"layers.{j}.1" for j in (i, i + 1, i + 2))] = {
                "attention": attention_matrix(attention) @ n2.weight.diag(),
                "mlp": 0.5 * (mlp_matrix(first) @ n1.weight.diag() + mlp_matrix(second) @ n3.weight.diag()),
            }
        return found


class OutputGated(Preceded):
    """A gate of the stream on each branch (GTrXL)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_1, self.gate_2 = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """What is gated is the site, not the gate."""
        x = x + torch.sigmoid(self.gate_1(x)) * self.attn(self.ln_1(x))
        return x + torch.sigmoid(self.gate_2(x)) * self.mlp(self.ln_2(x))


class Fused(nn.Module):
    """PaLM: one matrix in front of both branches, one key and value head, rows q|k|v|linear|gate."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = (HIDDEN, HIDDEN // HEADS, HIDDEN // HEADS, WIDTH, WIDTH)
        self.norm = nn.LayerNorm(HIDDEN, bias=False)
        self.into = nn.Linear(HIDDEN, sum(self.rows), bias=False)
        self.attn_out, self.ff_out = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One sum of three."""
        q, k, v, linear, gate = self.into(self.norm(x)).split(self.rows, dim=-1)
        q = q.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mixed = torch.einsum("bhij,bjd->bihd", torch.einsum("bhid,bjd->bhij", q, k).softmax(-1), v)
        return self.attn_out(mixed.flatten(2)) + self.ff_out(F.silu(gate) * linear) + x

    def operators(self) -> dict[str, Tensor]:
        """The value head serves all heads."""
        _, _, value, linear, _ = (self.into.weight @ self.norm.weight.diag()).split(self.rows)
        return {"attention": self.attn_out.weight @ value.repeat(HEADS, 1), "mlp": self.ff_out.weight @ linear}


class Megatron(nn.Module):
    """Layout (tokens, batch, width); rows q|k|v of each head; gate and linear half in one matrix; scaled residual."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.dense = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, 2 * WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Scores by batched products over (batch · heads)."""
        count, batch, _ = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(count, batch * HEADS, 3 * HIDDEN // HEADS).transpose(0, 1).chunk(3, -1)
        mixed = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).transpose(0, 1).reshape(count, batch, HIDDEN)
        x = x + self.dense(mixed) * 0.5
        gate, linear = self.fc1(self.ln_2(x)).chunk(2, dim=-1)
        return x + self.fc2(F.silu(gate) * linear)

    def operators(self) -> dict[str, Tensor]:
        """The value rows of every head."""
        value = self.qkv.weight.unflatten(0, (HEADS, 3, -1))[:, 2].flatten(0, 1)
        return {
            "attention": 0.5 * self.dense.weight @ value @ self.ln_1.weight.diag(),
            "mlp": self.fc2.weight @ self.fc1.weight[WIDTH:] @ self.ln_2.weight.diag(),
        }


class TokensFirst(Language):
    """The stream is (tokens, batch, width)."""

    def run(self, x: Tensor) -> Tensor:
        """Turn it round and back."""
        return super().run(x.transpose(0, 1)).transpose(0, 1)


class SortedExperts(nn.Module):
    """Tokens times their scores, sorted by expert, split, and added to a shared expert's output (torchtitan)."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, experts, bias=False)
        self.up, self.linear = (nn.Parameter(torch.randn(experts, HIDDEN, WIDTH)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN))
        self.shared = nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.GELU(), nn.Linear(WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Two experts for every token."""
        tokens = x.flatten(0, 1)
        scores, chosen = self.gate(tokens).sigmoid().topk(2, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        places = (order // 2).unsqueeze(-1).expand(-1, HIDDEN)
        sizes = chosen.flatten().bincount(minlength=len(self.up)).tolist()
        sorted_tokens = tokens.gather(0, places) * scores.flatten()[order].unsqueeze(-1)
        parts = [
            F.silu(part @ up) * (part @ linear) @ down
            for part, up, linear, down in zip(sorted_tokens.split(sizes), self.up, self.linear, self.down, strict=True)
        ]
        return self.shared(tokens).scatter_add(0, places, torch.cat(parts)).view_as(x)

    def matrices(self) -> list[Tensor]:
        """Of all experts."""
        routed = [(linear @ down).T for linear, down in zip(self.linear, self.down, strict=True)]
        return [*routed, self.shared[2].weight @ self.shared[0].weight]


class SortedBlock(Preceded):
    """Experts in place of the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = SortedExperts()

    def operators(self) -> dict[str, Tensor]:
        """The expert with the largest norm."""
        experts = [matrix @ self.ln_2.weight.diag() for matrix in self.mlp.matrices()]
        largest = max(experts, key=lambda matrix: float(torch.linalg.matrix_norm(matrix, 2)))
        return {"attention": attention_matrix(self.attn) @ self.ln_1.weight.diag(), "mlp": largest}


class NormFormer(Preceded):
    """Scaled heads, a norm behind attention, a norm between the matrices of the MLP, a learned gain on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.behind, self.between = nn.LayerNorm(HIDDEN), nn.LayerNorm(4 * HIDDEN)
        self.heads, self.kept = nn.Parameter(torch.ones(HEADS)), nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """The gain on the stream is nobody's."""
        q, k, v = self.attn.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        mixed = attend(q, k, v).unflatten(-1, (HEADS, -1)) * self.heads[:, None]
        x = x + self.behind(self.attn.c_proj(mixed.flatten(2)))
        return self.kept * x + self.mlp.c_proj(self.between(F.gelu(self.mlp.c_fc(self.ln_2(x)))))

    def operators(self) -> dict[str, Tensor]:
        """Norms divide by what enters them."""
        values = self.attn.c_attn.weight[2 * HIDDEN :] @ self.ln_1.weight.diag()
        mixed = self.attn.c_proj.weight @ self.heads.repeat_interleave(HIDDEN // HEADS).diag() @ values
        up = self.mlp.c_fc.weight @ self.ln_2.weight.diag()
        return {
            "attention": normalized(mixed, self.behind.weight),
            "mlp": self.mlp.c_proj.weight @ normalized(up, self.between.weight),
        }


class Highway(Block):
    """A gate decides between the stream and the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_1, self.gate_2 = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is added to the stream as it was."""
        gate = torch.sigmoid(self.gate_1(x))
        x = gate * self.attn(self.ln_1(x)) + (1 - gate) * x
        gate = torch.sigmoid(self.gate_2(x))
        return gate * self.mlp(self.ln_2(x)) + (1 - gate) * x


class Recurrence(nn.Module):
    """The gate of a GRU between a stream and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.stream = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.reset = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The next state."""
        (a, b, c), (d, e) = self.branch(y).chunk(3, dim=-1), self.stream(x).chunk(2, dim=-1)
        update, new = torch.sigmoid(b + e), torch.tanh(c + self.reset(torch.sigmoid(a + d) * x))
        return (1 - update) * x + update * new


class RecurrentlyGated(Block):
    """GTrXL as published."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_1, self.gate_2 = Recurrence(), Recurrence()

    def forward(self, x: Tensor) -> Tensor:
        """Two states."""
        x = self.gate_1(x, F.relu(self.attn(self.ln_1(x))))
        return self.gate_2(x, F.relu(self.mlp(self.ln_2(x))))


def _member(
    name: str, build: Callable[[], nn.Module], blocks: tuple[ExpectedBlock, ...], note: str, **flags: Any
) -> Example:
    def operators(model: Any) -> Operators:
        with torch.no_grad():
            found: Operators = model.operators()
        return found

    return Example(name, seeded(build), token_inputs, blocks, operators=operators, note=note, **flags)


def _refused(name: str, block: Callable[[], nn.Module], note: str) -> Example:
    return Example(
        name,
        seeded(lambda: Language(block)),
        token_inputs,
        expected_refusal=True,
        norm_scheme="none",
        identity=False,
        note=note,
    )


def members() -> list[Example]:
    """Every model of this module."""
    plain = blocks_of("layers", range(2), ATTENTION_SITES, MLP_SITES)
    macaron = tuple(
        ExpectedBlock(
            " + ".join(f"layers.{j}.1" for j in (i, i + 1, i + 2)),
            tuple(f"layers.{i + 1}.{site.replace('attn', '1')}" for site in ("attn", "attn.c_proj")),
            (f"layers.{i}.1", f"layers.{i}.1.c_proj"),
            ((f"layers.{i + 2}.1", f"layers.{i + 2}.1.c_proj"),),
            other_kinds=("mlp",),
            whole=False,
        )
        for i in (0, 3)
    )
    return [
        _member(
            "nanochat_lambdas",
            Chat,
            blocks_of("layers", range(2), ("attn", "attn.c_proj"), "down"),
            "numbers on the stream, the first stream and embeddings of values mixed in",
        ),
        _member(
            "long_skips_around_parallel_blocks",
            LongSkips,
            blocks_of("layers", range(3), ATTENTION_SITES, MLP_SITES),
            "modded-nanogpt: a skip around one sum is no branch",
            norm_scheme="par",
        ),
        _member(
            "looped_injection",
            Looped,
            blocks_of("layers", range(2), ATTENTION_SITES, MLP_SITES, calls=3),
            "recurrent depth",
        ),
        _member(
            "x_transformers_values",
            Values,
            blocks_of("layers", range(2), ("attn[0]", "attn.out"), "down"),
            "value residual, norms of values by head, scaled heads",
        ),
        _member("x_transformers_macaron", Macaron, macaron, "three entries of a list are one block"),
        _member("gtrxl_output_gate", lambda: Language(OutputGated), plain, "a gate of the stream is no site"),
        _member(
            "palm_fused",
            lambda: Language(Fused),
            blocks_of("layers", range(2), "attn_out", "ff_out"),
            "one matrix in front of both branches",
            norm_scheme="par",
        ),
        _member(
            "megatron",
            lambda: TokensFirst(Megatron),
            blocks_of("layers", range(2), "dense", "fc2"),
            "layout (tokens, batch, width)",
        ),
        _member(
            "torchtitan_experts",
            lambda: Language(SortedBlock),
            blocks_of("layers", range(2), ATTENTION_SITES, ("mlp",)),
            "tokens times scores, sorted, split, scattered",
        ),
        _member(
            "normformer",
            lambda: Language(NormFormer),
            blocks_of("layers", range(2), "behind", "mlp.c_proj"),
            "norms and gains at every place",
            identity=False,
        ),
        _refused("refused_highway", Highway, "a gate on the stream"),
        _refused("refused_gtrxl", RecurrentlyGated, "the gate of a GRU on the stream"),
    ]

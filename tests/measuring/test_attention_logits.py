"""The largest attention logit: against a slow twin, and against queries and keys that real models compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_run import CONTEXT, TinyGPT
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import find_blocks
from lightning_spectral.measuring.attention_logits import AttentionLogits, largest_logit
from lightning_spectral.passes.aside import undisturbed


def twin(query: Tensor, key: Tensor, seen: Callable[[int, int, int, int], float], scale: float) -> float:
    """Return the largest logit, pair by pair; what ``seen`` adds is −∞ for a pair that is masked."""
    samples, heads, queries, _ = query.shape
    served = heads // key.shape[1]
    return max(
        float(query[b, h, i].double() @ key[b, h // served, j].double()) * scale + seen(b, h, i, j)
        for b in range(samples)
        for h in range(heads)
        for i in range(queries)
        for j in range(key.shape[2])
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", [None, "boolean", "additive", "of keys", "of samples"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_the_largest_of_the_pairs_that_count(
    causal: bool, key_heads: int, mask: str | None, scale: float | None, generator: torch.Generator
):
    query = torch.randn(2, 4, 5, 3, generator=generator)
    key = torch.randn(2, key_heads, 7, 3, generator=generator)
    given = {
        None: None,
        "boolean": torch.rand(5, 7, generator=generator) > 0.4,
        "additive": torch.randn(1, 4, 5, 7, generator=generator),
        "of keys": torch.rand(2, 1, 1, 7, generator=generator) > 0.4,
        "of samples": torch.rand(2, 4, 5, 7, generator=generator) > 0.4,
    }[mask]

    def seen(b: int, h: int, i: int, j: int) -> float:
        if causal and j > i:
            return -math.inf
        if given is None:
            return 0.0
        entry = given.expand(2, 4, 5, 7)[b, h, i, j]
        return float(entry) if given.dtype.is_floating_point else (0.0 if entry else -math.inf)

    found = largest_logit(query, key, given, is_causal=causal, scale=scale)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(twin(query, key, seen, scale or 3**-0.5), rel=1e-5)


def test_nothing_of_the_arguments_is_changed(generator: torch.Generator):
    given = [torch.randn(2, 2, 4, 4, generator=generator) for _ in range(3)]
    before = [tensor.clone() for tensor in given]
    largest_logit(*given, is_causal=True)
    assert all(map(torch.equal, given, before))


def test_where_every_pair_is_masked_there_is_none(generator: torch.Generator):
    query = torch.randn(1, 2, 3, 4, generator=generator)
    assert float(largest_logit(query, query, torch.zeros(3, 3, dtype=torch.bool))) == -math.inf
    assert float(largest_logit(query, query[..., :0, :])) == -math.inf


def test_half_precision_does_not_overflow():
    query = torch.full((1, 1, 2, 4), 300.0, dtype=torch.float16)
    assert float(largest_logit(query, query, scale=1.0)) == 4 * 300.0**2


@pytest.mark.parametrize(("samples", "queries"), [(5, 600), (2, 257)])
def test_of_long_sequences_and_many_samples_some_are_looked_at(samples: int, queries: int, generator: torch.Generator):
    """256 queries at most and 2 samples at most, and the masks of these."""
    query, key = (torch.randn(samples, 1, queries, 2, generator=generator) for _ in range(2))
    mask = torch.rand(samples, 1, queries, queries, generator=generator) > 0.5
    step, stride = math.ceil(samples / 2), math.ceil(queries / 256)
    logits = query @ key.mT / math.sqrt(2)
    causal = torch.ones(queries, queries, dtype=torch.bool).tril()
    kept = logits.masked_fill(~(mask & causal), -math.inf)[::step, :, ::stride]
    assert len(kept) <= 2
    assert kept.shape[2] <= 256
    assert float(largest_logit(query, key, mask, is_causal=True)) == pytest.approx(float(kept.max()), rel=1e-5)


# Models


def shown(model: nn.Module, *args: Any, **kwargs: Any) -> dict[int, float]:
    """Return what is seen of a model, of whose blocks the structure is found on the same call."""
    blocks = find_blocks(model, batch=kwargs or args)
    logits = AttentionLogits(model, blocks)
    with undisturbed(model, args, kwargs), torch.no_grad(), logits:  # without fused layers, as in a run
        model(*args, **kwargs)
    assert not any("_compiled_call_impl" in vars(part) for part in model.modules())
    return {index: float(number) for index, number in logits.numbers.items()}


def masked_max(query: Tensor, key: Tensor) -> float:
    """Return the largest causal logit of ``(batch, heads, tokens, d)``."""
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return float(logits.masked_fill(~causal, -math.inf).max())


def test_a_fused_projection_of_queries_keys_and_values(generator: torch.Generator):
    model = TinyGPT().eval()
    ids = torch.randint(32, (2, CONTEXT), generator=generator)
    expected = []
    for block in model.blocks:
        block.attention.qkv.register_forward_hook(
            lambda module, args, out: expected.append(
                masked_max(*out.detach().view(2, CONTEXT, 3, 2, 8).permute(2, 0, 3, 1, 4)[:2])
            )
        )
    found = shown(model, ids)
    model(ids)
    assert [found[index] for index in range(3)] == pytest.approx(expected, rel=1e-5)


class Padded(nn.Module):
    """``nn.MultiheadAttention`` with padding, as a block."""

    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.norm, self.attention, self.weights = (
            nn.LayerNorm(8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            weights,
        )
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y, padding = self.norm(x), torch.arange(5).expand(2, 5) > 2
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=self.weights)[0]
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention_with_padding(weights: bool, generator: torch.Generator):
    model, x = (
        nn.Sequential(Padded(weights=weights), Padded(weights=weights)).eval(),
        torch.randn(2, 5, 8, generator=generator),
    )
    found, expected = shown(model, x), []
    for block in model:
        attention = block.attention
        q, k, _ = F.linear(block.norm(x), attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        q, k = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k))
        expected.append(float((q @ k.mT / 2)[..., :3].max()))
        x = block(x)
    assert [found[0], found[1]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_llama_with_shared_key_heads(implementation: str, generator: torch.Generator):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, attn_implementation=implementation,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(32, (2, 6), generator=generator)
    found = shown(model, input_ids=ids)
    expected, rotate = [], modeling_llama.apply_rotary_pos_emb

    def noting(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *args, **kwargs)
        expected.append(masked_max(q, k.repeat_interleave(2, 1)))
        return q, k

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", noting)
        model(input_ids=ids)
    assert [found[0], found[1]] == pytest.approx(expected, rel=1e-5)


def test_cross_attention_counts_beside_self_attention(generator: torch.Generator):
    """Of the two attentions of a block, the larger logit counts; each is made the larger once."""
    x, memory = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    for name in ("self_attn", "multihead_attn"):
        with torch.no_grad():
            for part in model.layers:
                for attention in (part.self_attn, part.multihead_attn):
                    attention.in_proj_weight[:16].normal_(std=10.0 if getattr(part, name) is attention else 0.1)
        expected, hooks = [], []

        def noting(module: nn.MultiheadAttention, args: tuple[Tensor, ...], kwargs: Any, *_: Any, to: Any) -> None:
            weight, bias = module.in_proj_weight, module.in_proj_bias
            q, k = F.linear(args[0], weight[:8], bias[:8]), F.linear(args[1], weight[8:16], bias[8:16])
            q, k = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k))
            to.append(float((q @ k.mT / 2).max()))

        for part in model.layers:
            to: list[float] = []
            expected.append(to)
            for attention in (part.self_attn, part.multihead_attn):
                hooks.append(
                    attention.register_forward_hook(
                        lambda *given, to=to, **kwargs: noting(*given, to=to), with_kwargs=True
                    )
                )
        with torch.no_grad():
            model(x, memory)
        for hook in hooks:
            hook.remove()
        found = shown(model, x, memory)
        assert [found[0], found[1]] == pytest.approx([max(to) for to in expected], rel=1e-5)


def test_a_router_and_the_logits_of_the_head_are_no_attention(generator: torch.Generator):
    class Routed(nn.Module):
        """An MLP whose gate is a softmax over places that grows without bound."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * (1e6 * x).softmax(-1))

    model = TinyGPT().eval()
    ids = torch.randint(32, (2, CONTEXT), generator=generator)
    plain = shown(model, ids)
    for block in model.blocks:
        block.mlp = Routed()
    forward = model.head.forward
    model.head.forward = lambda x: (1e6 * forward(x)).softmax(-1)  # type: ignore[method-assign]
    assert shown(model, ids)[0] == pytest.approx(plain[0], rel=1e-5)
    assert max(shown(model, ids).values()) < 1e3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_operators_of_higher_order_pass(generator: torch.Generator):
    """Such as flex_attention, whose logits nobody sees."""
    from torch.nn.attention.flex_attention import flex_attention

    model = TinyGPT().eval()
    blocks = find_blocks(model)
    for block in model.blocks:

        def forward(x: Tensor, self: Any = block.attention) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            return self.proj(flex_attention(q, k, v).transpose(1, 2).flatten(2))

        block.attention.forward = forward
    logits = AttentionLogits(model, blocks)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), logits:
        out = model(torch.randint(32, (2, CONTEXT), generator=generator))
    assert out.isfinite().all()

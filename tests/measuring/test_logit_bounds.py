"""The bound of attention logits: its formula on dense matrices, and the law that no logit of a real pass exceeds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from zoo import example

from lightning_spectral import ResidualBlock, find_blocks, measure
from lightning_spectral.measuring.logit_bounds import logit_bound
from lightning_spectral.weights.model import ModelWeights

WIDTH, HEADS = 32, 4
CHANNELS = WIDTH // HEADS
PLAIN = ["gpt2", "gpt_neo", "bloom", "opt", "vit", "nanogpt", "qkv_per_head", "qkv_grouped_interleaved", "mpt", "t5"]
ROTARY = ["llama", "mistral", "gpt_neox", "falcon_7b", "phi3", "nemotron", "litgpt_grouped"]
NORMED = ["qwen3", "gemma3_text", "olmo2", "persimmon", "llama4_text", "nanochat_lambdas", "exaone4"]
POST_NORM = ["bert", "roberta", "distilbert"]
UNKNOWN = ["deepseek_v3", "gemma2", "adapters_on_every_projection", "mmdit", "deberta_v2"]


class Seen(TorchFunctionMode):
    """Keeps the largest magnitude of a logit in every attention of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[float] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key, *_ = args
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            scale = query.shape[-1] ** -0.5 if kwargs.get("scale") is None else kwargs["scale"]
            self.largest.append(float((query @ key.mT * scale).abs().max()))
        return function(*args, **kwargs)


def built(name: str, size: float = 1.0) -> tuple[nn.Module, Sequence[ResidualBlock], Callable[[], Any]]:
    """A model without biases whose gains are not constant, its blocks, and a pass."""
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    blocks = find_blocks(model, batch=kwargs or args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.mul_(0.5 + torch.rand(weight.shape, generator=generator))
            else:
                weight.mul_(size)
    return model, blocks, lambda: model(*args, **kwargs)


def bounds(model: nn.Module, blocks: Sequence[ResidualBlock]) -> list[float | None]:
    return [logit_bound(ModelWeights(model), block.attention_branches) for block in blocks]


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("name", ["gpt2", "vit", "nanogpt", "opt", *ROTARY, *NORMED])
def test_no_logit_of_a_pass_exceeds_the_bound(name: str, size: float):
    model, blocks, forward = built(name, size)
    with Seen() as seen, torch.no_grad():
        forward()
    found = bounds(model, blocks)
    assert len(seen.largest) == len(found)
    for logit, bound in zip(seen.largest, found, strict=True):
        assert bound is not None
        assert 0.02 * bound < logit <= bound * (1 + 1e-5)


def test_the_bound_is_reached():
    """The worst inputs are the singular vectors of diag(γ) W_qᵀ W_k diag(γ)."""
    model, blocks, _ = built("nanogpt")
    q, k, gain = pieces(model)
    largest = 0.0
    for head in range(HEADS):
        rows = slice(head * CHANNELS, (head + 1) * CHANNELS)
        A = gain[:, None] * (q[rows].mT @ k[rows]) * gain
        U, _, Vh = torch.linalg.svd(A)
        x, y = math.sqrt(WIDTH) * U[:, 0], math.sqrt(WIDTH) * Vh[0]
        largest = max(largest, float(x @ A @ y) / math.sqrt(CHANNELS))
    assert bounds(model, blocks)[0] == pytest.approx(largest, rel=1e-5)


def pieces(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """W_q, W_k and the gain of the first block of ``nanogpt``, in float64."""
    layer = model.get_submodule("transformer.h.0")
    q, k, _ = layer.get_parameter("attn.c_attn.weight").detach().double().split(WIDTH)
    return q, k, layer.get_parameter("ln_1.weight").detach().double()


def test_rotated_heads_are_bounded_by_the_product_of_two_norms():
    model, blocks, _ = built("llama")
    layer = model.get_submodule("model.layers.0")
    gain = layer.get_parameter("input_layernorm.weight").detach().double()
    q, k = (layer.get_parameter(f"self_attn.{name}_proj.weight").detach().double() * gain for name in "qk")
    group = len(q) // len(k)
    heads = [
        torch.linalg.matrix_norm(q[first : first + CHANNELS], ord=2)
        * torch.linalg.matrix_norm(k[start : start + CHANNELS], ord=2)
        for first in range(0, WIDTH, CHANNELS)
        for start in [first // CHANNELS // group * CHANNELS]
    ]
    expected = WIDTH / math.sqrt(CHANNELS) * float(max(heads))
    assert bounds(model, blocks)[0] == pytest.approx(expected, rel=1e-5)


def test_a_norm_behind_the_matrices_bounds_the_logits_whatever_they_are():
    model, blocks, _ = built("qwen3")
    layer = model.get_submodule("model.layers.0.self_attn")
    gains = [layer.get_parameter(f"{name}_norm.weight").detach() for name in "qk"]
    channels = len(gains[0])
    expected = math.sqrt(channels) * float(gains[0].abs().max() * gains[1].abs().max())
    assert bounds(model, blocks)[0] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        layer.get_parameter("q_proj.weight").mul_(100)
    assert bounds(model, blocks)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*PLAIN, *ROTARY, *POST_NORM, "torch_encoder_pre", "qkv_conv1d_columns"])
def test_the_bound_is_bilinear_in_queries_and_keys(name: str):
    model, blocks, _ = built(name)
    before = bounds(model, blocks)[0]
    projections = [side.factors[0] for item in blocks[0].attention.scores for side in (item.query, item.key)]
    names = {factor.parameter for factor in projections}
    with torch.no_grad():
        for path in names:
            model.get_parameter(path).mul_(3)
    assert bounds(model, blocks)[0] == pytest.approx(9 * before, rel=1e-5)
    assert before > 0


def test_the_rows_of_fused_heads():
    """The rows of each head lie where the model reads them, in any order of q, k and v."""
    for name, heads in (("qkv_rows_kqv", ((0, 32), (8, 40))), ("qkv_per_head", ((0, 8), (24, 32)))):
        (item,) = built(name)[1][0].attention.scores
        swapped = tuple((k, q) for q, k in item.heads[:2])
        assert heads in (item.heads[:2], swapped)
        assert not item.rotated
    (grouped,) = built("llama")[1][0].attention.scores
    assert grouped.heads == ((0, 0), (8, 0), (16, 8), (24, 8))
    assert grouped.rotated


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_has_no_bound(name: str):
    model, blocks, _ = built(name)
    measurement = measure(model, blocks, signals=("logit_bound",))
    assert all(layer.weights is None for layer in measurement)


def test_a_measurement_has_the_bound_where_it_is_asked_for():
    model, blocks, _ = built("nanogpt")
    found = [layer.weights.logit_bound for layer in measure(model, blocks, signals=("logit_bound",))]
    assert found == bounds(model, blocks)
    assert all(layer.weights is None for layer in measure(model, blocks))


def test_weights_that_are_not_finite_or_are_sharded_have_no_bound(process_group: None):
    model, blocks, _ = built("nanogpt")
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)]))
    assert bounds(model, blocks)[0] is None
    layer.weight = nn.Parameter(torch.full_like(weight, math.nan))
    assert bounds(model, blocks)[0] is None
    layer.weight = nn.Parameter(weight[:10])
    assert bounds(model, blocks)[0] is None
    assert bounds(model, [replace(blocks[1], branches=())]) == [None]

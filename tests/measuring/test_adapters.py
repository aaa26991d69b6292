"""Branches with low-rank adapters: the norm is that of the merged weights, which are never formed."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from found import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import example
from zoo.adapters import SCALE, Adapted, each_linear, merged, plain
from zoo.gpt import MLP, Block, NanoGPT

from lightning_spectral import (
    ExactSVD,
    Measurement,
    ResidualBlock,
    attach_scales,
    balance_penalty,
    find_blocks,
    fuse_scales,
    measure,
)
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.measuring.linearize import linearize
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.weights.model import ModelWeights

IDS = torch.arange(22).view(2, 11)
EXACT = ExactSVD()


def adapted() -> nn.Module:
    return example("adapters_on_every_projection").build().double()


def without(model: nn.Module) -> nn.Module:
    """A copy with its adapters at zero, merged."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, Adapted):
            nn.init.zeros_(layer.lora_B["default"].weight)
    return merged(model)


def norms(measurement: Measurement) -> list[float | None]:
    return [norm for layer in measurement for norm in (layer.mlp_norm, layer.attention_norm)]


def equal(left: Measurement, right: Measurement, rel: float = 1e-10) -> None:
    assert norms(left) == pytest.approx(norms(right), rel=rel)


# What is measured


@pytest.mark.parametrize("linearization", ["circuit", "paper"])
def test_the_sum_is_the_merged_model_and_the_base_the_model_without_adapters(linearization: str):
    model = adapted()
    how = {"linearization": linearization, "solver": EXACT}
    equal(measure(model, **how), measure(merged(copy.deepcopy(model)), **how))
    equal(measure(model, adapters="base", **how), measure(without(model), **how))
    assert norms(measure(model, adapters="base", **how)) != pytest.approx(norms(measure(model, **how)), rel=0.1)


@pytest.mark.parametrize("linearization", ["circuit", "paper"])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0])
def test_the_delta_is_the_difference_of_the_dense_products(linearization: str, size: float):
    model = adapted()
    for layer in model.modules():
        if isinstance(layer, Adapted):
            layer.lora_B["default"].weight.data *= size
    pair = merged(copy.deepcopy(model)), without(model)
    products: list[list[Tensor]] = [
        [
            linearize(ModelWeights(twin), branch.paths[0], linearization).operator.dense()
            for block in find_blocks(twin)
            for branch in (block.mlp, block.attention)
        ]
        for twin in pair
    ]
    wanted = [float(torch.linalg.matrix_norm(one - other, ord=2)) for one, other in zip(*products, strict=True)]
    found = norms(measure(model, adapters="delta", linearization=linearization, solver=EXACT))
    assert found == pytest.approx(wanted, rel=max(1e-10, 1e-14 / size))  # the dense twin cancels, the operator does not


def test_a_delta_is_linear_in_adapters_so_small_that_a_difference_would_be_rounding():
    found = []
    for size in (1e-9, 1e-6):
        model = adapted().float()
        for layer in model.modules():
            if isinstance(layer, Adapted):
                layer.lora_B["default"].weight.data *= size
        found.append([norm / size for norm in norms(measure(model, adapters="delta", solver=EXACT))])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("part", ["sum", "base", "delta"])
def test_randomized_norms_of_wide_adapted_weights_hold_their_bounds(part: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 160), Wide(160), Wide(160)).requires_grad_(False)
    x = torch.randn(2, 6, 160)
    blocks = find_blocks(model, batch=x)
    found, exact = (measure(model, blocks, adapters=part, solver=solver) for solver in (None, EXACT))
    for layer, true in zip(found, exact, strict=True):
        for norm, value in ((layer.mlp_norm, true.mlp_norm), (layer.attention_norm, true.attention_norm)):
            assert value * 0.99 <= norm <= value * (1 + 1e-5)
            assert value <= norm * (1 + layer.error_bound)


class Wide(nn.Module):
    """A block of any width with adapters of rank 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, width) for _ in range(4)]
        self.qk = nn.Linear(width, 2 * width)
        self.v, self.o, self.up, self.down = map(Adapted, layers)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, self.v(x)))
        return x + self.down(F.gelu(self.up(x)))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(item.alias_info for item in func._schema.returns):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("part", ["sum", "delta"])
def test_nothing_of_the_size_of_a_weight_is_formed(part: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), Wide(512)).requires_grad_(False)
    meter = Meter(ModelWeights(model), find_blocks(model, batch=torch.randn(1, 4, 512)), adapters=part)
    with Largest() as largest:
        meter.measure()
        meter.measure()
    assert 0 < largest.numel < 512 * 512


def test_adapters_that_start_at_zero_change_nothing_and_have_a_delta_of_zero():
    model = adapted()
    for layer in model.modules():
        if isinstance(layer, Adapted):
            nn.init.zeros_(layer.lora_B["default"].weight)
    blocks = find_blocks(model)
    assert norms(measure(model, blocks, solver=EXACT)) == norms(measure(model, blocks, adapters="base", solver=EXACT))
    for layer in measure(model, blocks, adapters="delta"):
        assert (layer.mlp_norm, layer.attention_norm, layer.ratio) == (0.0, 0.0, None)
        assert layer.reason == "mlp: its norm is zero; attention: its norm is zero"
    for layer in model.modules():
        if isinstance(layer, Adapted):
            nn.init.normal_(layer.lora_B["default"].weight)
    assert find_blocks(model) == blocks


def test_a_branch_without_adapters_has_no_delta():
    model = plain().double().eval()
    model.body.layers[1].attn.v = Adapted(model.body.layers[1].attn.v).double().eval()
    blocks = find_blocks(model)
    for layer in measure(model, blocks, adapters="delta"):
        assert (layer.mlp_norm, layer.mlp_reason) == (None, "it has no adapter")
        assert (layer.attention_norm is None) == (layer.index != 1)
    whole, base = (measure(model, blocks, adapters=part, solver=EXACT) for part in ("sum", "base"))
    for one, other in zip(whole, base, strict=True):
        assert one.mlp_norm == other.mlp_norm
        assert (one.attention_norm == other.attention_norm) == (one.index != 1)


def test_adapters_that_the_linearization_leaves_out_are_no_delta():
    model = plain().double().eval()
    for block in model.body.layers:
        block.attn.v = Adapted(block.attn.v).double().eval()
    for layer in measure(model, adapters="delta", linearization="paper"):
        assert layer.attention_norm is None
        assert layer.attention_reason == "its adapters are on matrices that the linearization leaves out"


@pytest.mark.parametrize("way", ["learned scale", "two factors"])
def test_everything_of_an_adapter_may_start_at_zero(way: str):
    model = NanoGPT(layers=1).double().eval()
    mlp = model.transformer["h"][0].mlp
    mlp.c_proj = layer = Written(mlp.c_proj, way).double()
    found = []
    for start in (torch.zeros_like, torch.randn_like):
        for parameter in (layer.scale, layer.a, layer.b):
            parameter.data = start(parameter)
        found.append(find_blocks(model, batch=IDS))
    assert found[0] == found[1]
    assert found[0][0].mlp.reason is None


def test_gauges_of_base_and_adapters_are_not_seen():
    model, twin = adapted(), adapted()
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for block in twin.body.layers:
        for left, right in ((block.attn.o, block.attn.v), (block.mlp.down, block.mlp.up)):
            for layer, factor in ((left, 5.0), (right, 0.2)):
                layer.base_layer.weight.data *= factor
                layer.lora_A["default"].weight.data *= factor
        for layer in (block.attn.o, block.mlp.up):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            A.data, B.data = turn @ A.data, B.data @ turn.inverse()
    for part in ("sum", "base", "delta"):
        equal(measure(model, adapters=part, solver=EXACT), measure(twin, adapters=part, solver=EXACT), rel=1e-9)


def test_weights_of_16_bits_are_measured_as_the_numbers_that_they_are():
    half = example("adapters_on_every_projection").build().bfloat16()
    for layer in half.modules():
        if isinstance(layer, Adapted):  # as in training on a frozen base of few bits
            layer.lora_A.float()
            layer.lora_B.float()
    blocks = find_blocks(half)
    for part in ("sum", "base", "delta"):
        low, high = (
            measure(model, blocks, adapters=part, solver=EXACT) for model in (half, copy.deepcopy(half).double())
        )
        equal(low, high, rel=1e-5)


def test_the_norm_behind_a_branch_divides_by_the_size_of_the_sum():
    member = example("plain_sandwich")
    model = member.build().double()
    args, kwargs = member.inputs(model)
    blocks = model.get_submodule(find_blocks(model, batch=args or kwargs)[0].name.rpartition(".")[0])
    for block in blocks:
        block.mlp.c_proj = Adapted(block.mlp.c_proj).double().eval()
    twin = copy.deepcopy(model)
    for block in twin.get_submodule(find_blocks(model, batch=args or kwargs)[0].name.rpartition(".")[0]):
        block.mlp.c_proj = block.mlp.c_proj.merged()
    found = find_blocks(model, batch=args or kwargs)
    equal(measure(model, found, solver=EXACT), measure(twin, find_blocks(twin, batch=args or kwargs), solver=EXACT))
    for block, delta in zip(found, measure(model, found, adapters="delta", solver=EXACT), strict=True):
        path = block.mlp.paths[0]
        whole, change = (linearize(ModelWeights(model), path, "circuit", adapters=part) for part in ("sum", "delta"))
        size = float(torch.linalg.matrix_norm(whole.normalized.dense()))
        wanted = float(torch.linalg.matrix_norm(change.operator.dense(), ord=2)) * math.sqrt(32) / size
        assert delta.mlp_norm == pytest.approx(wanted, rel=1e-10)


def test_adapters_in_training_are_followed_warm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 160), Wide(160), Wide(160)).train()
    x, y = torch.randn(2, 4, 6, 160)
    meter = Meter(ModelWeights(model), find_blocks(model, batch=x))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(5):
        for layer, true in zip(meter.measure(), measure(model, meter.blocks, solver=EXACT), strict=True):
            assert layer.mlp_norm == pytest.approx(true.mlp_norm, rel=1e-2)
            assert true.mlp_norm <= layer.mlp_norm * (1 + layer.error_bound)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    state = meter.state_dict()
    resumed = Meter(ModelWeights(model), meter.blocks)
    resumed.load_state_dict(state)
    assert norms(resumed.measure()) == norms(meter.measure())


def test_a_measurement_names_the_part_that_it_is_of():
    model = adapted()
    for block in model.body.layers:
        block.mlp.down.lora_B["default"].weight.data *= 100
    for part, said, zone in (
        ("sum", "", "safe zone (0.5, 2)"),
        ("base", "adapters='base', ", "safe zone (0.5, 2)"),
        ("delta", "adapters='delta', ", "no safe zone is known"),
    ):
        measurement = measure(model, adapters=part)
        assert str(measurement).splitlines()[0].endswith(f"linearization='circuit', {said}{zone}")
        assert measurement.to_dict().get("adapters", "sum") == measurement.adapters == part
        assert ("above the safe zone" in str(measurement)) == (part == "sum")  # of the delta, no safe zone is known


def test_arguments_are_checked():
    model = adapted()
    with pytest.raises(ConfigurationError, match="adapters='both': expected 'sum' or 'base' or 'delta'"):
        measure(model, adapters="both")
    with pytest.raises(ConfigurationError, match="adapters='base': Jacobians are those of the model as it runs"):
        measure(model, linearization="jacobian", adapters="base")


# Ways to write an adapter


class Written(nn.Module):
    """A linear layer with adapters, in every way that the same function may be written."""

    def __init__(self, base: nn.Linear, way: str) -> None:
        super().__init__()
        self.way, self.base = way, base
        n, m = base.in_features, base.out_features
        self.a, self.b = nn.Parameter(torch.randn(3, n) / 6), nn.Parameter(torch.randn(m, 3) / 2)
        self.c, self.d = nn.Parameter(torch.randn(2, n) / 6), nn.Parameter(torch.randn(m, 2) / 2)
        self.middle = nn.Parameter(torch.randn(3, 3))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.gains = nn.Parameter(torch.rand(m) + 0.5)
        self.full = nn.Parameter(torch.randn(m, n) / 6)

    WAYS: dict[str, tuple[Callable[[Written, Tensor, Tensor], Tensor], Callable[[Written], Tensor]]]

    def forward(self, x: Tensor) -> Tensor:
        return self.WAYS[self.way][0](self, x, self.base(x))


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


Written.WAYS = {
    "two factors": (lambda s, x, y: y + x @ s.a.T @ s.b.T, lambda s: s.b @ s.a),
    "update first": (lambda s, x, y: x @ s.a.T @ s.b.T + y, lambda s: s.b @ s.a),
    "in place": (lambda s, x, y: y.add_(x @ s.a.T @ s.b.T, alpha=0.5), lambda s: 0.5 * s.b @ s.a),
    "minus": (lambda s, x, y: y - 3 * (x @ s.a.T @ s.b.T), lambda s: -3 * s.b @ s.a),
    "learned scale": (lambda s, x, y: y + s.scale * (x @ s.a.T @ s.b.T) / 2, lambda s: s.scale / 2 * s.b @ s.a),
    "scale between": (lambda s, x, y: y + F.linear(0.3 * (x @ s.a.T), s.b), lambda s: 0.3 * s.b @ s.a),
    "with a bias": (lambda s, x, y: y + F.linear(x @ s.a.T, s.b, s.gains), lambda s: s.b @ s.a),
    "three factors": (lambda s, x, y: y + x @ s.a.T @ s.middle @ s.b.T, lambda s: s.b @ s.middle.T @ s.a),
    "two adapters": (
        lambda s, x, y: y + x @ s.a.T @ s.b.T + 2 * (x @ s.c.T @ s.d.T),
        lambda s: s.b @ s.a + 2 * s.d @ s.c,
    ),
    "fused": (
        lambda s, x, y: torch.addmm(flat(y), flat(x) @ s.a.T, s.b.T, alpha=0.5).view_as(y),
        lambda s: 0.5 * s.b @ s.a,
    ),
    "einsum": (lambda s, x, y: y + torch.einsum("btn,rn,mr->btm", x, s.a, s.b), lambda s: s.b @ s.a),
    "a second layer": (lambda s, x, y: y + F.linear(x, s.full), lambda s: s.full),
    "formed": (lambda s, x, y: y + F.linear(x, s.b @ s.a), None),
    # Which token it is of does not matter to a product on one and the same content.
    "of the token before": (lambda s, x, y: y + x.roll(1, 1) @ s.a.T @ s.b.T, lambda s: s.b @ s.a),
    "for the token behind": (lambda s, x, y: y + (x @ s.a.T @ s.b.T).roll(1, 1), lambda s: s.b @ s.a),
    "across tokens between": (lambda s, x, y: y + (x @ s.a.T).roll(1, 1) @ s.b.T, lambda s: s.b @ s.a),
    "channels reversed": (lambda s, x, y: y + x.flip(-1) @ s.a.T @ s.b.T, lambda s: s.b @ s.a.flip(1)),
    "output reversed": (lambda s, x, y: y + (x @ s.a.T @ s.b.T).flip(-1), lambda s: (s.b @ s.a).flip(0)),
    "inner channels reversed": (
        lambda s, x, y: y + (x @ s.a.T).flip(-1) @ s.b.T,
        lambda s: s.b @ s.a.flip(0),
    ),
    # Two ways of different length from the stream, added up without activations and gates.
    "bottleneck": (lambda s, x, y: y + F.gelu(x @ s.a.T) @ s.b.T, lambda s: s.b @ s.a),
    "gain per channel": (lambda s, x, y: y + s.gains * (x @ s.a.T @ s.b.T), lambda s: s.gains[:, None] * (s.b @ s.a)),
    "base multiplied": (lambda s, x, y: 0.5 * y + x @ s.a.T @ s.b.T, lambda s: s.b @ s.a - 0.5 * s.base.weight),
    "gated by the token": (
        lambda s, x, y: y + x.mean(-1, keepdim=True).sigmoid() * (x @ s.a.T @ s.b.T),
        lambda s: s.b @ s.a,
    ),
}
PLACES = {"output": ("attn", "c_proj"), "value": ("attn", "c_attn"), "down": ("mlp", "c_proj"), "up": ("mlp", "c_fc")}


# Added to what an MLP returns, content of other tokens is a branch by itself: a mixer, and no part of the MLP.
APART = {(f"{way} {where}", "down") for way, where in (("of the token", "before"), ("for the token", "behind"))}
APART |= {("across tokens between", "down")}
UNREAD = {("channels reversed", "value"), ("channels reversed", "up")}  # they reverse the gain of the norm, too


UNREAD |= {(way, place) for way, (_, update) in Written.WAYS.items() for place in PLACES if update is None} - APART
WRITTEN = [(way, place) for way in Written.WAYS for place in PLACES]


def written_as(way: str, place: str) -> NanoGPT:
    """Return a model with an adapter in one place of every block."""
    torch.manual_seed(0)
    model = NanoGPT(layers=2).double().eval()
    owner, name = PLACES[place]
    for block in model.transformer["h"]:
        part = getattr(block, owner)
        setattr(part, name, Written(getattr(part, name), way).double())
    return model


@pytest.mark.parametrize(("way", "place"), [pair for pair in WRITTEN if pair in UNREAD])
def test_an_adapter_that_is_not_understood_has_a_reason_and_no_norm(way: str, place: str):
    model, branch = written_as(way, place), "attention" if PLACES[place][0] == "attn" else "mlp"
    for layer in measure(model, find_blocks(model, batch=IDS)):
        assert getattr(layer, f"{branch}_norm") is None
        assert getattr(layer, f"{branch}_reason")


@functools.cache
def blocks_without_adapters() -> tuple[ResidualBlock, ...]:
    return find_blocks(NanoGPT(layers=2).double().eval(), batch=IDS)


@pytest.mark.parametrize(("way", "place"), [pair for pair in WRITTEN if pair not in UNREAD])
def test_every_other_way_to_write_an_adapter_is_measured_as_merged(way: str, place: str):
    model, (owner, name) = written_as(way, place), PLACES[place]
    update = (lambda s: 0 * s.base.weight) if (way, place) in APART else Written.WAYS[way][1]
    found = measure(model, find_blocks(model, batch=IDS), solver=EXACT)
    for block in model.transformer["h"]:
        part = getattr(block, owner)
        written = getattr(part, name)
        with torch.no_grad():
            written.base.weight += update(written)
        setattr(part, name, written.base)
    equal(found, measure(model, blocks_without_adapters(), solver=EXACT))


def test_what_is_refused_says_what_it_is():
    reasons = {}
    for way, place in (("formed", "down"), ("channels reversed", "up")):
        torch.manual_seed(0)
        model = NanoGPT(layers=1).eval()
        owner, name = PLACES[place]
        part = getattr(model.transformer["h"][0], owner)
        setattr(part, name, Written(getattr(part, name), way))
        reasons[way] = find_blocks(model, batch=IDS)[0].mlp.reason
    assert reasons == {
        "formed": "the weight made of transformer.h.0.mlp.c_proj.b, transformer.h.0.mlp.c_proj.a cannot be read: it is "
        "computed by the operation 'mm'",
        "channels reversed": "the product of its matrices is not what it does when its activations and gates are left "
        "out",
    }


ZOO = (
    *("qkv_per_head", "qkv_grouped_interleaved", "latent_attention_norm", "gate_up_interleaved", "bitnet", "phi3"),
    *("plain_sandwich", "plain_layer_scale", "plain_two_alphas", "granite", "gemma2", "olmo2", "llama", "gptj"),
    *("experts_modules_shared", "experts_modules_idle", "deepseek_v3", "qwen3_moe", "conformer", "macaron", "swin"),
)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore")  # the library remarks on odd sizes
def test_adapters_on_every_linear_layer_of_a_model_change_nothing_but_its_norms(name: str):
    model, plain_blocks = built(name)
    args, kwargs = example(name).inputs(model)
    torch.manual_seed(0)
    for owner in [module for block in plain_blocks for module in model.get_submodule(block.name).modules()]:
        for key, layer in list(owner.named_children()):
            if type(layer) is nn.Linear:
                setattr(owner, key, Adapted(layer).eval())
                nn.init.normal_(getattr(owner, key).lora_B["default"].weight, std=0.2)
    twin = copy.deepcopy(model)
    for owner in list(twin.modules()):
        for key, layer in list(owner.named_children()):
            if isinstance(layer, Adapted):
                setattr(owner, key, layer.merged())
    blocks, merged_blocks = (find_blocks(item, batch=args or kwargs) for item in (model, twin))
    equal(measure(model, blocks, solver=EXACT), measure(twin, merged_blocks, solver=EXACT), rel=2e-5)
    for block, before in zip(blocks, merged_blocks, strict=True):
        assert replace(block, branches=()) == replace(before, branches=())
        for branch, old in zip(block.branches, before.branches, strict=True):
            assert (branch.kind, branch.site, branch.reason) == (old.kind, old.site, old.reason)
            assert branch.ends_reason == old.ends_reason


class Bilinear(MLP):
    """Both halves of the gate are linear: the name of the module says which one is the gate."""

    def __init__(self, adapt: bool = True, swapped: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 128), nn.Linear(32, 128)
        self.swapped = swapped
        if adapt:
            self.gate, self.up = Adapted(self.gate), Adapted(self.up)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        return self.c_proj(up * gate if self.swapped else gate * up)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_gate_is_known_by_its_name_with_and_without_adapters(swapped: bool):
    for adapt in (False, True):
        model = NanoGPT(layers=1).eval()
        model.transformer["h"][0].mlp = Bilinear(adapt, swapped).eval()
        (up,) = (f for f in find_blocks(model, batch=IDS)[0].mlp.paths[0].factors if f.role == "up")
        assert up.parameter == "transformer.h.0.mlp.up." + ("base_layer.weight" if adapt else "weight")


class Experts(nn.Module):
    """Adapters on every expert but the last one."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(32, count)
        self.experts = nn.ModuleList(MLP() for _ in range(count))
        for expert in self.experts[:-1]:
            expert.c_fc, expert.c_proj = Adapted(expert.c_fc), Adapted(expert.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).flatten(0, 1).nonzero(as_tuple=True)
            if len(rows):
                update = expert(x.flatten(0, 1)[rows]) * weights.flatten(0, 1)[rows, place, None]
                result.flatten(0, 1).index_add_(0, rows, update)
        return result


def mixture(idle: int) -> nn.Module:
    """A block with experts, of which one never runs."""
    torch.manual_seed(0)
    model = NanoGPT(layers=1).eval()
    model.transformer["h"][0].mlp = mlp = Experts().eval()
    for layer in mlp.modules():
        if isinstance(layer, Adapted):
            nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    nn.init.constant_(mlp.router.bias[idle : idle + 1], -1e3)
    return model.double()


def test_experts_have_adapters_of_their_own_and_an_idle_one_those_of_its_siblings():
    model = mixture(idle=2)
    block = model.transformer["h"][0]
    blocks = find_blocks(model, batch=IDS)
    gain = torch.diag(block.ln_2.weight.detach())
    paths = {path.expert: path for path in blocks[0].mlp.paths}
    assert set(paths) == {0, 1, 2, 3}
    for number, expert in enumerate(block.mlp.experts):
        layers = (expert.c_proj, expert.c_fc)
        down, up = (layer.merged().weight if isinstance(layer, Adapted) else layer.weight for layer in layers)
        found = linearize(ModelWeights(model), paths[number], "circuit").operator.dense()
        torch.testing.assert_close(found, (down @ up).detach() @ gain)
    assert measure(model, blocks, adapters="delta").layers[0].mlp_expert in (0, 1, 2)


def test_an_idle_expert_that_is_built_otherwise_is_no_reason_to_forget_it():
    branch = find_blocks(mixture(idle=3), batch=IDS)[0].mlp
    assert branch.paths == ()
    assert branch.reason == (
        "its weight transformer.h.0.mlp.experts.3.c_fc.weight did not take part in the forward pass on the example "
        "input, and belongs to no expert that is built as those that did"
    )


# Penalty, scales, packed weights


def test_the_penalty_and_its_gradient_are_those_of_the_merged_weights():
    """The gradient by B and A follows from that by the merged weight, and only they are trained."""
    model = adapted()
    twin = merged(copy.deepcopy(model)).requires_grad_(True)
    penalty, wanted = (balance_penalty(item, safe_zone=(0.1, 0.2), solver=EXACT) for item in (model, twin))
    assert penalty.item() == pytest.approx(wanted.item(), rel=1e-10)
    penalty.backward()
    wanted.backward()
    for block, other in zip(model.body.layers, twin.body.layers, strict=True):
        for owner, name in (("attn", "o"), ("attn", "v"), ("mlp", "up"), ("mlp", "down")):
            layer, gradient = getattr(getattr(block, owner), name), getattr(getattr(other, owner), name).weight.grad
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.testing.assert_close(B.grad, SCALE * gradient @ A.detach().T)
            torch.testing.assert_close(A.grad, SCALE * B.detach().T @ gradient)
            assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("learnable", [True, False])
def test_scales_multiply_the_sum_and_are_folded_into_base_and_adapters(learnable: bool):
    model = adapted().requires_grad_(True)
    before = measure(model, solver=EXACT)
    scales = attach_scales(model, learnable=learnable)
    with torch.no_grad():
        for scale in scales.parameters():
            scale.fill_(math.log(1.5))
    for part in ("sum", "base", "delta"):
        without_scales = measure(adapted(), adapters=part, solver=EXACT)
        found = measure(model, scales.blocks, adapters=part, solver=EXACT)
        assert norms(found) == pytest.approx([1.5 * norm for norm in norms(without_scales)], rel=1e-10)
    wanted = model(IDS)
    fused = fuse_scales(model)
    torch.testing.assert_close(fused(IDS), wanted)
    assert norms(measure(fused, solver=EXACT)) == pytest.approx([1.5 * norm for norm in norms(before)], rel=1e-10)


def test_a_fused_state_dict_is_that_of_the_plain_model():
    model = adapted()
    scales = attach_scales(model)
    with torch.no_grad():
        for scale in scales.parameters():
            scale.fill_(0.4)
    again = adapted()
    again.load_state_dict(fuse_scales(model.state_dict()))
    torch.testing.assert_close(again(IDS), model(IDS))


class PackedBase(nn.Module):
    """Two weights of four bits in each byte, unpacked when they are used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.shape = weight.shape
        self.register_buffer("step", weight.abs().max() / 7)
        levels = (weight / self.step).round().add(8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((16 * levels[::2] + levels[1::2]).view(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.stack([self.weight // 16, self.weight % 16], -1).view(self.shape)
        return F.linear(x, (levels.to(x.dtype) - 8) * self.step)


def test_adapters_on_packed_weights_are_refused_for_the_packed_weights():
    model = NanoGPT(layers=1).eval()
    for layer in (block := model.transformer["h"][0]).mlp, block.attn:
        adapter = Adapted(layer.c_proj).eval()
        adapter.base_layer = PackedBase(layer.c_proj)
        layer.c_proj = adapter
    for branch in find_blocks(model, batch=IDS)[0].branches:
        assert branch.reason.endswith("base_layer.step cannot be read: it is computed by the operation 'mul'")
    assert block is model.transformer["h"][0]


class Beside(Block):
    """The update is added by the block, beside the branch: no module returns their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 3, bias=False), nn.Linear(3, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)))
        return x + self.mlp.c_proj(h) + self.b(self.a(h))


def test_a_scale_reaches_the_sum_or_the_terms_are_branches_of_their_own():
    model = NanoGPT(Beside, layers=2).eval()
    for block in find_blocks(model, batch=IDS):
        assert [branch.kind for branch in block.branches] == ["attention", "mlp", "mlp"]
        assert [branch.site.rpartition(".")[2] for branch in block.branches[1:]] == ["c_proj", "b"]


def test_each_linear_is_adapted_in_the_zoo():
    model = adapted()
    assert sum(isinstance(layer, Adapted) for layer in model.modules()) == 3 * 7
    each_linear(model, lambda layer: layer.merged(), Adapted)
    assert not any(isinstance(layer, Adapted) for layer in model.modules())
    assert SCALE != 1.0

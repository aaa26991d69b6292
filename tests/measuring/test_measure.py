"""Measuring a model: gauges that change no function change no norm, both solvers agree, bad weights have a reason."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from found import built, search
from torch import Tensor, nn
from zoo import example, examples

from lightning_spectral import ExactSVD, Measurement, ResidualBlock, attach_scales, find_blocks, measure
from lightning_spectral.errors import BlocksNotFoundError, ConfigurationError
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.records import Branch, Factor, Path
from lightning_spectral.weights.model import ModelWeights

HEADS, WIDTH = 4, 32
MEASURED = [
    member.name
    for member in examples()
    if not member.expected_refusal and not member.needs_process_group and not member.compiled
]

Gauge = Callable[[nn.Module], None]


def exact(model: nn.Module, blocks: Sequence[ResidualBlock], linearization: Any = "circuit") -> Measurement:
    return measure(model, blocks, linearization=linearization, solver=ExactSVD())


def norms(measurement: Measurement) -> list[float]:
    return [norm for layer in measurement for norm in (layer.attention_norm, layer.mlp_norm) if norm is not None]


def output(model: nn.Module, name: str) -> Tensor:
    args, kwargs = example(name).inputs(model)
    with torch.no_grad():
        result = model(*args, **kwargs)
    return result if isinstance(result, Tensor) else next(iter(result.values()))


def layers(model: nn.Module, name: str) -> Iterator[nn.Module]:
    for block in search(name).blocks:
        yield model.get_submodule(block.name)


# --- Gauges -----------------------------------------------------------------------------------------------------------


def scaled(*paths: tuple[str, float]) -> Gauge:
    """Multiply parameters of one block."""

    def gauge(block: nn.Module) -> None:
        for path, factor in paths:
            block.get_parameter(path).data.mul_(factor)

    return gauge


def through_norm(norm: str, readers: tuple[str, ...], one_plus: bool = False) -> Gauge:
    """Another gain in every channel, taken back by the matrices behind the norm."""

    def gauge(block: nn.Module) -> None:
        change = torch.linspace(0.3, 3.0, WIDTH)
        gain = block.get_parameter(f"{norm}.weight")
        gain.data.copy_((1 + gain.data) * change - 1 if one_plus else gain.data * change)
        for reader in readers:
            block.get_parameter(reader).data.div_(change)
        bias = dict(block.named_parameters()).get(f"{norm}.bias")
        if bias is not None:
            bias.data.mul_(change)

    return gauge


def head_space(values: str, output_: str, orthogonal: bool) -> Gauge:
    """Another basis for the channels of each value head: W_v to R W_v, W_o to W_o R⁻¹."""

    def gauge(block: nn.Module) -> None:
        weight, out = block.get_parameter(f"{values}.weight").data, block.get_parameter(f"{output_}.weight").data
        channels = out.shape[1] // HEADS
        rows = weight.view(-1, channels, WIDTH)
        group = HEADS // len(rows)
        for number, head in enumerate(rows):
            basis = torch.randn(channels, channels, generator=torch.Generator().manual_seed(number))
            basis = torch.linalg.qr(basis).Q if orthogonal else torch.eye(channels) + 0.1 * basis
            head.copy_(basis @ head)
            for reader in range(number * group, (number + 1) * group):
                columns = out[:, reader * channels : (reader + 1) * channels]
                columns.copy_(columns @ torch.linalg.inv(basis))

    return gauge


ATTENTION = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
GATED = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
V, OUT, UP, DOWN = "self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"

GAUGES: dict[str, tuple[tuple[str, ...], Gauge]] = {
    "values ten times, output a tenth": (
        ("llama", "gemma", "qwen3", "olmo2", "gemma2"),
        scaled((V, 10.0), (OUT, 0.1)),
    ),
    "up ten times, down a tenth": (("llama", "gemma", "granite", "gemma2"), scaled((UP, 10.0), (DOWN, 0.1))),
    "gain of the attention's norm": (("llama", "stablelm"), through_norm("input_layernorm", ATTENTION)),
    "gain of the MLP's norm": (("llama", "stablelm"), through_norm("post_attention_layernorm", GATED)),
    "gain 1 + w of the attention's norm": (("gemma", "gemma2"), through_norm("input_layernorm", ATTENTION, True)),
    "gain 1 + w of the MLP's norm": (("gemma",), through_norm("post_attention_layernorm", GATED, True)),
    "gain of a fused norm": (("nanogpt", "plain_dropout"), through_norm("ln_1", ("attn.c_attn.weight",))),
    "gain of one norm for both branches": (
        ("plain_parallel_one_norm",),
        through_norm("ln", ("attn.c_attn.weight", "mlp.c_fc.weight")),
    ),
    "rotated heads": (("llama", "qwen3"), head_space("self_attn.v_proj", "self_attn.o_proj", True)),
    "heads in another basis": (("llama", "gemma2"), head_space("self_attn.v_proj", "self_attn.o_proj", False)),
    "everything in front of a norm behind the branch": (
        ("gemma2", "olmo2", "exaone4"),
        scaled((V, 8.0), (OUT, 4.0), (DOWN, 0.25), (UP, 16.0)),
    ),
    "everything in front of a norm written by hand": (
        ("plain_sandwich", "plain_branch_post_norm"),
        scaled(("attn.c_proj.weight", 64.0), ("attn.c_proj.bias", 64.0), ("mlp.c_proj.weight", 32.0),
               ("mlp.c_proj.bias", 32.0)),
    ),
    "LayerScale against the output": (
        ("plain_layer_scale",),
        scaled(("ls1.gamma", 4.0), ("attn.c_proj.weight", 0.25), ("attn.c_proj.bias", 0.25), ("ls2.gamma", -0.5),
               ("mlp.c_proj.weight", -2.0), ("mlp.c_proj.bias", -2.0)),
    ),
    "ReZero against the output": (
        ("plain_two_alphas",),
        scaled(("alpha_attn", 4.0), ("attn.c_proj.weight", 0.25), ("attn.c_proj.bias", 0.25), ("alpha_mlp", -0.5),
               ("mlp.c_proj.weight", -2.0), ("mlp.c_proj.bias", -2.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "gauge"),
    [pytest.param(name, gauge, id=f"{words}: {name}") for words, (names, gauge) in GAUGES.items() for name in names],
)
def test_circuit_does_not_see_a_gauge(name: str, gauge: Gauge) -> None:
    """The function is unchanged, so are all norms."""
    model, blocks = built(name)
    function, before = output(model, name), exact(model, blocks)
    for block in layers(model, name):
        gauge(block)
    torch.testing.assert_close(output(model, name), function, rtol=0, atol=2e-3 * float(function.abs().max()))
    after = exact(model, blocks)
    assert norms(after) == pytest.approx(norms(before), rel=2e-5)
    assert len(norms(after)) == 2 * len(blocks)


@pytest.mark.parametrize(
    ("gauge", "change"),
    [
        (scaled((V, 10.0), (OUT, 0.1)), 10.0),
        (scaled(("post_attention_layernorm.weight", 10.0), *((path, 0.1) for path in GATED)), 0.1),
        (scaled((UP, 10.0), (DOWN, 0.1)), 1.0),
        (head_space("self_attn.v_proj", "self_attn.o_proj", True), 1.0),
    ],
    ids=["values against output", "norm against MLP", "up against down", "rotated heads"],
)
def test_paper_is_set_to_any_ratio_by_a_gauge(gauge: Gauge, change: float) -> None:
    """What the definition of the paper leaves out decides its ratio; the circuit's stays."""
    model, blocks = built("llama")
    function = output(model, "llama")
    before = {kind: exact(model, blocks, kind) for kind in ("paper", "circuit")}
    for block in layers(model, "llama"):
        gauge(block)
    torch.testing.assert_close(output(model, "llama"), function, rtol=1e-3, atol=1e-4)
    for kind, factor in (("paper", change), ("circuit", 1.0)):
        for old, new in zip(before[kind], exact(model, blocks, kind), strict=True):
            assert old.ratio is not None
            assert new.ratio == pytest.approx(factor * old.ratio, rel=1e-5)


def test_the_gate_is_not_part_of_either() -> None:
    """A gate ten times as large changes the function and no norm: the docs say so."""
    model, blocks = built("llama")
    function = output(model, "llama")
    before = {kind: exact(model, blocks, kind) for kind in ("paper", "circuit")}
    for block in layers(model, "llama"):
        scaled((GATED[0], 10.0))(block)
    assert float((output(model, "llama") - function).abs().max()) > 0.1
    for kind, measurement in before.items():
        assert norms(exact(model, blocks, kind)) == norms(measurement)


@pytest.mark.parametrize(
    ("name", "gauge"),
    [
        ("llama", scaled((DOWN, 3.0))),
        ("llama", scaled((UP, 3.0))),
        ("llama", scaled(("post_attention_layernorm.weight", 3.0))),
        ("plain_layer_scale", scaled(("ls2.gamma", -3.0))),
        ("plain_two_alphas", scaled(("alpha_mlp", 3.0))),
        ("gemma4_text", scaled(("post_feedforward_layernorm.weight", 3.0), ("post_per_layer_input_norm.weight", 3.0))),
    ],
)
def test_scaling_the_mlp_scales_the_ratio(name: str, gauge: Gauge) -> None:
    """By a matrix, a gain, LayerScale, ReZero, or the gain of a norm behind the branch."""
    model, blocks = built(name)
    before = exact(model, blocks)
    for block in layers(model, name):
        gauge(block)
    for old, new in zip(before, exact(model, blocks), strict=True):
        assert old.mlp_norm is not None
        assert old.ratio is not None
        assert new.mlp_norm == pytest.approx(3 * old.mlp_norm, rel=1e-5)
        assert new.attention_norm == old.attention_norm
        assert new.ratio == pytest.approx(3 * old.ratio, rel=1e-5)


def test_a_residual_multiplier_scales_both_norms() -> None:
    """Read from the pass: with 0.44 for 0.22 both norms double, and the ratio stays."""
    model, blocks = built("granite")
    before = exact(model, blocks)
    for block in layers(model, "granite"):
        block.residual_multiplier = 0.44  # type: ignore[assignment]
    args, kwargs = example("granite").inputs(model)
    after = exact(model, find_blocks(model, batch=args or kwargs))
    assert norms(after) == pytest.approx([2 * norm for norm in norms(before)], rel=1e-6)
    for old, new in zip(before, after, strict=True):
        assert new.ratio == pytest.approx(old.ratio, rel=1e-6)


@pytest.mark.parametrize("linearization", ["circuit", "paper"])
def test_swapping_the_branches_inverts_the_ratio(linearization: str) -> None:
    """ρ becomes 1 / ρ, and its logarithm changes sign."""
    other = {"attention": "mlp", "mlp": "attention"}
    model, blocks = built("qkv_per_head")
    swapped = [
        replace(block, branches=tuple(replace(branch, kind=other[branch.kind]) for branch in block.branches))
        for block in blocks
    ]
    for one, two in zip(exact(model, blocks, linearization), exact(model, swapped, linearization), strict=True):
        assert one.ratio is not None
        assert one.log_ratio is not None
        assert two.ratio == pytest.approx(1 / one.ratio)
        assert two.log_ratio == pytest.approx(-one.log_ratio)
        assert one.ratio != pytest.approx(1.0)


# --- Experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "expert"),
    [
        ("mixtral", "mlp.experts.down_proj", 2),
        ("gpt_oss", "mlp.experts.gate_up_proj", 3),
        ("experts_in_out", "feed_forward.up", 0),
        ("experts_looped_idle", "feed_forward.down", 3),
        ("experts_modules", "feed_forward.experts.1.w3.weight", 1),
        ("experts_modules_idle", "feed_forward.experts.3.w2.weight", 3),
        ("experts_modules_shared", "feed_forward.shared.w2.weight", "shared"),
        ("deepseek_v3", "mlp.shared_experts.up_proj.weight", "shared"),
    ],
)
def test_a_mixture_has_the_norm_of_its_largest_expert(name: str, path: str, expert: int | str) -> None:
    """An expert made larger becomes the one that is named, routed to or not, and its norm is the branch's."""
    model, blocks = built(name)
    last = blocks[-1]
    before = exact(model, blocks).layers[-1]
    weight = model.get_parameter(f"{last.name}.{path}")
    (weight.data[expert] if weight.ndim == 3 else weight.data).mul_(100.0)
    after = exact(model, blocks).layers[-1]
    assert last.mlp is not None
    alone = replace(last.mlp, paths=tuple(item for item in last.mlp.paths if item.expert == expert))
    own = exact(model, [replace(last, branches=(alone,))]).layers[0]
    assert (after.mlp_expert, after.mlp_norm) == (expert, own.mlp_norm)
    assert before.mlp_norm is not None
    assert after.mlp_norm is not None
    assert after.mlp_norm > 10 * before.mlp_norm


def test_a_dense_mlp_names_no_expert() -> None:
    """There is none."""
    assert {layer.mlp_expert for layer in exact(*built("nanogpt"))} == {None}


# --- Solvers ----------------------------------------------------------------------------------------------------------


@pytest.mark.zoo
@pytest.mark.parametrize("name", MEASURED)
def test_randomized_and_exact_agree(name: str) -> None:
    """Within one per cent, and within the bound that comes with the value; what is None is None in both."""
    model, blocks = built(name)
    for one, two in zip(measure(model, blocks), exact(model, blocks), strict=True):
        assert one.reason == two.reason
        for value, truth in ((one.attention_norm, two.attention_norm), (one.mlp_norm, two.mlp_norm)):
            assert (value is None) == (truth is None)
            if value is not None and truth is not None:
                assert one.error_bound is not None
                assert abs(value - truth) <= max(1e-2 * truth, 0.0)
                assert truth <= (1 + one.error_bound) * value * (1 + 1e-5)


class Wide(nn.Module):
    """One block of width 192 without a forward: its blocks are written down."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            U, sigma, Vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
            return nn.Parameter(U * sigma * torch.arange(1, len(sigma) + 1) ** -decay @ Vh)

        self.down, self.up, self.value, self.output = (
            weight(*shape) for shape in ((192, 500), (500, 192), (192, 192), (192, 192))
        )
        self.gain = nn.Parameter(torch.rand(192, generator=generator) + 0.5)

    def blocks(self, post: bool) -> list[ResidualBlock]:
        front = (Factor("post_norm", "gain", size=192),) if post else ()
        chains = {"attention": ("output", "value"), "mlp": ("down", "up")}
        return [
            ResidualBlock(
                0,
                "wide",
                tuple(
                    Branch(kind, "", paths=(Path((*front, *(Factor(role, role) for role in roles))),))  # type: ignore[arg-type]
                    for kind, roles in chains.items()
                ),
            )
        ]


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("post", [False, True])
def test_wide_branches_are_measured_to_one_per_cent(post: bool, decay: float) -> None:
    """On flat and on steep spectra, behind a norm as well, where a Frobenius norm is estimated."""
    model = Wide(decay)
    layer = measure(model, model.blocks(post)).layers[0]
    for value, left, right in (
        (layer.mlp_norm, model.down, model.up),
        (layer.attention_norm, model.output, model.value),
    ):
        product = (left.double() @ right.double()).detach()
        if post:
            product = model.gain.detach().double()[:, None] * product * math.sqrt(192) / product.norm()
        assert value == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-2)


def test_a_meter_starts_from_the_last_time_and_sees_the_weights_of_this_time() -> None:
    """The same values again, and the new ones after a change; the step is what the caller says."""
    model = Wide(0.5)
    meter = Meter(ModelWeights(model), model.blocks(False))
    first, again = meter.measure(), meter.measure(7)
    assert (first.step, again.step) == (0, 7)
    assert norms(again) == pytest.approx(norms(first), rel=1e-3)
    model.down.data.mul_(5.0)
    assert norms(meter.measure()) == pytest.approx([norms(first)[0], 5 * norms(first)[1]], rel=1e-2)


def test_a_meter_takes_up_its_state_and_drops_the_state_of_another() -> None:
    """Plain values and tensors; of another linearization or of other branches nothing is used."""
    model = Wide(0.5)
    meter = Meter(ModelWeights(model), model.blocks(False))
    meter.measure()
    state = meter.state_dict()
    resumed = Meter(ModelWeights(model), model.blocks(False))
    resumed.load_state_dict(torch.load(_saved(state), weights_only=True))
    assert norms(resumed.measure()) == norms(meter.measure())
    other = Meter(ModelWeights(model), model.blocks(False), linearization="paper")
    other.load_state_dict(state)
    assert other.state_dict()["solver"] is None


def _saved(state: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


# --- The door ---------------------------------------------------------------------------------------------------------


def test_measure_prints_a_table() -> None:
    """One line of words, one of titles, one per block."""
    table = str(measure(example("nanogpt").build())).splitlines()
    assert table[0].startswith("spectral ratio ‖mlp‖₂/‖attention‖₂, linearization='circuit', safe zone (0.5, 2)")
    assert table[1].split() == ["block", "mlp", "attention", "ratio"]
    assert [line.split()[:2] for line in table[2:]] == [[str(i), f"transformer.h.{i}"] for i in range(3)]
    assert all(float(line.split()[4]) > 0 for line in table[2:])


def test_measure_finds_the_blocks_on_the_batch_it_is_given() -> None:
    """The same as with blocks that were found before."""
    member = example("dictionary_batch")
    model = member.build()
    batch = member.inputs(model)[0]
    assert measure(model, batch=batch).layers == measure(model, search("dictionary_batch").blocks).layers
    member = example("t5")
    model = member.build()
    assert measure(model, batch=member.inputs(model)[1]).layers == measure(model, search("t5").blocks).layers


def test_a_model_without_blocks_has_no_measurement() -> None:
    """The refusal of the search comes through."""
    with pytest.raises(BlocksNotFoundError, match="no residual block was found in Sequential"):
        measure(example("refused_mlp").build())


@pytest.mark.parametrize("linearization", ["Circuit", "", None, 1])
def test_an_unknown_linearization_is_refused(linearization: Any) -> None:
    """Before anything is run."""
    with pytest.raises(ConfigurationError, match=f"linearization={linearization!r}: expected 'circuit' or 'paper'"):
        measure(nn.Identity(), linearization=linearization)


def test_nothing_to_measure_is_an_empty_measurement() -> None:
    """No block, no layer, and a summary without ratios."""
    measurement = measure(nn.Identity(), [])
    assert measurement.layers == ()
    assert "ratio_median" not in measurement.summary()


def test_a_measurement_changes_nothing() -> None:
    """No weight, buffer, flag, gradient or random stream; power iterations of computed weights do not advance."""
    for name in ("spectral_norm_weights", "weight_norm_weights", "mixtral", "plain_dropout"):
        model, blocks = built(name)
        model.train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        flags = [module.training for module in model.modules()]
        stream = torch.get_rng_state()
        with torch.autocast("cpu", torch.bfloat16):
            first = measure(model, blocks)
        with torch.inference_mode():
            second = measure(model, blocks)
        assert first.layers == second.layers == measure(model, blocks).layers
        assert torch.equal(torch.get_rng_state(), stream)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["spectral_norm_weights", "weight_norm_weights"])
def test_computed_weights_are_measured_as_they_are_in_evaluation(name: str) -> None:
    """The weight that the module multiplies with, not the parameters that it is computed from."""
    model, blocks = built(name)
    expected = []
    for block in layers(model.eval(), name):
        product = block.mlp.c_proj.weight @ (block.mlp.c_fc.weight * block.ln_2.weight)
        expected.append(float(torch.linalg.matrix_norm(product.detach().double(), 2)))
    assert [layer.mlp_norm for layer in exact(model.train(), blocks)] == pytest.approx(expected, rel=1e-5)


def test_blocks_are_plain_records() -> None:
    """Pickled, copied, and measured on another copy of the model."""
    model, blocks = built("deepseek_v3")
    assert pickle.loads(pickle.dumps(blocks)) == blocks
    assert copy.deepcopy(blocks) == blocks
    twin = copy.deepcopy(model)
    assert exact(twin, blocks).layers == exact(model, blocks).layers
    model.get_parameter(f"{blocks[0].name}.mlp.down_proj.weight").data.mul_(2.0)
    changed = exact(model, blocks).layers
    assert changed[1:] == exact(twin, blocks).layers[1:]
    assert changed[0] != exact(twin, blocks).layers[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-5)])
def test_any_floating_point_type_is_measured(dtype: torch.dtype, tolerance: float) -> None:
    """The norms of the rounded weights are close to those of float32."""
    for name in ("nanogpt", "gate_up", "plain_sandwich"):
        model, blocks = built(name)
        expected = norms(exact(model, blocks))
        assert norms(measure(model.to(dtype), blocks)) == pytest.approx(expected, rel=tolerance)
        assert norms(measure(model, example_blocks(model, name))) == pytest.approx(expected, rel=tolerance)


def example_blocks(model: nn.Module, name: str) -> tuple[ResidualBlock, ...]:
    args, kwargs = example(name).inputs(model)
    return find_blocks(model, batch=args or kwargs)


# --- Bad weights ------------------------------------------------------------------------------------------------------


def parameter_of(model: nn.Module, path: str) -> tuple[nn.Module, str, Tensor]:
    owner, _, attribute = path.rpartition(".")
    module = model.get_submodule(owner)
    return module, attribute, getattr(module, attribute)


BAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda weight: weight.index_fill(0, torch.tensor([1]), math.nan), "finite"),
    "Inf": (lambda weight: weight.index_fill(0, torch.tensor([1]), math.inf), "finite"),
    "meta": (lambda weight: weight.to("meta"), "meta"),
    "int8": (lambda weight: weight.mul(30).to(torch.int8), "int8"),
    "packed": (lambda weight: weight.flatten()[: weight.numel() // 2].mul(9).to(torch.uint8).view(-1, 1), "uint8"),
}


@pytest.mark.parametrize("linearization", ["circuit", "paper"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_weight_costs_its_branch_and_nothing_else(bad: str, linearization: str) -> None:
    """None with a reason that says what is wrong, no ratio, and every other number as before."""
    spoil, word = BAD[bad]
    model, blocks = built("llama")
    before = exact(model, blocks, linearization)
    module, attribute, weight = parameter_of(model, f"{blocks[1].name}.{OUT}")
    setattr(module, attribute, nn.Parameter(spoil(weight.data), requires_grad=False))
    for measurement in (exact(model, blocks, linearization), measure(model, blocks, linearization=linearization)):
        spoiled = measurement.layers[1]
        assert (spoiled.attention_norm, spoiled.ratio, spoiled.log_ratio) == (None, None, None)
        assert spoiled.attention_reason is not None
        assert word in spoiled.attention_reason
        assert spoiled.reason == f"attention: {spoiled.attention_reason}"
        assert spoiled.mlp_norm == pytest.approx(before.layers[1].mlp_norm, rel=1e-2)
        for index in (0, 2):
            assert measurement.layers[index].ratio == pytest.approx(before.layers[index].ratio, rel=1e-2)
        assert measurement.summary()["unmeasured"] == 1.0
        assert spoiled.attention_reason in str(measurement)


@pytest.mark.parametrize("bad", ["NaN", "Inf"])
def test_one_bad_expert_is_no_smaller_than_the_others(bad: str) -> None:
    """The largest norm is not known when one of them is not."""
    model, blocks = built("mixtral")
    weight = model.get_parameter(f"{blocks[0].name}.mlp.experts.down_proj")
    weight.data[3] = BAD[bad][0](weight.data[3])
    layer = measure(model, blocks).layers[0]
    assert layer.mlp_norm is None
    assert layer.mlp_expert is None
    assert "finite" in str(layer.mlp_reason)


def test_a_model_on_the_meta_device_has_reasons() -> None:
    """Its blocks may be found before it is moved; there are no numbers to measure."""
    model, blocks = built("nanogpt")
    for layer in measure(model.to("meta"), blocks):
        assert (layer.attention_norm, layer.mlp_norm, layer.error_bound) == (None, None, None)
        assert "meta" in str(layer.reason)


def test_a_branch_that_starts_at_zero_has_norm_zero_and_no_ratio() -> None:
    """As in stacks that are the identity at first: zero is a norm, but no denominator."""
    model, blocks = built("nanogpt")
    for layer in layers(model, "nanogpt"):
        layer.attn.c_proj.weight.data.zero_()
    for measured_ in measure(model, blocks):
        assert measured_.attention_norm == 0.0
        assert measured_.mlp_norm is not None
        assert (measured_.ratio, measured_.log_ratio, measured_.attention_reason) == (None, None, None)
        assert measured_.reason == "attention: its norm is zero"
    again = find_blocks(model, batch=example("nanogpt").inputs(model)[0])
    assert again == blocks


def test_a_zero_behind_a_norm_has_a_reason() -> None:
    """A norm of nothing has no size."""
    model, blocks = built("plain_sandwich")
    next(layers(model, "plain_sandwich")).mlp.c_proj.weight.data.zero_()
    layer = measure(model, blocks).layers[0]
    assert layer.mlp_norm is None
    assert "zero" in str(layer.mlp_reason)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("attention_only", (True, False)), ("mlp_only", (False, True)), ("mamba2", (False, False))],
)
def test_a_block_with_one_branch_has_one_norm_and_no_ratio(name: str, kinds: tuple[bool, bool]) -> None:
    """A branch that does not exist is None, and no branch that could not be measured."""
    model, blocks = built(name)
    layer = measure(model, blocks).layers[0]
    assert (layer.attention_norm is not None, layer.mlp_norm is not None) == kinds
    assert layer.ratio is None
    assert layer.mlp_reason is None
    assert (layer.attention_reason is None) == (name != "mamba2")


@pytest.mark.parametrize("name", ["pyramid", "swin"])
def test_blocks_of_different_widths_are_measured_together(name: str) -> None:
    """Stages of widths 16 and 32."""
    model, blocks = built(name)
    assert len(norms(measure(model, blocks))) == 8


@pytest.mark.parametrize("name", ["albert", "shared_block", "hrm_text"])
def test_shared_blocks_are_measured_once(name: str) -> None:
    """One block called at several depths is one layer."""
    model, blocks = built(name)
    assert len({layer.name for layer in measure(model, blocks)}) == len(blocks)


def test_blocks_that_share_a_weight_are_both_measured_with_it() -> None:
    """One up projection for two blocks."""
    model, blocks = built("nanogpt")
    first, second, _ = layers(model, "nanogpt")
    second.mlp.c_fc.weight = first.mlp.c_fc.weight
    again = find_blocks(model, batch=example("nanogpt").inputs(model)[0])
    assert [block.name for block in again] == [block.name for block in blocks]
    assert exact(model, again).layers == exact(model, blocks).layers


def test_a_module_that_blocks_share_is_listed_once_and_names_its_other_places() -> None:
    """One MLP for two blocks: it has one path and one scale, so the second block says where it is measured."""
    model, _ = built("nanogpt")
    first, second, _ = layers(model, "nanogpt")
    second.mlp, second.ln_2 = first.mlp, first.ln_2
    one, two, three = blocks = find_blocks(model, batch=example("nanogpt").inputs(model)[0])
    assert one.mlp is not None
    assert two.attention is not None
    assert (one.mlp.aliases, two.mlp, two.attention.aliases) == (("transformer.h.1.mlp",), None, ())
    assert [branch.aliases for branch in three.branches] == [(), ()]
    for measured_, solver in ((measure(model, blocks), None), (exact(model, blocks), ExactSVD())):
        assert [layer.ratio is None for layer in measured_] == [False, True, False]
        assert measured_.layers[1].reason == "mlp: it is that of transformer.h.0, where it is measured"
        alone = measure(model, [replace(two, branches=(two.attention, one.mlp))], solver=solver).layers[0]
        assert alone.mlp_norm == measured_.layers[0].mlp_norm


def test_a_block_that_stands_in_several_places_names_them() -> None:
    """One block three times in a list."""
    model, _ = built("nanogpt")
    model.transformer["h"] = nn.ModuleList([model.transformer["h"][0]] * 3)
    (block,) = find_blocks(model, batch=example("nanogpt").inputs(model)[0])
    for branch in block.branches:
        word = branch.site.rpartition(".")[2]
        assert branch.aliases == (f"transformer.h.1.{word}", f"transformer.h.2.{word}")
    assert [layer.reason for layer in measure(model, [block])] == [None]


def test_branches_of_a_kind_are_added_up_and_each_can_be_measured() -> None:
    """Two MLPs of half a step around the attention."""
    model, blocks = built("macaron")
    both = exact(model, blocks)
    alone = [exact(model, [replace(block, branches=(block.mlp_branches[i],)) for block in blocks]) for i in range(2)]
    for block, *found in zip(layers(model, "macaron"), both, *alone, strict=True):
        gains, ups, downs = (
            [mlp.net[place].weight.detach().double() for mlp in (block.ffn1, block.ffn2)] for place in (0, 1, 4)
        )
        first, second = (0.5 * down @ up * gain for down, up, gain in zip(downs, ups, gains, strict=True))
        for layer, matrix in zip(found, (first + second, first, second), strict=True):
            assert layer.mlp_norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, ord=2)), rel=1e-6)
        assert found[0].attention_norm is not None
        assert found[1].attention_norm is None


@pytest.mark.parametrize("name", ["nanogpt", "qkv_per_head", "mixtral", "gpt2", "dbrx", "deepseek_v3", "llama"])
def test_blocks_of_another_model_are_refused_or_have_reasons(name: str) -> None:
    """Weights of another shape (parts of a larger storage), experts that do not exist, modules that are missing."""
    model, blocks = built(name)
    for layer in measure(nn.Linear(3, 3), blocks):
        assert (layer.attention_norm, layer.mlp_norm) == (None, None)
        assert layer.attention_reason
        assert layer.mlp_reason
    whole = {name: parameter.data for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    for dimension in (0, 1, -1):
        for path, content in whole.items():
            model.get_parameter(path).data = content.narrow(dimension, 0, content.shape[dimension] // 4)
        for layer in measure(model, blocks):
            assert layer.ratio is None
            assert layer.reason


def test_the_table_shows_residual_scales_where_there_are_any():
    model = example("nanogpt").build()
    scales = attach_scales(model)
    assert "scales" not in str(measure(model, scales.blocks))
    torch.nn.init.constant_(scales.parameters()[1], math.log(2.5))
    lines = str(measure(model, scales.blocks)).splitlines()
    assert lines[1].endswith("scales")
    assert lines[2].endswith("2.5 : 1")


def test_gains_of_16_bits_are_not_rounded_when_one_is_added():
    member = example("gemma2")
    model = member.build()
    args, kwargs = member.inputs(model)
    blocks = find_blocks(model, batch=args or kwargs)
    half = model.bfloat16()
    exact = copy.deepcopy(half).double()  # the same numbers, with room for 1 + w
    for low, high in zip(
        measure(half, blocks, solver=ExactSVD()), measure(exact, blocks, solver=ExactSVD()), strict=True
    ):
        assert low.mlp_norm == pytest.approx(high.mlp_norm, rel=1e-5)
        assert low.attention_norm == pytest.approx(high.attention_norm, rel=1e-5)

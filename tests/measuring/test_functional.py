"""Jacobians of branches: they are those of the code, gauges leave them alone, and measuring them leaves no trace."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from found import search
from torch import Tensor, nn
from zoo import example, examples
from zoo.example import HIDDEN, blocks_of, seeded, token_inputs
from zoo.gpt import ATTENTION_SITES, BLOCKS, MLP_SITES, Block, NanoGPT

from lightning_spectral import ExactSVD, Measurement, RandomizedSVD, ResidualBlock, attach_scales, find_blocks, measure
from lightning_spectral.errors import ConfigurationError, ExampleInputError
from lightning_spectral.linalg import Jacobian
from lightning_spectral.measuring.branch_functions import BranchFunction, branch_functions
from lightning_spectral.measuring.jacobians import update_ratios, watch_updates
from lightning_spectral.measuring.response import derivative_error, gains
from lightning_spectral.measuring.updates import Update
from lightning_spectral.records import FunctionalMeasurement

# Some members of the zoo are sharded.
pytestmark = pytest.mark.usefixtures("process_group")

SEEN = {"mlp_share", "attention_share", "attention_logit", "finite_differences"}  # of real passes; and a flag
NUMBERS = tuple(name for name in FunctionalMeasurement.__dataclass_fields__ if name not in SEEN)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def found(name: str) -> tuple[ResidualBlock, ...]:
    return search(name).blocks


def built(name: str) -> tuple[nn.Module, Inputs]:
    model = example(name).build()
    return model, example(name).inputs(model)


def batch_of(inputs: Inputs) -> Any:
    return inputs[1] or inputs[0]


def jacobians(name: str, **settings: Any) -> Measurement:
    model, inputs = built(name)
    return measure(model, found(name), linearization="jacobian", batch=batch_of(inputs), **settings)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


# --- The same numbers from the code of the model ----------------------------------------------------------------------


@contextlib.contextmanager
def replaced(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module return something else in the place of its (first) tensor."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Twin:
    """The branches of one block, by calling the block with the other site put out of action.

    With the MLP's site at 0 the block is x + a(x). With the attention's site at what it returned, c, it is
    x + c + m(x + c), whose derivative less the identity is that of m at the stream that the MLP reads.
    """

    def __init__(self, name: str, index: int) -> None:
        model, (args, kwargs) = built(name)
        dtype = torch.float32 if name in NARROW else torch.float64
        model = model.to(dtype)
        expected = example(name).blocks[index]
        self.block = model.get_submodule(expected.name)
        assert expected.attention is not None
        assert expected.mlp is not None
        self.attention, self.mlp = (model.get_submodule(sites[0]) for sites in (expected.attention, expected.mlp))
        calls: list[Inputs] = []
        handle = self.block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
        wide = [item.to(dtype) if item.is_floating_point() else item for item in args]
        named = {key: item.to(dtype) if item.is_floating_point() else item for key, item in kwargs.items()}
        model(*wide, **named)
        handle.remove()
        ((self.args, self.kwargs),) = calls
        # A cache would grow with every call.
        self.args = tuple(None if "Cache" in type(item).__name__ else item for item in self.args)
        self.kwargs = {key: None if "Cache" in type(item).__name__ else item for key, item in self.kwargs.items()}
        self.name = next(iter(self.kwargs)) if not self.args else None
        self.x = (self.args[0] if self.name is None else self.kwargs[self.name]).detach()
        outputs: list[Tensor] = []
        handle = self.attention.register_forward_hook(lambda _, __, output: outputs.append(first(output).detach()))
        self.whole = self(self.x).detach()
        handle.remove()
        self.c = outputs[0]

    def __call__(self, x: Tensor) -> Tensor:
        if self.name is None:
            return first(self.block(x, *self.args[1:], **self.kwargs))
        return first(self.block(**{**self.kwargs, self.name: x}))

    def jacobian(self) -> Tensor:
        square = torch.autograd.functional.jacobian(self, self.x, vectorize=True).reshape(self.x.numel(), -1)
        return square.double() - torch.eye(self.x.numel(), dtype=torch.float64)

    def of_attention(self) -> Tensor:
        with replaced(self.mlp, torch.zeros_like):
            return self.jacobian()

    def of_mlp(self) -> Tensor:
        with replaced(self.attention, lambda _: self.c):
            return self.jacobian()

    def updates(self) -> tuple[Tensor, Tensor]:
        with replaced(self.mlp, torch.zeros_like):
            attention = (self(self.x) - self.x).detach()
        return self.whole - self.x - attention, attention


NARROW = ("mixtral", "qwen2_moe", "experts_modules_shared")  # their routing knows no float64
# Plain, GQA, norms behind the branches, both at once, parallel, mixtures, scaled residuals, encoders, pictures.
TWINS = {
    "nanogpt": 1,
    "gpt2": 1,
    "llama": 1,
    "gemma2": 1,
    "olmo2": 1,
    "gpt_neox": 1,
    "mixtral": 1,
    "qwen2_moe": 1,
    "granite": 1,
    "vit": 1,
    "plain_layer_scale": 1,
    "plain_parallel_one_norm": 2,
    "torch_encoder_pre": 1,
    "experts_modules_shared": 0,
}


@pytest.mark.parametrize("name", TWINS)
def test_the_numbers_are_those_of_the_code(name: str) -> None:
    """Every entry of both Jacobians, their norms, and what the branches add."""
    twin, block = Twin(name, TWINS[name]), found(name)[TWINS[name]]
    assert block.name == example(name).blocks[TWINS[name]].name
    true = {"mlp": twin.of_mlp(), "attention": twin.of_attention()}
    model, inputs = built(name)
    functions = branch_functions(model, [block], *inputs)
    for kind, matrix in true.items():
        function = functions[getattr(block, kind)]
        assert isinstance(function, BranchFunction)
        torch.testing.assert_close(
            Jacobian(function, function.stream).dense(), matrix, rtol=0, atol=1e-4 * float(matrix.abs().max())
        )
    norms = {kind: float(torch.linalg.matrix_norm(matrix, ord=2)) for kind, matrix in true.items()}
    (layer,) = measure(model, [block], linearization="jacobian", batch=batch_of(inputs))
    for kind, norm in norms.items():
        value = getattr(layer, f"{kind}_norm")
        assert value <= norm * (1 + 1e-4)
        assert norm <= value * (1 + layer.error_bound) * (1 + 1e-4)
    assert layer.error_bound < 0.12
    mlp, attention = twin.updates()
    functional = layer.functional
    assert functional is not None
    assert functional.update_ratio == pytest.approx(float(mlp.norm() / attention.norm()), rel=1e-4)
    cosine = float((mlp * attention).sum() / mlp.norm() / attention.norm())
    assert functional.update_cosine == pytest.approx(cosine, abs=1e-4)
    ratio = float(true["mlp"].norm() / true["attention"].norm())
    assert functional.frobenius_ratio == pytest.approx(ratio, rel=0.12)  # eight probes
    for kind, matrix in true.items():
        mean, deviation = split(matrix, twin.x.shape)
        assert getattr(functional, f"{kind}_gain_mean") == pytest.approx(mean, rel=0.2)
        assert getattr(functional, f"{kind}_gain_deviation") == pytest.approx(deviation, rel=0.12)


def split(matrix: Tensor, shape: torch.Size) -> tuple[float, float]:
    """Gains on the mean over dimension 1 and on the rest, by forming the projections."""
    batch, tokens, width = shape
    P = torch.kron(
        torch.eye(batch, dtype=torch.float64),
        torch.kron(
            torch.full((tokens, tokens), 1 / tokens, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
        ),
    )
    rest = torch.eye(len(P), dtype=torch.float64) - P
    return tuple(float((Q @ matrix @ Q).norm() / Q.trace().sqrt()) for Q in (P, rest))


@pytest.mark.parametrize("name", ["nanogpt", "llama", "plain_post_norm"])
def test_an_exact_solver_gives_exact_norms(name: str) -> None:
    """With a solver that forms the matrices; a norm behind the add makes the stream, and is not part of a branch."""
    model, inputs = built(name)
    (layer,) = measure(model, found(name)[1:2], linearization="jacobian", batch=batch_of(inputs), solver=ExactSVD())
    if name == "plain_post_norm":
        mlp, attention = post_norm_by_hand(model.double(), *inputs[0])
    else:
        twin = Twin(name, 1)
        mlp, attention = twin.of_mlp(), twin.of_attention()
    assert layer.mlp_norm == pytest.approx(float(torch.linalg.matrix_norm(mlp, ord=2)), rel=1e-4)
    assert layer.attention_norm == pytest.approx(float(torch.linalg.matrix_norm(attention, ord=2)), rel=1e-4)
    assert layer.ratio == pytest.approx(layer.mlp_norm / layer.attention_norm)
    assert layer.error_bound is not None
    assert layer.error_bound < 1e-6


def post_norm_by_hand(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both Jacobians of block 1, from the code of its two branches."""
    parts = model.get_submodule("transformer")
    x = parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1]))
    x = parts["h"][0](x).detach()
    block = parts["h"][1]
    y = block.ln_1(x + block.attn(x)).detach()
    return tuple(
        torch.autograd.functional.jacobian(branch, point, vectorize=True).reshape(x.numel(), -1)
        for branch, point in ((block.mlp, y), (block.attn, x))
    )


def test_the_numbers_do_not_depend_on_the_layout_of_the_stream() -> None:
    """(tokens, batch, width) is (batch, tokens, width) with its positions renamed."""
    layers = [
        nn.TransformerEncoderLayer(HIDDEN, 4, 48, dropout=0.0, batch_first=batch_first, norm_first=True).eval()
        for batch_first in (True, False)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 7, HIDDEN)
    results = []
    for layer, stream, dims in zip(layers, (x, x.transpose(0, 1)), ((1,), (0,)), strict=True):
        blocks = find_blocks(layer, batch=stream)
        assert blocks[0].token_dims == dims
        (measured,) = measure(layer, blocks, linearization="jacobian", batch=stream, solver=ExactSVD())
        mlp, attention = (branch_functions(layer, blocks, (stream,), {})[branch] for branch in blocks[0].branches[::-1])
        gain = [
            gains(Jacobian(f, f.stream), dims, generator=torch.Generator().manual_seed(0), n_probes=500)
            for f in (mlp, attention)
        ]
        results.append((measured, gain))
    (one, gains_one), (two, gains_two) = results
    assert one.mlp_norm == pytest.approx(two.mlp_norm, rel=1e-5)
    assert one.attention_norm == pytest.approx(two.attention_norm, rel=1e-5)
    assert one.functional.update_ratio == pytest.approx(two.functional.update_ratio, rel=1e-5)
    assert one.functional.update_cosine == pytest.approx(two.functional.update_cosine, rel=1e-4)
    for a, b in zip(gains_one, gains_two, strict=True):  # other signs meet other entries
        assert (a.mean, a.deviation) == pytest.approx((b.mean, b.deviation), rel=0.05)


# --- Coverage ---------------------------------------------------------------------------------------------------------

RUNS_OFTEN = "runs {} times in one pass, each time with another Jacobian"
# Why a branch of the zoo has no Jacobian: complete.
REFUSED = {
    "albert": dict.fromkeys(range(1), RUNS_OFTEN.format(3)),
    "hrm_text": dict.fromkeys(range(3), RUNS_OFTEN.format(6)) | dict.fromkeys(range(3, 6), RUNS_OFTEN.format(2)),
    "shared_block": {0: RUNS_OFTEN.format(4)},
    "looped_injection": dict.fromkeys(range(2), RUNS_OFTEN.format(3)),
}
# Blocks without one of the two branches.
ONE_BRANCH = {
    "mamba": 3,
    "mamba2": 3,
    "falcon_mamba": 3,
    "attention_only": 3,
    "mlp_only": 3,
    "convnext": 4,
    "wav2vec2": 1,
    "siglip_vision": 1,
}
# What is missing beside the ratio where one branch of a block reads the stream flat, tokens and sequences in one
# dimension: its gains (and the other's where they are not told apart there either), and perhaps the angle. So it is
# where a class token is alone.
FLAT = {
    "vit_cait": {"mlp_gain_mean", "mlp_gain_deviation", "attention_gain_mean", "attention_gain_deviation"},
    "electra": {"mlp_gain_mean", "mlp_gain_deviation", "attention_gain_mean", "attention_gain_deviation"},
    "opt": {"update_cosine", "mlp_gain_mean", "mlp_gain_deviation"},
    "opt_350m_style": {"update_cosine", "mlp_gain_mean", "mlp_gain_deviation"},
}
ZOO = [member.name for member in examples() if not member.expected_refusal]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_every_branch_of_the_zoo_has_a_jacobian_or_a_listed_reason(name: str) -> None:
    """And every value is a positive number."""
    fast = RandomizedSVD(n_components=1, n_oversamples=1, max_iter=1)
    measurement = jacobians(name, solver=fast)
    refused = {}
    for layer in measurement:
        if layer.mlp_reason or layer.attention_reason:
            assert layer.mlp_reason is None or layer.mlp_norm is None
            reasons = {reason.split(" ", 1)[1] for reason in (layer.mlp_reason, layer.attention_reason) if reason}
            (refused[layer.index],) = reasons
    assert refused == REFUSED.get(name, {})
    whole = [layer for layer in measurement if layer.index not in refused]
    assert sum(layer.ratio is None for layer in whole) == ONE_BRANCH.get(name, 0)
    functionals = [layer.functional for layer in whole if layer.ratio is not None]
    missing = set()
    for functional in functionals:
        assert functional is not None
        assert not functional.finite_differences
        values = {number: getattr(functional, number) for number in NUMBERS}
        missing |= {number for number, value in values.items() if value is None}
        assert all(math.isfinite(value) for value in values.values() if value is not None)
        assert functional.frobenius_ratio is not None
        assert functional.frobenius_ratio > 0
    assert missing == FLAT.get(name, set())


# --- Laws -------------------------------------------------------------------------------------------------------------

Gauge = Callable[[nn.Module], None]


def scaled(*paths: tuple[str, float]) -> Gauge:
    """Multiply parameters of one block."""

    @torch.no_grad()
    def gauge(block: nn.Module) -> None:
        for path, factor in paths:
            block.get_parameter(path).mul_(factor)

    return gauge


VALUE = scaled(("self_attn.v_proj.weight", 10), ("self_attn.o_proj.weight", 0.1))
GAIN = scaled(("post_attention_layernorm.weight", 10), ("mlp.up_proj.weight", 0.1), ("mlp.gate_proj.weight", 0.1))
UP = scaled(("mlp.up_proj.weight", 10), ("mlp.down_proj.weight", 0.1))


def numbers(measurement: Measurement) -> list[float | None]:
    values: list[float | None] = []
    for layer in measurement:
        values += [layer.mlp_norm, layer.attention_norm, layer.ratio]
        values += [getattr(layer.functional, number) for number in NUMBERS]
    return values


@pytest.mark.parametrize(("gauge", "factor"), [(VALUE, 10.0), (GAIN, 0.1), (UP, 1.0)])
def test_gauges_leave_functional_numbers_alone(gauge: Gauge, factor: float) -> None:
    """They move the ratio of the paper by the factor of the gauge."""
    model, inputs = built("llama")
    model = model.double()
    arguments: dict[str, Any] = {"linearization": "jacobian", "batch": batch_of(inputs)}
    before, paper = measure(model, found("llama"), **arguments), measure(model, found("llama"), linearization="paper")
    for block in found("llama"):
        gauge(model.get_submodule(block.name))
    assert numbers(measure(model, found("llama"), **arguments)) == pytest.approx(numbers(before), rel=1e-6)
    after = measure(model, found("llama"), linearization="paper")
    assert [layer.ratio for layer in after] == pytest.approx([factor * layer.ratio for layer in paper], rel=1e-6)


def test_a_gate_is_part_of_the_function() -> None:
    """A tenfold gate changes the Jacobian, and not the ratio of the paper."""
    model, inputs = built("llama")
    before = measure(model, found("llama")[:1], linearization="jacobian", batch=batch_of(inputs))
    paper = measure(model, found("llama")[:1], linearization="paper")
    scaled(("mlp.gate_proj.weight", 10))(model.get_submodule(found("llama")[0].name))
    after = measure(model, found("llama")[:1], linearization="jacobian", batch=batch_of(inputs))
    assert after.layers[0].mlp_norm > 3 * before.layers[0].mlp_norm
    assert after.layers[0].attention_norm == pytest.approx(before.layers[0].attention_norm)
    assert measure(model, found("llama")[:1], linearization="paper").layers == paper.layers


@pytest.mark.parametrize("name", ["llama", "nanogpt", "mixtral", "gpt_neox"])
def test_branches_behind_a_norm_know_no_scale(name: str) -> None:
    """J(x)·x ≈ 0, and J(cx) = J(x)/c, up to the ε in the norm."""
    model, inputs = built(name)
    block = found(name)[1]
    functions = branch_functions(model, [block], *inputs)
    for branch in (block.mlp, block.attention):
        function = functions[branch]
        x = function.stream
        J, far = Jacobian(function, x), Jacobian(function, 10 * x)
        v = torch.randn(x.numel(), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        size = float(J.matmat(v).norm() / v.norm() * x.norm())
        along = x.flatten() if name in ("llama", "mixtral") else (x - x.mean(-1, keepdim=True)).flatten()
        assert float(J.matmat(along.unsqueeze(1)).norm()) < 1e-3 * size
        torch.testing.assert_close(10 * far.matmat(v), J.matmat(v), rtol=0, atol=1e-3 * float(J.matmat(v).abs().max()))


def test_residual_scales_are_part_of_the_function() -> None:
    """The ratio of a block moves exactly with its scales."""
    model, inputs = built("gpt2")
    block = found("gpt2")[0]
    before = measure(model, [block], linearization="jacobian", batch=batch_of(inputs)).layers[0]
    scales = dict(attach_scales(model, [block]).named_parameters())
    with torch.no_grad():
        scales[block.mlp.site].fill_(math.log(3.0))
        scales[block.attention.site].fill_(math.log(0.5))
    # The MLP reads the stream behind the attention: its own factor only shows where that one is left alone.
    after = measure(model, [block], linearization="jacobian", batch=batch_of(inputs)).layers[0]
    assert (after.mlp_scale, after.attention_scale) == pytest.approx((3.0, 0.5))
    assert after.attention_norm == pytest.approx(0.5 * before.attention_norm, rel=1e-6)
    with torch.no_grad():
        scales[block.attention.site].zero_()
    after = measure(model, [block], linearization="jacobian", batch=batch_of(inputs)).layers[0]
    assert after.ratio == pytest.approx(3 * before.ratio, rel=1e-6)
    assert after.mlp_norm == pytest.approx(3 * before.mlp_norm, rel=1e-6)
    for number in ("frobenius_ratio", "update_ratio", "mlp_gain_mean", "mlp_gain_deviation"):
        assert getattr(after.functional, number) == pytest.approx(3 * getattr(before.functional, number), rel=1e-6)
    assert after.functional.update_cosine == pytest.approx(before.functional.update_cosine, rel=1e-6)


def test_a_branch_that_starts_at_zero_has_no_ratio() -> None:
    """Its norm is 0, which is a measurement."""
    model, inputs = built("plain_two_alphas")
    nn.init.zeros_(model.get_parameter(f"{BLOCKS}.0.alpha_mlp"))
    layer = measure(model, found("plain_two_alphas"), linearization="jacobian", batch=batch_of(inputs)).layers[0]
    assert layer.mlp_norm == 0
    assert layer.attention_norm > 0
    assert layer.ratio is None
    assert (layer.mlp_reason, layer.reason) == (None, "mlp: its norm is zero")
    assert layer.functional.frobenius_ratio is None
    assert layer.functional.update_ratio is None
    assert layer.functional.mlp_gain_mean == 0


def test_weights_that_are_no_numbers_have_a_reason() -> None:
    """The blocks before them are measured."""
    model, inputs = built("gpt2")
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_proj.weight")[0, 0] = math.nan
    layers = measure(model, found("gpt2"), linearization="jacobian", batch=batch_of(inputs)).layers
    assert layers[0].reason is None
    assert layers[1].attention_reason is None
    assert layers[1].mlp_reason == "its update is not finite (NaN or Inf)"
    assert layers[2].attention_norm is None
    assert layers[2].functional == FunctionalMeasurement()


# --- Estimators -------------------------------------------------------------------------------------------------------


def test_gains_of_known_maps(generator: torch.Generator) -> None:
    """A multiple of the mean plus a multiple of the rest has these two gains, and keeps the two apart."""
    x = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator)

    def function(x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return 3 * mean + 0.5 * (x - mean)

    found = gains(Jacobian(function, x), (1,), generator=generator, n_probes=400)
    assert found.mean == pytest.approx(3, rel=0.05)
    assert found.deviation == pytest.approx(0.5, rel=0.02)
    assert found.frobenius == pytest.approx(math.sqrt(9 * 10 + 0.25 * 60), rel=0.05)
    alone = gains(Jacobian(function, x), (), generator=generator)
    assert alone.mean is None
    assert alone.deviation is None
    single = gains(Jacobian(torch.sin, x[:, :1]), (1,), generator=generator)
    assert single.deviation is None
    assert single.frobenius == pytest.approx(float(x[:, :1].cos().norm()), rel=1e-12)  # signs are exact on a diagonal


def test_a_jacobian_is_an_operator(generator: torch.Generator) -> None:
    """Products, transpose and dense form agree with torch's own; so do differences."""
    W = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    x = torch.randn(3, 6, dtype=torch.float64, generator=generator)

    def function(x: Tensor) -> Tensor:
        return torch.tanh(x @ W.mT) * x.sum(-1, keepdim=True)

    J = Jacobian(function, x)
    dense = torch.autograd.functional.jacobian(function, x).reshape(12, 18)
    X, Y = torch.randn(18, 2, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    torch.testing.assert_close(J.dense(), dense)
    torch.testing.assert_close(J.matmat(X), dense @ X)
    torch.testing.assert_close(J.adjoint(Y), dense.mT @ Y)
    torch.testing.assert_close(J.value, function(x))
    torch.testing.assert_close(J.difference(X[:, 0].reshape(3, 6)).flatten(), dense @ X[:, 0], rtol=1e-8, atol=1e-8)
    assert not J.difference(torch.zeros_like(x)).any()
    assert derivative_error(J, generator=generator) < 1e-7
    balanced = J.balanced()
    assert balanced is not None
    torch.testing.assert_close(balanced[0].dense() * 2.0 ** balanced[1], dense)
    assert Jacobian(lambda x: x * math.nan, x).balanced() is None
    constant = Jacobian(lambda x: torch.ones(4, dtype=torch.float64), x)
    assert not constant.matmat(X).any()
    assert not constant.adjoint(Y[:4]).any()
    assert constant.balanced() == (constant, 0)
    assert derivative_error(constant, generator=generator) == 0


class Once(torch.autograd.Function):
    """A sine whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class Wrong(torch.autograd.Function):
    """A straight-through estimator: the sine claims to be the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_differences_stand_in_for_second_derivatives(generator: torch.Generator) -> None:
    """And say so."""
    x = torch.randn(20, dtype=torch.float64, generator=generator)
    J = Jacobian(Once.apply, x)
    assert not J.finite_differences
    v = torch.randn(20, 1, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(J.matmat(v).flatten(), x.cos() * v.flatten(), rtol=1e-8, atol=1e-8)
    assert J.finite_differences
    assert derivative_error(J, generator=generator) < 1e-7


def test_a_false_derivative_is_seen(generator: torch.Generator) -> None:
    """Differences of the function itself are the witness."""
    x = torch.randn(20, dtype=torch.float64, generator=generator)
    assert derivative_error(Jacobian(Wrong.apply, x), generator=generator) > 0.1


@torch.library.custom_op("lightning_spectral_tests::straight", mutates_args=())
def straight(x: Tensor) -> Tensor:
    """A sine that claims to be the identity."""
    return x.sin()


straight.register_autograd(lambda ctx, gradient: gradient)


@torch.library.custom_op("lightning_spectral_tests::bare", mutates_args=())
def bare(x: Tensor) -> Tensor:
    """A sine without a derivative."""
    return x.sin()


class CustomBlock(Block):
    """A kernel from outside in the MLP."""

    kernel = staticmethod(straight)

    def forward(self, x: Tensor) -> Tensor:
        """Sine instead of GELU."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.dropout(self.mlp.c_proj(self.kernel(self.mlp.c_fc(self.ln_2(x)))))


class BareBlock(CustomBlock):
    """Its kernel cannot be differentiated at all."""

    kernel = staticmethod(bare)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (CustomBlock, "its derivative differs from a difference of its values"),
        (BareBlock, "its derivative differs from a difference of its values|it cannot be differentiated"),
    ],
)
def test_a_kernel_without_a_true_derivative_has_a_reason(block: type[nn.Module], reason: str) -> None:
    """The other branch is measured."""
    model = seeded(lambda: NanoGPT(block))()
    blocks = find_blocks(model, batch=token_inputs(model)[0])
    assert len(blocks) == len(blocks_of(BLOCKS, range(3), ATTENTION_SITES, MLP_SITES))
    for layer in measure(model, blocks, linearization="jacobian", batch=token_inputs(model)[0]):
        assert re.match(reason, layer.mlp_reason)
        assert layer.attention_norm > 0
        assert layer.functional.attention_gain_mean > 0
        assert layer.functional.mlp_gain_mean is None
        assert layer.functional.frobenius_ratio is None


# --- Nothing is touched -----------------------------------------------------------------------------------------------

TOUCHY = ["spectral_norm_weights", "mixtral", "plain_dropout", "conformer", "gpt2", "t5", "checkpointed"]


def traces(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        [module.training for module in model.modules()],
        [len(getattr(module, name)) for module in model.modules() for name in hooks],
        [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
        [type(module) for module in model.modules()],
        random.getstate(),
        torch.is_grad_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ]


@pytest.mark.parametrize("name", TOUCHY)
def test_a_measurement_leaves_no_trace(name: str) -> None:
    """Weights, buffers, gradients, flags, hooks and random streams are bitwise as before, the batch too."""
    model, inputs = built(name)
    model.train()
    next(model.children()).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(number % 3 > 0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    given = [value.clone() for value in (*inputs[0], *inputs[1].values()) if isinstance(value, Tensor)]
    before = traces(model)
    one = measure(model, found(name), linearization="jacobian", batch=batch_of(inputs))
    watch_updates(model, found(name), *inputs)
    update_ratios(model, found(name), *inputs)
    after = traces(model)
    for old, new in zip(before, after, strict=True):
        assert old == new if not isinstance(old, list) else all(same(a, b) for a, b in zip(old, new, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (np.random.get_state()[1] == numpy_state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
    now = [value for value in (*inputs[0], *inputs[1].values()) if isinstance(value, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(given, now, strict=True))
    assert measure(model, found(name), linearization="jacobian", batch=batch_of(inputs)).layers == one.layers


def same(old: Any, new: Any) -> bool:
    if isinstance(old, tuple) and isinstance(old[-1], Tensor):
        return bool(old[:-1] == new[:-1] and old[-1] is new[-1] and (new[-1] == 1).all())
    return bool(old == new)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_the_mode_of_the_caller_does_not_matter(context: Callable[[], Any]) -> None:
    """Inference mode, no grad, autocast; the batch may have been made there."""
    expected = jacobians("llama")
    model = example("llama").build()
    with context():
        inputs = example("llama").inputs(model)
        measurement = measure(model, found("llama"), linearization="jacobian", batch=batch_of(inputs))
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert measurement.layers == expected.layers


def test_narrow_weights_are_measured_in_float64() -> None:
    """A bfloat16 model gives what its weights give in float32, up to the rounding of the stream."""
    model, inputs = built("llama")
    narrow = model.bfloat16()
    half = measure(narrow, found("llama"), linearization="jacobian", batch=batch_of(inputs))
    full = measure(narrow.float(), found("llama"), linearization="jacobian", batch=batch_of(inputs))
    assert [layer.ratio for layer in half] == pytest.approx([layer.ratio for layer in full], rel=0.02)


# --- Updates ----------------------------------------------------------------------------------------------------------

WATCHED = ["nanogpt", "nanogpt_fused_residual", "gpt2", "granite", "mixtral", "plain_layer_scale", "torch_encoder_pre"]
WATCHED += ["macaron", "conformer_conv1d"]  # two MLPs, which are added up


@pytest.mark.parametrize("name", WATCHED)
def test_a_watch_sees_what_the_measurement_sees(name: str) -> None:
    """Without a pass of its own; constants behind a site and in-place sums are taken care of."""
    model, inputs = built(name)
    expected = {layer.index: layer.functional for layer in jacobians(name)}
    watch = watch_updates(model, found(name), *inputs)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with torch.no_grad(), watch:
        model(*inputs[0], **inputs[1])
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    by_pass = update_ratios(model, found(name), *inputs)
    assert set(watch.updates) == set(expected) == set(by_pass)
    for index, functional in expected.items():
        for updates in (watch.updates, by_pass):
            assert updates[index].ratio == pytest.approx(functional.update_ratio, rel=1e-4)
            assert updates[index].cosine == pytest.approx(functional.update_cosine, abs=1e-4)


def test_a_watch_sees_attached_scales() -> None:
    """They are part of the output of the site."""
    model, inputs = built("gpt2")
    watch = watch_updates(model, found("gpt2"), *inputs)
    with watch:
        model(**inputs[1])
    before = watch.updates[2].ratio
    scales = dict(attach_scales(model, found("gpt2")).named_parameters())
    with torch.no_grad():
        scales[found("gpt2")[2].mlp.site].fill_(math.log(2))
    with watch:
        model(**inputs[1])
    assert watch.updates[2].ratio == pytest.approx(2 * before, rel=1e-5)


@pytest.mark.parametrize("name", ["plain_two_alphas", "plain_functional_params", "shared_block", "mamba"])
def test_a_watch_leaves_out_what_its_hooks_cannot_see(name: str) -> None:
    """A learned multiplier behind the site, no module at all, several passes, a single branch."""
    model, inputs = built(name)
    watch = watch_updates(model, found(name), *inputs)
    with watch:
        model(*inputs[0], **inputs[1])
    assert watch.updates == {}


def test_an_update_of_nothing_has_no_ratio() -> None:
    """Nor one that is not finite; tensors of two shapes have no angle."""
    x = torch.ones(2, 3)
    size = pytest.approx(math.sqrt(6))
    assert Update.of(0 * x, x) == Update(mlp_norm=0.0, attention_norm=size)
    assert Update.of(x, math.inf * x) == Update(mlp_norm=size)
    assert Update.of(x, math.nan * x) == Update(mlp_norm=size)
    assert Update.of(2 * x, x.flatten()).cosine is None
    opposite = Update.of(3 * x, -x)
    assert (opposite.ratio, opposite.cosine) == pytest.approx((3.0, -1.0), rel=1e-6)


# --- The door ---------------------------------------------------------------------------------------------------------


def test_a_measurement_of_jacobians_is_a_measurement() -> None:
    """Its dictionary is JSON, its table says what it is, its values are those of the summary."""
    measurement = jacobians("gpt2")
    assert measurement.linearization == "jacobian"
    content = json.loads(json.dumps(measurement.to_dict()))
    assert content["layers"][0]["functional"]["frobenius_ratio"] == measurement.layers[0].functional.frobenius_ratio
    assert "linearization='jacobian'" in str(measurement)
    assert measurement.summary()["ratio_max"] == pytest.approx(max(layer.ratio for layer in measurement))
    model, _ = built("gpt2")
    assert all(layer.functional is None for layer in measure(model, found("gpt2")))


def test_inputs_are_guessed_as_for_the_search() -> None:
    """By the model's own convention; the blocks are searched for where they are not given."""
    model, inputs = built("gpt2")
    guessed = measure(model, linearization="jacobian")
    assert [layer.name for layer in guessed] == [block.name for block in found("gpt2")]
    assert guessed.layers != measure(model, linearization="jacobian", batch=batch_of(inputs)).layers
    assert measure(nn.Identity(), [], linearization="jacobian").layers == ()


class Guarded(nn.Module):
    """Takes nothing that anybody could guess."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, *, key: str) -> Tensor:
        """Open with the key only."""
        if key != "sesame":
            raise ValueError("wrong key")
        for block in self.blocks:
            x = block(x)
        return x


def test_where_no_batch_can_be_guessed_the_error_asks_for_one() -> None:
    """With a batch it works."""
    model = Guarded()
    batch = {"x": torch.randn(2, 5, HIDDEN), "key": "sesame"}
    blocks = find_blocks(model, batch=batch)
    with pytest.raises(ExampleInputError, match=r"real inputs, and none could be guessed: pass batch=.*Guarded"):
        measure(model, blocks, linearization="jacobian")
    with pytest.raises(ExampleInputError, match="cannot be run on the given example input: ValueError: wrong key"):
        measure(model, blocks, linearization="jacobian", batch={**batch, "key": "please"})
    assert all(layer.ratio is not None for layer in measure(model, blocks, linearization="jacobian", batch=batch))


def test_blocks_of_another_model_have_a_reason() -> None:
    """Their sites add nothing here."""
    model, inputs = built("nanogpt")
    layer = measure(model, found("gpt2"), linearization="jacobian", batch=batch_of(inputs)).layers[0]
    assert layer.mlp_reason == "no output of transformer.h.0.mlp is added to the residual stream in this pass" or (
        layer.mlp_norm is not None
    )
    layer = measure(model, found("llama"), linearization="jacobian", batch=batch_of(inputs)).layers[0]
    assert layer.mlp_reason == "no output of model.layers.0.mlp is added to the residual stream in this pass"


def test_blocks_from_hints_are_measured() -> None:
    """Described or found, a branch is the same function; a block that nobody traced knows no tokens, hence no gains."""
    model, inputs = built("nanogpt")
    hints = {f"{BLOCKS}.*": {"attention": {"site": "attn.c_proj"}, "mlp": {"site": "mlp.c_proj"}}}
    described = tuple(replace(block, token_dims=()) for block in find_blocks(model, batch=inputs[0], hints=hints))
    measurement = measure(model, described, linearization="jacobian", batch=batch_of(inputs))
    for layer, expected in zip(measurement, jacobians("nanogpt"), strict=True):
        assert layer.ratio == pytest.approx(expected.ratio, rel=1e-12)
        assert layer.functional.update_ratio == pytest.approx(expected.functional.update_ratio, rel=1e-12)
        assert layer.functional.frobenius_ratio == pytest.approx(expected.functional.frobenius_ratio, rel=1e-9)
        assert layer.functional.mlp_gain_mean is None


def test_a_block_may_be_listed_twice() -> None:
    """It is measured twice, to the same end."""
    model, inputs = built("nanogpt")
    block = found("nanogpt")[0]
    one, two = measure(model, [block, block], linearization="jacobian", batch=batch_of(inputs))
    assert one == two


@pytest.mark.parametrize("linearization", ["Jacobian", "", None])
def test_an_unknown_linearization_is_refused(linearization: Any) -> None:
    """The message names all three."""
    with pytest.raises(ConfigurationError, match=r"expected 'circuit' or 'paper' or 'jacobian'$"):
        measure(nn.Identity(), linearization=linearization)


def test_the_table_claims_no_zone_for_jacobians():
    model, (args, kwargs) = built("nanogpt")
    text = str(measure(model, linearization="jacobian", batch=args or kwargs))
    assert "linearization='jacobian', no safe zone is known" in text
    assert "the safe zone" not in text

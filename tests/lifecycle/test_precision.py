"""Watching and steering in every precision that a Trainer offers, and with weights of every size."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import read_journal
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from steered import unbalanced
from tiny_run import LitGPT, TinyGPT, fit
from torch import Tensor

from lightning_spectral import ExactSVD, ResidualRescaler, SpectralMonitor, attach_scales, find_blocks, measure
from lightning_spectral.control.optimizers import held, lost_steps

PRECISIONS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "32-true": ({"precision": "32-true"}, torch.float32),
    "bf16-mixed": ({"precision": "bf16-mixed"}, torch.float32),
    "bf16-true": ({"precision": "bf16-true"}, torch.bfloat16),
    "64-true": ({"precision": "64-true"}, torch.float64),
}


def scales(module: LitGPT) -> list[Tensor]:
    return [value for name, value in module.state_dict().items() if name.endswith("log_scale")]


def reference(module: LitGPT) -> list[float]:
    """Return the ratios of the weights as they are now, taken by dense decompositions in float64."""
    ratios = []
    for block in module.double().requires_grad_(False).model.blocks:
        value = block.attention.qkv.weight[32:] * block.norm1.weight
        attention = torch.linalg.matrix_norm(block.attention.proj.weight @ value, 2)
        mlp = torch.linalg.matrix_norm(block.mlp[2].weight @ (block.mlp[0].weight * block.norm2.weight), 2)
        gains = [
            part.residual_scale.log_scale.exp() if hasattr(part, "residual_scale") else 1.0
            for part in (block.mlp, block.attention)
        ]
        ratios.append(float(gains[0] * mlp / (gains[1] * attention)))
    return ratios


@pytest.mark.parametrize("steer", [False, True])
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_last_measurement_is_that_of_float64(tmp_path: Path, name: str, steer: bool):
    flags, dtype = PRECISIONS[name]
    module = unbalanced()
    rescaler = ResidualRescaler(patience=1) if steer else False
    fit(tmp_path, SpectralMonitor(2, rescaler, on_error="raise"), module=module, max_steps=7, **flags)
    records = read_journal(tmp_path / "spectral.jsonl")[1]
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert bool(scales(module)) is steer
    assert [layer["ratio"] for layer in records[-1]["layers"]] == pytest.approx(reference(module), rel=1e-2)
    first, last = ([layer["ratio"] for layer in record["layers"]] for record in (records[0], records[-1]))
    assert not steer or all(new < 0.5 * old for old, new in zip(first, last, strict=True))


def test_scales_of_16_bits_learn_although_a_factor_would_not(tmp_path: Path):
    """Next to 1 bfloat16 has 0.996 and 1.008, next to 0 it has much smaller numbers: steps of 1e-3 count."""
    module = unbalanced()
    module.learning_rate = 1e-3
    fit(tmp_path, SpectralMonitor(100, ResidualRescaler()), module=module, precision="bf16-true", max_steps=16)
    assert [value.dtype for value in scales(module)] == [torch.bfloat16] * 6
    assert all(value.item() != 0.0 for value in scales(module))
    assert 5e-3 < max(abs(value.item()) for value in scales(module)) < 0.02


@pytest.mark.parametrize(
    ("start", "factor", "moves"),
    [(1.0, lambda g: g, False), (0.0, lambda g: 1 + g, True), (0.0, torch.exp, True)],
    ids=["direct", "1 + g", "exp(g)"],
)
def test_only_what_is_stored_around_zero_takes_small_steps_in_16_bits(start: float, factor: Any, moves: bool):
    ends = []
    for dtype in (torch.bfloat16, torch.float64):
        parameter = torch.nn.Parameter(torch.tensor([start], dtype=dtype))
        optimizer = torch.optim.AdamW([parameter], lr=1e-3)
        for step in range(16):
            factor(parameter).mul(-0.1 if step % 8 else 0.01).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(factor(parameter.detach().double()).item() - 1)
    narrow, wide = ends
    assert 5e-3 < wide < 16e-3
    assert narrow == (pytest.approx(wide, rel=0.05) if moves else 0.0)


def preset(value: float, learning_rate: float) -> LitGPT:
    """Return a module whose scales have moved far from 1 already."""
    module = unbalanced()
    module.learning_rate = learning_rate
    for _, scale in attach_scales(module).named_parameters():
        scale.data.fill_(value)
    return module


def told_of_rounding(tmp_path: Path, module: LitGPT, precision: str) -> list[str]:
    """Train, measuring often, with a law that moves nothing, and return the warnings about rounding."""
    monitor = SpectralMonitor(2, ResidualRescaler(patience=99), on_error="raise")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path, monitor, module=module, precision=precision, max_steps=8)
    return [str(item.message) for item in told if "residual scales have gradients" in str(item.message)]


def test_steps_of_scales_that_rounding_swallows_are_told_once(tmp_path: Path):
    (message,) = told_of_rounding(tmp_path, preset(0.6, 1e-3), "bf16-true")
    assert message == (
        "SpectralMonitor, step 4: 6 of 6 residual scales have gradients and have not moved since the last measurement: "
        "rounding to 16 bits swallows their steps. At 'model.blocks.0.attention' the logarithm of the scale is 0.6016, "
        "the next 16-bit number is 0.0039 away, and a step of less than half of that is lost. Train with "
        "precision='bf16-mixed' or at a larger rate, or let the controller alone move the scales, "
        "auto_rescale=ResidualRescaler(learnable=False)"
    )


@pytest.mark.parametrize(
    ("value", "learning_rate", "precision"),
    [
        (0.6, 1e-2, "bf16-true"),  # large steps
        (0.01, 1e-3, "bf16-true"),  # near zero
        (0.6, 1e-6, "32-true"),
        (0.6, 1e-3, "bf16-mixed"),
        (0.6, 0.0, "bf16-true"),  # nothing is to be learned
    ],
)
def test_scales_whose_steps_count_are_not_told_of(tmp_path: Path, value: float, learning_rate: float, precision: str):
    assert told_of_rounding(tmp_path, preset(value, learning_rate), precision) == []


def test_the_step_of_plain_descent_is_the_rate_times_the_gradient():
    """Gradients of 0.01 and of 10, at the same rate: the first step is lost, the second is not."""
    scales_ = {name: torch.nn.Parameter(torch.tensor([0.6], dtype=torch.bfloat16)) for name in ("small", "large")}
    optimizer = torch.optim.SGD(scales_.values(), lr=0.1)
    before = {name: held(scale).clone() for name, scale in scales_.items()}
    (0.01 * scales_["small"] + 10 * scales_["large"]).sum().backward()
    assert [lost.name for lost in lost_steps([optimizer], scales_, before)] == ["small"]  # nobody has stepped yet
    optimizer.step()
    ((name, value, distance),) = lost_steps([optimizer], scales_, before)
    assert name == "small"
    neighbour = torch.nextafter(before["small"], torch.tensor(1.0, dtype=torch.bfloat16))
    assert (value, distance) == (before["small"].item(), (neighbour - before["small"]).item())


# Gradient scaling


class Clipped(LitGPT):
    """Remembers the gradients of the scales as the optimizer sees them."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        found = [p.grad.clone() for name, p in self.named_parameters() if name.endswith("log_scale")]
        self.seen = [*getattr(self, "seen", []), torch.cat(found)]


def scaled(start: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=start, growth_interval=3))


@pytest.mark.parametrize("geometry", [False, True])
def test_gradient_scaling_is_not_noticed_and_does_not_notice(tmp_path: Path, geometry: bool):
    weights = []
    for monitors in ([], [SpectralMonitor(2, geometry=geometry, on_error="raise")]):
        module, precision = unbalanced(), scaled(1024.0)
        fit(tmp_path / str(len(monitors)), monitors, module=module, plugins=[precision])
        assert precision.scaler.get_scale() == 4096.0
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_scales_are_steered_and_learned_under_gradient_scaling(tmp_path: Path):
    """A move is a change of the parameter, so that the factor on the gradients has no part in it."""
    ends = []
    for start in (1.0, 1024.0):
        module = Clipped()
        module.load_state_dict(unbalanced().state_dict())
        rescaler = ResidualRescaler(patience=1)
        fit(tmp_path / str(start), SpectralMonitor(2, rescaler), module=module, plugins=[scaled(start)])
        ends.append((torch.cat(scales(module)), module.seen[0]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=2e-3)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=2e-2, atol=1e-4)
    assert all(abs(value.item()) > 0.05 for value in ends[1][0])


def test_steps_that_the_scaler_skips_are_measured_like_others(tmp_path: Path):
    """2^60 overflows half precision: the scaler skips steps until it has backed off."""
    module, precision = unbalanced(), scaled(2.0**60)
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer = fit(tmp_path, SpectralMonitor(2, True, on_error="raise"), module=module, plugins=[precision], max_steps=4)
    assert trainer.global_step == 4
    assert precision.scaler.get_scale() == 2.0**56
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters() if name in before)
    assert all(layer["ratio"] for record in read_journal(tmp_path / "spectral.jsonl")[1] for layer in record["layers"])


@pytest.mark.filterwarnings("ignore:SpectralMonitor, FAILURE")
def test_true_half_precision_is_watched(tmp_path: Path):
    seed_everything(0)
    module = LitGPT(learning_rate=1e-5)  # AdamW in half precision divides by zero: an epsilon of 1e-8 is 0 there
    fit(tmp_path, SpectralMonitor(2, on_error="raise"), module=module, plugins=[HalfPrecision("16-true")], max_steps=1)
    first = read_journal(tmp_path / "spectral.jsonl")[1][0]
    assert all(layer["ratio"] is not None for layer in first["layers"])


# Linear algebra


def test_inside_autocast_the_numbers_are_those_outside():
    model = TinyGPT()
    scales_ = attach_scales(model)
    outside = measure(model, scales_.blocks, solver=ExactSVD())
    with torch.autocast("cpu", torch.bfloat16):
        inside = measure(model, scales_.blocks, solver=ExactSVD())
        found = measure(model)
    assert inside.layers == outside.layers
    assert [layer.ratio for layer in found] == pytest.approx([layer.ratio for layer in outside], rel=1e-2)


@pytest.mark.filterwarnings("ignore:SpectralMonitor, FAILURE at step")  # the stream of the largest overflows
@pytest.mark.parametrize("exponent", [-20, 20])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_of_any_size_have_the_ratio_of_their_quotient(tmp_path: Path, precision: str, exponent: int):
    """Both matrices of both branches times a power of ten: products beyond float32 cancel in the ratio."""
    plain, huge = unbalanced(), unbalanced()
    blocks = find_blocks(plain)  # in the other one, 1e-20 is lost beside the stream and 1e20 overflows it
    with torch.no_grad():
        for block in huge.model.blocks:
            for linear in (block.attention.qkv, block.attention.proj, block.mlp[0], block.mlp[2]):
                linear.weight.mul_(10.0**exponent)
    records = []
    for name, module in (("plain", plain), ("huge", huge)):
        module.learning_rate = 0.0
        monitor = SpectralMonitor(1, blocks=blocks, geometry=False, on_error="raise")  # 1e20 overflows the stream
        fit(tmp_path / name, monitor, module=module, max_steps=1, precision=precision)
        records.append(read_journal(tmp_path / name / "spectral.jsonl")[1][0]["layers"])
    for one, other in zip(*records, strict=True):
        assert other["ratio"] == pytest.approx(one["ratio"], rel=2e-2)
        for norm in ("mlp_norm", "attention_norm"):
            assert math.log10(other[norm] / one[norm]) == pytest.approx(2 * exponent, abs=1e-2)
    with (tmp_path / "huge" / "metrics.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["spectral/mlp_norm_max"])
    assert float(row["spectral/mlp_norm_max"]) == pytest.approx(max(layer["mlp_norm"] for layer in records[1]))

"""Sizes behind branches that are carried from one measurement to the next."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_spectral import find_blocks
from lightning_spectral.linalg import Diagonal, LinearOperator, Matrix, Product
from lightning_spectral.measuring import norm_sizes as module
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.measuring.norm_sizes import NormSize, norm_sizes
from lightning_spectral.weights.model import ModelWeights

WIDTH, HIDDEN = 640, 160  # wider than what is multiplied column by column


def weights(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(WIDTH, HIDDEN, generator=generator) * scale / math.sqrt(HIDDEN)
    up = torch.randn(HIDDEN, WIDTH, generator=generator) / math.sqrt(WIDTH)
    return down, up


def chain(down: Tensor, up: Tensor) -> LinearOperator:
    return Product(Matrix(down), Matrix(up))


def exact(operator: LinearOperator) -> float:
    return float(torch.linalg.matrix_norm(operator.dense()))


def moved(pair: tuple[Tensor, Tensor], size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in pair:
        weight += size * weight.std() * torch.randn(weight.shape, generator=generator)


def one(operator: LinearOperator, before: NormSize | None = None, *, carry: bool = True) -> NormSize:
    (size,) = norm_sizes([operator], [None], [before], carry=carry)
    assert size is not None
    return size


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2])
def test_a_carried_size_follows_weights_that_move(rate: float):
    errors = []
    for seed in range(6):
        pair = weights(seed)
        operator = chain(*pair)
        size = one(operator)
        first = exact(operator) / size.size
        for step in range(8):
            moved(pair, rate, 100 * seed + step)
            pair[0].mul_(1 + rate)  # a drift, which chance alone would not show
            size = one(operator, size)
            # What the anchor missed it misses still; the rest is what carrying adds.
            errors.append(abs(exact(operator) / size.size / first - 1))
            assert abs(exact(operator) / size.size / first - 1) <= 4 * module._CARRIED
    assert sorted(errors)[len(errors) // 2] < 0.05 * 8 * rate


def test_a_size_is_anchored_anew_where_the_weights_have_moved_far():
    pair = weights(0)
    operator = chain(*pair)
    before = one(operator)
    moved(pair, 2e-3, 1)
    near = one(operator, before)
    assert (near.anchor, near.squares) == (before.anchor, before.squares)
    moved(pair, 1.0, 2)
    assert one(operator, near) == one(operator) != near


def test_a_carried_size_takes_one_read_of_sixteen_columns():
    pair = weights(0)
    operator, subspace = chain(*pair), torch.linalg.qr(torch.randn(WIDTH, 6))[0]
    products = []
    sizes: list[NormSize | None] = [None]
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            sizes = norm_sizes([operator], [subspace], sizes)
        products.append(counter.get_total_flops())
        moved(pair, 1e-3, 3)
    read = 2 * sum(weight.numel() for weight in pair)
    assert products[1:] == [16 * read, 16 * read]
    assert products[0] > 8 * products[1]


def test_the_weights_of_an_exact_solver_are_not_carried():
    pair = weights(0)
    size = one(chain(*pair), carry=False)
    assert not size.squares
    moved(pair, 1e-3, 1)
    assert one(chain(*pair), size) == one(chain(*pair))


@pytest.mark.parametrize("scale", [1e-30, 1e30, 0.0, math.nan, math.inf])
def test_a_size_out_of_range_is_estimated_each_time(scale: float):
    pair = weights(0, scale)
    size = one(chain(*pair))
    assert not size.squares
    expected = exact(chain(*pair)) if math.isfinite(scale) else math.nan
    assert size.size == pytest.approx(expected, rel=0.1, nan_ok=True)
    again = one(chain(*weights(0)), size)
    assert again == one(chain(*weights(0)))  # and it comes back


def test_a_matrix_between_gains_is_exact_each_time():
    W, gain = torch.randn(80, WIDTH), torch.rand(80)
    operator = Product(Diagonal(gain), Matrix(W))
    size = one(operator)
    W.mul_(1.01)
    again = one(operator, size)
    assert (size.squares, again.deviation) == ((), 0.0)
    assert again.size == pytest.approx(float((gain[:, None] * W).norm()), rel=1e-5)


def gemma(kind: str) -> Meter:
    """A model with norms behind its branches, wide enough that their sizes are carried."""
    settings = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "eos_token_id": 1,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = transformers.AutoConfig.for_model(kind, **settings, **heads, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return Meter(ModelWeights(model), find_blocks(model))


def ratios(meter: Meter) -> list[float | None]:
    return [layer.ratio for layer in meter.measure().layers]


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_a_resumed_meter_measures_the_same_bits(kind: str):
    meter = gemma(kind)
    ratios(meter)
    model, blocks = meter.weights.model, meter.blocks
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 2e-3 * torch.randn_like(parameter) * parameter.abs().mean()
        resumed = Meter(ModelWeights(model), blocks)
        resumed.load_state_dict(meter.state_dict())
        straight = ratios(meter)
        assert straight == ratios(resumed)
    assert all(size is not None and size.anchor[0] != size.size for size in meter._sizes)
    assert straight == pytest.approx(ratios(Meter(ModelWeights(model), blocks, solver="exact")), rel=0.02)


def test_a_state_from_before_there_were_sizes_is_taken_up():
    meter = gemma("gemma2")
    ratios(meter)
    state = meter.state_dict()
    del state["sizes"]
    resumed = Meter(meter.weights, meter.blocks)
    resumed.load_state_dict(state)
    assert ratios(resumed) == pytest.approx(ratios(meter), rel=1e-6)

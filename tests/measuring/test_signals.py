"""The signals beside the norms, each against its definition on dense matrices."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from spectra import SPECTRA, with_spectrum
from torch import Tensor, nn
from zoo import example

from lightning_spectral import ExactSVD, Measurement, RandomizedSVD, ResidualBlock, find_blocks, measure
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import LinearOperator, Matrix, Product, SolverState
from lightning_spectral.linalg.norms.solution import Memory
from lightning_spectral.measuring.linearize import linearize_kind
from lightning_spectral.measuring.meter import Meter
from lightning_spectral.measuring.signals import (
    SIGNALS,
    alignment,
    dominant_output,
    neighbours,
    relative_change,
    stable_rank,
)
from lightning_spectral.records import WeightSignals
from lightning_spectral.weights.model import ModelWeights

WIDTH = 64
SOLVERS = {"randomized": RandomizedSVD(), "exact": ExactSVD()}


def remembered(solver: Any, operators: Sequence[LinearOperator], state: SolverState | None = None) -> SolverState:
    state = solver.init(operators) if state is None else state
    return solver.compute(operators, replace(state, keeps_images=True))[1]


def step(model: nn.Module, size: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def dense(model: nn.Module, block: ResidualBlock, word: str) -> Tensor:
    """The operator of a dense branch, formed."""
    kind = block.mlp_branches if word == "mlp" else block.attention_branches
    ((_, item),) = linearize_kind(ModelWeights(model), kind, "circuit")
    return item.operator.dense()


def wide() -> tuple[nn.Module, Sequence[ResidualBlock]]:
    """Three blocks that are wide enough for the iteration, where smaller ones are solved densely."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    step(model, 0.1)
    return model, find_blocks(model, batch=torch.zeros(1, 4, WIDTH))


# --- Change -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("shape", [(20, 30), (150, 120), (120, 300)])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_a_change_is_the_quotient_of_frobenius_norms(name: str, shape: tuple[int, int], size: float, generator):
    generator.manual_seed(1)  # the solver's probes are the numbers of seed 0
    weight = torch.randn(shape, generator=generator)
    change = size * torch.randn(shape, generator=generator)
    solver = SOLVERS[name]
    before = remembered(solver, [Matrix(weight)])
    after = remembered(solver, [Matrix(weight + change)], before)
    exact = float(change.norm() / weight.norm())
    assert relative_change(before.memories[0], after.memories[0]) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_spreads_no_more_than_promised(seed: int, generator):
    """A change of rank 1 is the hardest: 25 % for 8 probes."""
    generator.manual_seed(7)
    weight = with_spectrum(SPECTRA["flat"](120), 120, 120, generator).float()
    change = 0.1 * torch.outer(torch.randn(120, generator=generator), torch.randn(120, generator=generator)) / 120
    solver = RandomizedSVD(seed=seed)
    before = remembered(solver, [Matrix(weight)])
    after = remembered(solver, [Matrix(weight + change)], before)
    exact = float(change.norm() / weight.norm())
    assert relative_change(before.memories[0], after.memories[0]) == pytest.approx(exact, rel=4 * 0.25)


def test_weights_that_stay_have_not_changed(generator):
    operators = [Matrix(torch.randn(100, 100, generator=generator)), Matrix(torch.randn(20, 20, generator=generator))]
    before = remembered(RandomizedSVD(), operators)
    after = remembered(RandomizedSVD(), operators, before)
    for old, new in zip(before.memories, after.memories, strict=True):
        assert relative_change(old, new) < 1e-6  # a cold product has other columns than a warm one


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_a_change_is_relative_where_products_leave_the_range(size: float, generator):
    first, second = (torch.randn(80, 80, generator=generator) for _ in range(2))
    solver = RandomizedSVD()
    before = remembered(solver, [Product(Matrix(first * size), Matrix(second * size))])
    after = remembered(solver, [Product(Matrix(first * size), Matrix(2.5 * second * size))], before)
    assert relative_change(before.memories[0], after.memories[0]) == pytest.approx(1.5, rel=1e-4)


def test_a_change_is_not_known_from_other_probes(generator):
    operator = [Matrix(torch.randn(100, 100, generator=generator))]
    one = remembered(RandomizedSVD(), operator).memories[0]
    assert relative_change(one, remembered(ExactSVD(), operator).memories[0]) is None
    assert relative_change(replace(one, latest=None), one) is None
    assert relative_change(one, replace(one, latest=None)) is None
    zero = replace(one, latest=torch.zeros_like(one.latest))
    assert relative_change(zero, one) is None


def test_images_are_kept_only_where_they_are_asked_for(generator):
    operators = [Matrix(torch.randn(100, 100, generator=generator))]
    for solver in SOLVERS.values():
        _, plain = solver.compute(operators, solver.init(operators))
        kept = remembered(solver, operators)
        assert plain.memories[0].latest is None
        assert kept.memories[0].latest is not None
        assert "latest" not in plain.state_dict()["memories"][0]
        torch.testing.assert_close(plain.memories[0].subspace, kept.memories[0].subspace, rtol=0, atol=0)
        assert not kept.keeps_images


# --- Stable rank and alignment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SPECTRA))
def test_the_stable_rank_is_that_of_the_singular_values(name: str, generator):
    A = with_spectrum(SPECTRA[name](120), 130, 120, generator)
    sigma = torch.linalg.svdvals(A)
    exact = float((sigma / sigma[0]).square().sum())
    (norm,), state = SOLVERS["randomized"].compute([Matrix(A.float())], SOLVERS["randomized"].init([Matrix(A.float())]))
    found = stable_rank(Matrix(A.float()), norm.value, state.subspaces[0])
    assert found == pytest.approx(exact, rel=2 * 0.01 + 1e-4)  # the norm is at most 1 % too small
    product = Product(Matrix(A.float()), Matrix(torch.eye(120)))
    assert stable_rank(product, norm.value, state.subspaces[0]) == pytest.approx(exact, rel=0.2)


def test_no_stable_rank_of_nothing():
    assert stable_rank(Matrix(torch.zeros(4, 4)), 0.0) is None
    assert stable_rank(Matrix(torch.full((4, 4), math.nan)), 1.0) is None


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_dominant_output_is_the_left_singular_vector(name: str, generator):
    A = with_spectrum(torch.tensor([5.0, 3.0, 2.0, 1.0]), 120, 100, generator)
    solver = SOLVERS[name]
    _, state = solver.compute([Matrix(A.float())], solver.init([Matrix(A.float())]))
    u = dominant_output(Matrix(A.float()), state.subspaces[0])
    assert float(torch.dot(u, torch.linalg.svd(A).U[:, 0]).abs()) == pytest.approx(1.0, abs=1e-5)
    assert dominant_output(Matrix(torch.zeros(5, 5)), torch.eye(5)) is None


def test_alignment_of_vectors(generator):
    u = torch.nn.functional.normalize(torch.randn(50, generator=generator), dim=0)
    assert alignment(u, -u) == pytest.approx(1.0)
    assert alignment(u, u) <= 1.0
    assert alignment(torch.eye(3)[0], torch.eye(3)[1]) == 0.0
    assert alignment(u, torch.ones(49)) is None
    assert alignment(None, u) is None
    draws = torch.nn.functional.normalize(torch.randn(4000, 50, generator=generator), dim=1)
    mean = sum(alignment(u, v) for v in draws) / len(draws)
    assert mean == pytest.approx(math.sqrt(2 / math.pi / 50), rel=0.05)


def test_neighbours_are_of_one_stack():
    blocks = [ResidualBlock(i, name, ()) for i, name in enumerate(["enc.0", "enc.1", "dec.0", "dec.1"])]
    assert [(one.name, other.name) for one, other in neighbours(blocks)] == [("enc.0", "enc.1"), ("dec.0", "dec.1")]
    assert neighbours([blocks[0], replace(blocks[1], index=5)]) == []


# --- The meter --------------------------------------------------------------------------------------------------------


def test_a_meter_gives_what_was_asked_for_against_dense_operators():
    model, blocks = wide()
    meter = Meter(ModelWeights(model), blocks, signals=SIGNALS)
    first = meter.measure()
    old = {(block.index, word): dense(model, block, word) for block in blocks for word in ("mlp", "attention")}
    assert all(layer.weights.mlp_change is None and layer.weights.attention_change is None for layer in first)
    step(model, 1e-3)
    second = meter.measure(1)
    for block, layer in zip(blocks, second, strict=True):
        for word in ("mlp", "attention"):
            A, B = old[block.index, word], dense(model, block, word)
            sigma = torch.linalg.svdvals(B)
            change, rank = (getattr(layer.weights, f"{word}_{name}") for name in ("change", "stable_rank"))
            assert change == pytest.approx(float((B - A).norm() / A.norm()), rel=0.3)
            assert rank == pytest.approx(float((sigma / sigma[0]).square().sum()), rel=0.03)
        if block.index + 1 < len(blocks):
            u = torch.linalg.svd(dense(model, block, "mlp")).U[:, 0]
            v = torch.linalg.svd(dense(model, blocks[block.index + 1], "attention")).Vh[0]
            assert layer.weights.alignment == pytest.approx(float(torch.dot(u, v).abs()), abs=0.05)
    assert second.layers[-1].weights.alignment is None


@pytest.mark.parametrize("signal", SIGNALS)
def test_nothing_else_is_given(signal: str):
    model, blocks = wide()
    meter = Meter(ModelWeights(model), blocks, signals=[signal])
    meter.measure()
    step(model, 1e-3)
    found = [layer.weights or WeightSignals() for layer in meter.measure(1)]
    known = {name for weights in found for name, value in asdict(weights).items() if value is not None}
    assert known == {name for name in asdict(WeightSignals()) if name.endswith(signal)}


def test_no_signal_costs_nothing_and_changes_nothing():
    model, blocks = wide()
    plain, asked = (Meter(ModelWeights(model), blocks, signals=names) for names in ((), SIGNALS))
    for size in (0.0, 1e-3, 1e-1):
        step(model, size)
        one, other = plain.measure(), asked.measure()
        assert all(layer.weights is None for layer in one)
        assert one == replace(other, layers=tuple(replace(layer, weights=None) for layer in other))
    assert all("latest" not in memory for memory in plain.state_dict()["solver"]["memories"])


def test_a_resumed_meter_goes_on_bitwise():
    model, blocks = wide()
    meter = Meter(ModelWeights(model), blocks, signals=SIGNALS)
    meter.measure()
    file = io.BytesIO()
    torch.save(meter.state_dict(), file)
    file.seek(0)
    resumed = Meter(ModelWeights(model), blocks, signals=SIGNALS)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for number in range(2):
        step(model, 1e-3, number)
        assert resumed.measure() == meter.measure()


@pytest.mark.parametrize("name", ["mixtral", "albert", "gemma2", "t5", "torch_encoder_pre", "mamba", "vit"])
def test_signals_of_other_architectures(name: str):
    """One expert, shared weights, norms behind branches, two stacks: numbers where there is a norm, and no error."""
    member = example(name)
    model = member.build()
    args, kwargs = member.inputs(model)
    blocks = find_blocks(model, batch=kwargs or args)
    meter = Meter(ModelWeights(model), blocks, signals=SIGNALS)
    meter.measure()
    step(model, 1e-2)
    layers = meter.measure(1).layers
    for layer in layers:
        for word in ("mlp", "attention"):
            measured = bool(getattr(layer, f"{word}_norm"))
            weights = layer.weights or WeightSignals()
            assert (getattr(weights, f"{word}_change") is not None) == measured
            assert (getattr(weights, f"{word}_stable_rank") or 1.0) >= 1.0 - 1e-3
    followed = [layer for layer in layers if layer.weights and layer.weights.alignment is not None]
    assert len(followed) == len(neighbours(blocks)) or name == "mamba"


def test_shares_of_two_processes_make_the_whole():
    model, blocks = wide()
    whole = Meter(ModelWeights(model), blocks, signals=SIGNALS).measure()
    for rank in range(2):
        share = Meter(ModelWeights(model), blocks, signals=SIGNALS).measure(0, (rank, 2))
        for position, (one, other) in enumerate(zip(share, whole, strict=True)):
            if position % 2 == rank:
                assert one.weights == other.weights
            else:
                assert (one.weights, one.mlp_norm, one.attention_norm) == (None, None, None)


def test_there_is_no_alignment_of_what_is_no_map_of_the_stream():
    model, blocks = wide()
    measurement = measure(model, blocks, linearization="paper", signals=("alignment", "stable_rank"))
    assert all(layer.weights.alignment is None and layer.weights.mlp_stable_rank for layer in measurement)


def test_weights_that_are_not_finite_have_no_signals():
    model, blocks = wide()
    meter = Meter(ModelWeights(model), blocks, signals=SIGNALS)
    meter.measure()
    kept = next(iter(blocks[0].mlp.factors)).parameter
    with torch.no_grad():
        model.get_parameter(kept).fill_(math.nan)
    first = meter.measure().layers[0].weights
    assert (first.mlp_change, first.mlp_stable_rank, first.alignment) == (None, None, None)
    assert first.attention_stable_rank is not None


@pytest.mark.parametrize("signals", ["chance", ("change", "chance"), 3, [None]])
def test_an_unknown_signal_is_told(signals: Any):
    with pytest.raises(ConfigurationError, match=r"signals=.* is none of 'change', 'stable_rank', 'alignment', 'logit"):
        measure(*wide(), signals=signals)


def test_one_signal_is_some():
    model, blocks = wide()
    assert Meter(ModelWeights(model), blocks, signals="change").signals == ("change",)
    assert Meter(ModelWeights(model), blocks, signals={"alignment", "change"}).signals == ("change", "alignment")


def test_jacobians_have_no_signals():
    with pytest.raises(ConfigurationError, match="Jacobians have none, expected linearization='circuit'"):
        measure(*wide(), linearization="jacobian", signals=("change",))


def test_a_measurement_with_signals_prints_and_makes_rows():
    measurement: Measurement = measure(*wide(), signals=SIGNALS)
    row = measurement.layers[0].row()
    assert "weights" not in row
    assert row["mlp_stable_rank"] == measurement.layers[0].weights.mlp_stable_rank
    known = measurement.to_dict()["layers"][0]["weights"]
    assert sorted(known) == ["alignment", "attention_stable_rank", "logit_bound", "mlp_stable_rank"]
    assert "weights" not in measure(*wide()).to_dict()["layers"][0]


def test_a_memory_without_images_is_the_memory_of_before(generator):
    state = SolverState(0, (Memory(torch.eye(3), torch.zeros(0, 3), 1.0),))
    assert set(state.state_dict()["memories"][0]) == {"subspace", "images", "upper", "exponent"}

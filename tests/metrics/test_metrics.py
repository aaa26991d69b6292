"""The metrics against the definitions that they stream: batches, masks, precision, collections, processes, plots."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run
from streamed import MAKE, METRICS, WIDTH, collection, distributed_data, ratio_model, some, tokens
from tiny_run import TinyGPT
from torch import nn
from torchmetrics import MetricCollection

from lightning_spectral import measure
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.metrics import EffectiveRank, SpectralRatio, StableRank, TokenResidual, TokenSimilarity
from lightning_spectral.tokens import (
    effective_rank,
    massive_activations,
)

every_metric = pytest.mark.parametrize("name", METRICS)


@every_metric
def test_a_stream_is_its_whole(name, generator):
    make, whole = METRICS[name]
    X, mask = tokens(generator, 12, 9), some(generator, 12, 9)
    for cuts in ([12], [1] * 12, [5, 1, 6], [2, 10]):
        metric = make()
        for x, m in zip(X.split(cuts), mask.split(cuts), strict=True):
            metric.update(x, mask=m)
        torch.testing.assert_close(metric.compute(), whole(X, mask), rtol=1e-9, atol=1e-12)
        metric.reset()
        metric.update(X.view(3, 4, 9, WIDTH))
        torch.testing.assert_close(metric.compute(), whole(X), rtol=1e-9, atol=1e-12)


@every_metric
def test_one_sequence_needs_no_batch(name, generator):
    make, whole = METRICS[name]
    X = tokens(generator, 9)
    metric = make()
    metric.update(X)
    torch.testing.assert_close(metric.compute(), whole(X[None]), rtol=1e-9, atol=1e-12)


@every_metric
def test_forward_gives_the_batch_and_adds_to_the_stream(name, generator):
    make, whole = METRICS[name]
    X = tokens(generator, 4, 9)
    metric = make()
    for x in X.split(2):
        torch.testing.assert_close(metric(x), whole(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(metric.compute(), whole(X), rtol=1e-9, atol=1e-12)


@every_metric
def test_merged_states_are_the_stream(name, generator):
    make, whole = METRICS[name]
    X = tokens(generator, 5, 9)
    first, second = make(), make()
    first.update(X[:2])
    second.update(X[2:])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole(X), rtol=1e-9, atol=1e-12)


@every_metric
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_counted_and_left_out(name, value, generator):
    """A rank leaves out the token, a mean over sequences the sequence."""
    make, whole = METRICS[name]
    X, mask = tokens(generator, 5, 9), some(generator, 5, 9)
    broken = X.clone()
    broken[1, :2, 3] = value
    broken[4] = broken[4].masked_fill(~mask[4][:, None], value)  # masked, so of no account
    metric = make()
    metric.update(broken, mask)
    if "rank" in name:
        assert metric.unmeasured == 2
        mask[1, :2] = False
        expected = whole(X, mask)
    else:
        assert metric.unmeasured == 1
        expected = whole(X[[0, 2, 3, 4]], mask[[0, 2, 3, 4]])
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=1e-12)
    assert metric.compute().isfinite()


@every_metric
def test_nothing_is_nan(name):
    metric = MAKE[name]()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute().isnan()
    metric.update(torch.full((2, 9, WIDTH), math.nan))
    assert metric.compute().isnan()
    assert metric.unmeasured == (18 if "rank" in name else 2)
    metric.reset()
    metric.update(torch.zeros(2, 9, WIDTH))
    assert metric.compute().isnan()


@pytest.mark.parametrize("make", [lambda: EffectiveRank(WIDTH, centred=True), lambda: StableRank(WIDTH, centred=True)])
def test_nothing_is_left_of_equal_tokens_but_rounding(make, generator):
    metric = make()
    for count in (7, 9, 30):
        metric.update((1000 * torch.arange(1.0, WIDTH + 1).double().sin()).expand(count, 9, WIDTH))
        assert metric.compute().isnan()


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype, generator):
    """Inputs, modules that were moved, and autocast: sums are kept in float64 all the same."""
    make, whole = METRICS[name]
    X = tokens(generator, 8, 9).to(dtype)
    module = nn.ModuleDict({"metric": make()}).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in X.split(2):
            module["metric"].update(x)
        value = module["metric"].compute()
    torch.testing.assert_close(value, whole(X.double()), rtol=1e-9, atol=1e-12)


@every_metric
def test_large_and_small_activations(name, generator):
    make, whole = METRICS[name]
    X = tokens(generator, 4, 9)
    for scale in (1e20, 1e-20):
        metric = make()
        metric.update(X * scale)
        torch.testing.assert_close(metric.compute(), whole(X), rtol=1e-5, atol=1e-7)


@every_metric
def test_single_precision_on_request(name, generator):
    make, whole = METRICS[name]
    metric = make().set_dtype(torch.float32)
    X = tokens(generator, 4, 9)
    metric.update(X)
    torch.testing.assert_close(metric.compute().double(), whole(X), rtol=1e-4, atol=1e-6)


@every_metric
def test_pickles_copies_and_checkpoints_go_on(name, generator):
    make, whole = METRICS[name]
    X = tokens(generator, 4, 9)
    metric = make()
    metric.update(X[:2])
    saved = make()
    metric.persistent(True)
    saved.load_state_dict(metric.state_dict())
    for other in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone(), saved):
        other.update(X[2:])
        torch.testing.assert_close(other.compute(), whole(X), rtol=1e-9, atol=1e-12)


@every_metric
def test_gradients_pass_through_a_batch_and_stay_out_of_the_stream(name, generator):
    make, whole = METRICS[name]
    metric = make()
    assert metric.is_differentiable
    X = tokens(generator, 3, 9).double().requires_grad_()
    (actual,) = torch.autograd.grad(metric(X), X)
    (expected,) = torch.autograd.grad(whole(X), X)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    metric(X)
    assert not any(state.requires_grad for state in metric.metric_state.values())
    metric.update(X)
    assert not metric.compute().requires_grad


@pytest.fixture
def pyplot(monkeypatch: pytest.MonkeyPatch):
    """Return pyplot without a window."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "backend", "Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.mark.parametrize("name", [*METRICS, "ratio"])
def test_plots(name, generator, pyplot):
    metric = SpectralRatio() if name == "ratio" else MAKE[name]()
    inputs = [TinyGPT() if name == "ratio" else tokens(generator, 2, 9) for _ in range(3)]
    values = [metric(x) for x in inputs]
    figure, axes = metric.plot()
    assert axes.get_ylabel() == type(metric).__name__
    assert axes.lines[0].get_ydata()[0] == pytest.approx(metric.compute().item())
    _, axes = pyplot.subplots()
    figure, same = metric.plot(values, ax=axes)
    assert figure is None
    assert same is axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([value.item() for value in values])
    low, high = metric.plot_lower_bound, metric.plot_upper_bound
    assert all(low <= value and (high is None or value <= high) for value in values)
    assert not axes.texts  # nothing is called optimal


def test_a_collection(generator):
    metrics, model = collection(), TinyGPT()
    X, mask = tokens(generator, 6, 9), some(generator, 6, 9)
    for x, m in zip(X.split(2), mask.split(2), strict=True):
        metrics.update(x=x, mask=m, model=model)
    values = metrics.compute()
    assert values["val/ratio"].item() == pytest.approx(measure(model).summary()["ratio_median"], rel=1e-3)
    for name, (_, whole) in METRICS.items():
        torch.testing.assert_close(values[f"val/{name}"], whole(X, mask), rtol=1e-9, atol=1e-12)
    # One second moment serves all ranks.
    assert sorted(map(len, metrics.compute_groups.values())) == [1, 1, 1, 1, 5]


def test_a_collection_keeps_apart_what_only_begins_alike(generator):
    """It takes metrics for one whose states are equal after the first batch, here of zeros."""
    make = {
        "residual": TokenResidual,
        "similarity": TokenSimilarity,
        "no massive": lambda: TokenResidual(massive=50.0),
        "no massive rank": lambda: StableRank(WIDTH, massive=50.0),
        "rank": lambda: StableRank(WIDTH),
    }
    metrics = MetricCollection({name: metric() for name, metric in make.items()})
    alone = {name: metric() for name, metric in make.items()}
    massive = torch.randn(2, 9, WIDTH, generator=generator)
    massive[:, 4, 1] = 1e5
    for x in (torch.zeros(2, 9, WIDTH), massive):
        metrics.update(x)
        for metric in alone.values():
            metric.update(x)
    for name, value in metrics.compute().items():
        torch.testing.assert_close(value, alone[name].compute(), rtol=1e-12, atol=0, equal_nan=True)
    assert metrics["rank"].compute() < 1.01
    assert metrics["no massive rank"].compute() > 2


def test_massive_activations_are_left_out_of_ranks(generator):
    X = tokens(generator, 5, 9)
    X[:, 0, 3] = 1e6
    kept, dropped = [], [massive_activations(x, multiple=50.0) for x in X]
    for x, (massive_tokens, dimensions) in zip(X, dropped, strict=True):
        kept.append(x.masked_fill(dimensions, 0.0)[~massive_tokens])
    metric = EffectiveRank(WIDTH, power=2, massive=50.0)
    for x in X:
        metric.update(x)
    assert metric.compute().item() == pytest.approx(effective_rank(torch.cat(kept), power=2).item())
    assert EffectiveRank(WIDTH, power=2)(X) < 1.01 < metric.compute()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EffectiveRank(0), "width=0: expected an integer of at least 1"),
        (lambda: EffectiveRank(4, power=0), "power=0: expected 1 or 2"),
        (lambda: StableRank(4, centred=1), "centred=1: expected True or False"),
        (lambda: TokenResidual(massive=1.0), r"massive=1\.0: expected a number above 1"),
        (lambda: TokenSimilarity(massive="some"), "massive='some': expected a number above 1"),
        (lambda: SpectralRatio("mean"), "statistic='mean': expected 'min' or 'median' or 'max'"),
        (lambda: SpectralRatio(linearization="best"), "linearization='best': expected 'circuit' or 'paper'"),
        (lambda: EffectiveRank(4).update(torch.ones(2, 5)), r"x has the shape \(2, 5\): expected \(..., tokens, 4\)"),
        (lambda: EffectiveRank(4).update(torch.ones(4)), r"X has the shape \(4,\): expected \(..., tokens, width\)"),
        (
            lambda: TokenResidual().update(torch.ones(2, 5), torch.ones(5)),
            r"mask has the shape \(5,\): expected \(2,\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


# The spectral ratio.


@pytest.mark.parametrize("statistic", ["min", "median", "max"])
def test_the_ratio_of_a_model(statistic):
    model = ratio_model(0)
    expected = measure(model).summary()[f"ratio_{statistic}"]
    metric = SpectralRatio(statistic)
    metric.update(model)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)
    assert metric.unmeasured == 0


def test_ratios_are_averaged_in_the_logarithm():
    first, second = measure(ratio_model(0)), measure(ratio_model(1))
    metric = SpectralRatio("max")
    assert metric(first).item() == pytest.approx(first.summary()["ratio_max"])
    metric.update(second)
    expected = math.sqrt(first.summary()["ratio_max"] * second.summary()["ratio_max"])
    assert metric.compute().item() == pytest.approx(expected)
    # Swapping the branches of every block turns ρ into 1/ρ.
    swapped = SpectralRatio("min")
    for measurement in (first, second):
        layers = [replace(x, mlp_norm=x.attention_norm, attention_norm=x.mlp_norm) for x in measurement]
        swapped.update(replace(measurement, layers=tuple(layers)))
    assert swapped.compute().item() == pytest.approx(1 / expected)


def test_blocks_without_a_ratio_are_counted():
    measurement = measure(ratio_model(0))
    missing = replace(measurement.layers[0], mlp_norm=None, mlp_reason="packed")
    metric = SpectralRatio()
    metric.update(replace(measurement, layers=(missing, *measurement.layers[1:])))
    assert metric.unmeasured == 1
    assert metric.compute().isfinite()
    nothing = SpectralRatio()
    nothing.update(replace(measurement, layers=(missing,)))
    assert nothing.compute().isnan()
    assert nothing.unmeasured == 1


def test_linearizations_are_never_mixed():
    with pytest.raises(ConfigurationError, match=r"linearization='paper': expected 'circuit', or a metric of its own"):
        SpectralRatio().update(measure(ratio_model(0), linearization="paper"))
    metric = SpectralRatio(linearization="paper")
    metric.update(ratio_model(0))
    metric.update(measure(ratio_model(0), linearization="paper"))
    expected = measure(ratio_model(0), linearization="paper").summary()["ratio_median"]
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_the_statistics_share_a_state_and_the_model_is_left_alone():
    metrics = MetricCollection({s: SpectralRatio(s) for s in ("min", "median", "max")})
    model = ratio_model(0)
    for measurement in (measure(model), measure(ratio_model(1))):
        metrics.update(measurement)
    assert len(metrics.compute_groups) == 1
    values = metrics.compute()
    assert values["min"] < values["median"] < values["max"]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    metrics.update(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert not SpectralRatio.is_differentiable
    loaded = pickle.loads(pickle.dumps(metrics["max"]))
    assert torch.equal(loaded.compute(), metrics["max"].compute())


# Two processes.


def test_two_processes_are_one_stream(tmp_path: Path):
    """The first has two sequences, the second three; both have the same model."""
    both = run("streamed.py", 2, tmp_path, timeout=120)
    assert both[0] == both[1]
    alone, (X, mask, model) = collection(), distributed_data()
    alone.update(x=X, mask=mask, model=model)
    values, unmeasured = both[0]
    assert values == pytest.approx({name: value.item() for name, value in alone.compute().items()}, rel=1e-9)
    assert unmeasured == {name: int(alone[name].unmeasured) for name in METRICS} | {"ratio": 0}
    assert set(unmeasured.values()) == {0, 1}

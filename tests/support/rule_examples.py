"""A made-up run for every rule, short enough to read: what happens in it, and the event that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from lightning_spectral.alarms import Event, Memory, observe
from lightning_spectral.alarms.rules import RULES
from lightning_spectral.records import (
    FunctionalMeasurement,
    LayerMeasurement,
    Measurement,
    OutputMeasurement,
    WeightSignals,
)
from lightning_spectral.records.measurements import NOT_FINITE

Change = Callable[[LayerMeasurement, int], LayerMeasurement]


def examples() -> dict[str, Event]:
    """Return the event of every rule, by its name; a failure beside another one is left out."""
    runs = {
        "not_finite": _run(_broken),
        "tokens_collapsed": _run(_one_vector),
        "samples_collapsed": _run(_healthy, OutputMeasurement(0.003, 0.01, kind="sample", width=128)),
        "nothing_moves": _run(_still),
        "logits_exploding": _run(_large_logits),
        "tokens_collapsing": _run(_dominated),
    }
    return {rule.name: next(event for event in runs[rule.name] if event.name == rule.name) for rule in RULES}


def _run(change: Change, output: OutputMeasurement | None = None) -> Iterator[Event]:
    memory = Memory()
    for step in range(0, 70, 10):
        layers = (change(layer, step) for layer in _layers())
        now = (
            None
            if output is None
            else output
            if step >= 20
            else replace(output, sample_residual=0.4, batch_residual=0.5)
        )
        events, memory = observe(memory, Measurement(step, "circuit", tuple(layers), output=now))
        yield from events


def _layers() -> Iterable[LayerMeasurement]:
    for index in range(8):
        tokens = {"token_residual": 0.9 - 0.05 * index, "typical_token_residual": 0.9 - 0.05 * index}
        yield LayerMeasurement(
            index, f"encoder.layers.{index}", 1.0, 1.0, **tokens, sample_residual=0.6, stream_rms=1.0
        )


def _healthy(layer: LayerMeasurement, step: int) -> LayerMeasurement:
    return layer


def _broken(layer: LayerMeasurement, step: int) -> LayerMeasurement:
    if step >= 40 and layer.index >= 3:
        return replace(layer, mlp_norm=None, mlp_reason=NOT_FINITE)
    return replace(layer, mlp_norm=1.0 if layer.index != 3 or step < 20 else 12.0 ** (step / 10 - 1))


def _one_vector(layer: LayerMeasurement, step: int) -> LayerMeasurement:
    residual = 0.9 * 0.05 ** (layer.index * min(step, 10) / 10)
    return replace(layer, token_residual=residual, typical_token_residual=residual)


def _dominated(layer: LayerMeasurement, step: int) -> LayerMeasurement:
    residual = 0.9 * 0.93 ** (layer.index * step / 10)
    return replace(layer, attention_norm=30.0, token_residual=residual, typical_token_residual=residual)


def _still(layer: LayerMeasurement, step: int) -> LayerMeasurement:
    return replace(layer, weights=WeightSignals(mlp_moved=False, attention_moved=False))


def _large_logits(layer: LayerMeasurement, step: int) -> LayerMeasurement:
    logit = 2.0 * (1 + step / 2) if layer.index == 2 else 3.0
    return replace(layer, functional=FunctionalMeasurement(attention_logit=10 * logit))

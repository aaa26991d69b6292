"""The signals that `collapses_report.py` judges, and a run of `collapses.py` condensed into one line of plain values.

Every signal and the direction that is bad stand in ``SIGNALS``. They were fixed before the runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from collapses_statistics import loss_shows

from lightning_spectral import History, Measurement
from lightning_spectral.alarms import Memory, observe, signs
from lightning_spectral.records import FunctionalMeasurement, LayerMeasurement, WeightSignals

SETTLED = slice(2, 5)  # the measurements 3 to 5, which a change of ln ρ is measured from
SMOOTHED = 10  # losses in a mean, as many as there are between two measurements
LARGEST = 3.4e38  # stands for infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class SoFar:
    """A run up to one measurement.

    Attributes:
        measurements: The measurements, this one the last.
        losses: The loss of every step before the measurement.
        gradients: The norm of the gradient in every step before the measurement.
        chance: The loss of a model that knows nothing of its inputs, ``None`` where it has no meaning.
        others: The smallest and the largest ratio at this step by another linearization, ``"paper"`` or
            ``"jacobian"``, where it was measured.
    """

    measurements: Sequence[Measurement]
    losses: Sequence[float]
    gradients: Sequence[float]
    chance: float | None
    others: Mapping[str, tuple[float | None, float | None]]


Of = Callable[[Measurement, SoFar], float | None]


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal.

    Attributes:
        name: Its name in the tables.
        bad: The direction that is bad.
        of: Its value in a measurement, ``None`` where it is not known.
        latest: Whether a run is scored by the latest value, and not by the worst one so far. Such a signal falls in
            every run that learns, so that its worst value is the first. It has no threshold.
    """

    name: str
    bad: Literal["low", "high"]
    of: Of
    latest: bool = False


def known(values: Sequence[float | None]) -> list[float]:
    """Leave out what is not known."""
    return [value for value in values if value is not None and not math.isnan(value)]


def smallest(pick: Callable[[LayerMeasurement], float | None]) -> Of:
    """Return the smallest value over the blocks."""
    return lambda measurement, so_far: min(known([pick(layer) for layer in measurement]), default=None)


def largest(pick: Callable[[LayerMeasurement], float | None]) -> Of:
    """Return the largest value over the blocks."""
    return lambda measurement, so_far: max(known([pick(layer) for layer in measurement]), default=None)


def functional(name: str) -> Callable[[LayerMeasurement], float | None]:
    """Return a number of what the branches do as functions."""
    return lambda layer: getattr(layer.functional or FunctionalMeasurement(), name)


def weights(name: str) -> Callable[[LayerMeasurement], float | None]:
    """Return a number of what becomes of the weights; ``None`` for one that the package does not measure."""
    return lambda layer: getattr(layer.weights or WeightSignals(), name, None)


def distance_from_one(layer: LayerMeasurement) -> float | None:
    """Return |ln ρ|."""
    return None if layer.log_ratio is None else abs(layer.log_ratio)


def change_of_ratio(measurement: Measurement, so_far: SoFar) -> float | None:
    """Return the largest |ln ρ − ln ρ₀| over the blocks; ρ₀ is the block's median of the measurements 3 to 5."""
    if len(so_far.measurements) <= SETTLED.stop:
        return None
    begun: dict[int, list[float]] = {}
    for earlier in so_far.measurements[SETTLED]:
        for layer in earlier:
            begun.setdefault(layer.index, []).extend(known([layer.log_ratio]))
    changes = [
        abs(layer.log_ratio - median(begun[layer.index]))
        for layer in measurement
        if layer.log_ratio is not None and begun.get(layer.index)
    ]
    return max(changes, default=None)


def last_tokens(measurement: Measurement, so_far: SoFar) -> float | None:
    """Return the smallest token residual behind the last block of a stack, massive activations left out."""
    return min(known([layer.typical_token_residual for layer in signs.stack_ends(measurement)]), default=None)


def output_residual(measurement: Measurement, so_far: SoFar) -> float | None:
    """Return how far the outputs of a few samples are apart."""
    return None if measurement.output is None else measurement.output.sample_residual


def pooled_residual(measurement: Measurement, so_far: SoFar) -> float | None:
    """Return the residual over samples of what the output is made of."""
    return None if measurement.output is None else measurement.output.pooled_residual


def operator_change(measurement: Measurement, so_far: SoFar) -> float | None:
    """Return the largest relative change of an operator since the measurement before."""
    names = ("mlp_change", "attention_change")
    return max(known([weights(name)(layer) for layer in measurement for name in names]), default=None)


def ratio_by(linearization: str, place: Literal[0, 1]) -> Of:
    """Return the smallest (0) or the largest (1) ratio by a linearization that the run's watch did not measure."""
    return lambda measurement, so_far: so_far.others.get(linearization, (None, None))[place]


def gradient(measurement: Measurement, so_far: SoFar) -> float | None:
    """Return the largest norm of the gradient so far."""
    return max(known(so_far.gradients), default=None)


def relative_loss(measurement: Measurement, so_far: SoFar) -> float | None:
    """Return the mean of the last 10 losses over the first loss."""
    return fmean(so_far.losses[-SMOOTHED:]) / so_far.losses[0] if so_far.losses else None


def loss_to_chance(measurement: Measurement, so_far: SoFar) -> float | None:
    """Return the mean of the last 10 losses over the loss of a model that knows nothing of its inputs."""
    return fmean(so_far.losses[-SMOOTHED:]) / so_far.chance if so_far.losses and so_far.chance else None


SIGNALS = (
    Signal("circuit ρ, lowest", "low", smallest(lambda layer: layer.ratio)),
    Signal("circuit ρ, highest", "high", largest(lambda layer: layer.ratio)),
    Signal("circuit ρ, largest |ln ρ|", "high", largest(distance_from_one)),
    Signal("circuit ρ, change of ln ρ", "high", change_of_ratio),
    Signal("paper ρ, lowest", "low", ratio_by("paper", 0)),
    Signal("paper ρ, highest", "high", ratio_by("paper", 1)),
    Signal("jacobian ρ, lowest", "low", ratio_by("jacobian", 0)),
    Signal("jacobian ρ, highest", "high", ratio_by("jacobian", 1)),
    Signal("update ratio, lowest", "low", smallest(functional("update_ratio"))),
    Signal("update ratio, highest", "high", largest(functional("update_ratio"))),
    Signal("token residual, last blocks", "low", last_tokens),
    Signal("sample residual, smallest", "low", smallest(lambda layer: layer.sample_residual)),
    Signal("output residual", "low", output_residual),
    Signal("pooled residual", "low", pooled_residual),
    Signal("effective rank, smallest", "low", smallest(lambda layer: layer.effective_rank)),
    Signal("MLP's share of the stream", "high", largest(functional("mlp_share"))),
    Signal("attention's share of the stream", "high", largest(functional("attention_share"))),
    Signal("stable rank, MLP", "low", smallest(weights("mlp_stable_rank"))),
    Signal("stable rank, attention", "low", smallest(weights("attention_stable_rank"))),
    Signal("alignment of neighbours", "high", largest(weights("alignment"))),
    Signal("operator change, large", "high", operator_change),
    Signal("operator change, small", "low", operator_change),
    Signal("attention logit", "high", largest(functional("attention_logit"))),
    Signal("logit bound", "high", largest(weights("logit_bound"))),
    Signal("stream, root mean square", "high", largest(lambda layer: layer.stream_rms)),
    Signal("gradient norm", "high", gradient),
    Signal("loss / first loss", "high", relative_loss),
    Signal("loss / chance", "high", loss_to_chance),
    Signal("loss / first loss, latest", "high", relative_loss, latest=True),
    Signal("loss / chance, latest", "high", loss_to_chance, latest=True),
)


def three_digits(value: float | None) -> float | None:
    """Round to 3 significant digits. ``None`` stands for NaN, 3.4e38 for infinity."""
    if value is None or math.isnan(value):
        return None
    return float(f"{max(-LARGEST, min(value, LARGEST)):.3g}")


def signals_of(measurements: Sequence[Measurement], training: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Return the values of every signal, one per measurement; a signal that no measurement shows is left out."""
    by_step: dict[int, dict[str, tuple[float | None, float | None]]] = {}
    for linearization in ("paper", "jacobian"):
        for step, low, high in training.get(linearization) or ():
            by_step.setdefault(step, {})[linearization] = (low, high)
    found: dict[str, list[float | None]] = {signal.name: [] for signal in SIGNALS}
    for number, measurement in enumerate(measurements):
        step = measurement.step
        past = (training["losses"][:step], training["gradients"][:step])
        so_far = SoFar(measurements[: number + 1], *past, training["chance"], by_step.get(step, {}))
        for signal in SIGNALS:
            found[signal.name].append(three_digits(signal.of(measurement, so_far)))
    return {name: values for name, values in found.items() if known(values)}


def events_of(measurements: Sequence[Measurement]) -> list[tuple[str, str, int, int]]:
    """Return what the rules of the package say of a run today: name, level, step and beginning of every event."""
    memory, found = Memory(), list[tuple[str, str, int, int]]()
    for measurement in measurements:
        events, memory = observe(memory, measurement)
        found += [(event.name, event.level, event.step, event.since) for event in events]
    return found


def verdict_of(training: Mapping[str, Any]) -> str:
    """Return in which ways a run failed, by the register's rule, "" for none."""
    from failures import CASES
    from failures_check import Outcome, verdict

    case = next(case for case in CASES if case.name == training["case"])
    losses, truth = training["losses"], training["truth"]
    # A model whose weights stay the same gives the same numbers for the held-out batch, to the bit.
    moved = training.get("moved", len({repr(row[1:]) for row in truth}) > 1)
    _, residual, spread, logit, finite = truth[-1]
    return verdict(case, Outcome(losses[0], fmean(losses[-20:]), finite, moved, residual, spread, logit, 0.0))


def condensed(folder: Path) -> dict[str, Any]:
    """Return one run as plain values: what it was, how it went, every signal, and the events of the rules."""
    training = json.loads((folder / "training.json").read_text())
    if (folder / "jacobian.json").exists():
        training["jacobian"] = json.loads((folder / "jacobian.json").read_text())["ratios"]
    measurements = History.read(folder / "spectral.jsonl").measurements
    return {
        **{name: training[name] for name in ("case", "twin", "seed", "fails_by")},
        "chance": three_digits(training["chance"]),
        "verdict": verdict_of(training),
        "shown": loss_shows(training["losses"]),
        "losses": list(map(three_digits, training["losses"][::5])),
        "gradients": list(map(three_digits, training["gradients"][::10])),
        "truth": [[step, *map(three_digits, numbers), finite] for step, *numbers, finite in training["truth"]],
        "measured": [measurement.step for measurement in measurements],
        "signals": signals_of(measurements, training),
        "events": events_of(measurements),
    }

"""Sentences that summarize a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from lightning_spectral.alarms.signs import COLLAPSED
from lightning_spectral.records import LayerMeasurement, Measurement
from lightning_spectral.runs.history import History

__all__ = ["clear", "damaged_lines", "story", "zone_of", "zone_words"]

LISTED = 10  # damaged lines named in a sentence


def clear(text: str, most: int = 100) -> str:
    """Return a text from a file in a form that is safe to show: printable, and not too long."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def zone_of(measurement: Measurement) -> tuple[float, float] | None:
    """Return the safe zone, ``None`` for Jacobians, for which nobody has calibrated a zone."""
    return measurement.safe_zone if measurement.has_zone else None


def story(history: History) -> Iterator[str]:
    """Yield the summary of a run, one or two sentences at a time, the most important first."""
    first, last = history.measurements[0], history.measurements[-1]
    count = len(history.measurements)
    when = f"at step {last.step:,}" if count == 1 else f"from step {first.step:,} to step {last.step:,}"
    what = f"{_many(count, 'measurement')} of {_many(len(last.layers), 'block')}"
    yield f"{what} {when}, by the “{clear(last.linearization)}” linearization."
    if history.torn:
        yield "The last line of the file is incomplete: the run writes it, or was stopped. All other lines are shown."
    if history.damaged:
        yield f"{damaged_lines(history)}. All other lines are shown."
    yield from zone_words(first, last, zone_of(last))
    yield _announced(history)
    yield _tokens(history)
    yield _steered(history)


def damaged_lines(history: History) -> str:
    """Return a sentence on the damaged lines of a file, with the reason for the first one."""
    numbers = sorted(history.damaged)
    why = clear(history.damaged[numbers[0]], 150)
    if len(numbers) == 1:
        return f"Line {numbers[0]:,} is damaged ({why})"
    listed = ", ".join(format(number, ",") for number in numbers[:LISTED])
    more = f" and {len(numbers) - LISTED:,} more" if len(numbers) > LISTED else ""
    return f"{len(numbers):,} lines are damaged: {listed}{more} (line {numbers[0]:,}: {why})"


def zone_words(
    first: Measurement,
    last: Measurement,
    zone: tuple[float, float] | None,
    moments: tuple[str, str] = ("at the start", "at the end"),
) -> Iterator[str]:
    """Yield sentences on the ratios now and at the start."""
    missing = [layer for layer in last if layer.ratio is None]
    if missing:
        yield f"{_many(len(missing), 'block')} without a ratio {moments[1]}; the table of blocks says why."
    if zone is None:
        yield "No safe zone is known for ratios of Jacobians."
        return
    edges = f"({zone[0]:g}, {zone[1]:g})"
    at_the_start, at_the_end = _inside(first, zone), _inside(last, zone)
    if at_the_end is None:
        return
    start = "" if at_the_start is None or last is first else f"{at_the_start} {moments[0]}, "
    yield f"Inside the safe zone {edges}: {start}{at_the_end}{'' if last is first else f' {moments[1]}'}."
    worst = max((layer for layer in last if layer.ratio is not None), key=lambda layer: _excess(layer, zone))
    if _excess(worst, zone) > 0:
        side = "above" if worst.ratio is not None and worst.ratio >= zone[1] else "below"
        yield f"Farthest {side}: block {worst.index} ({clear(worst.name)}) at ρ = {worst.ratio:.4g}."


def _inside(measurement: Measurement, zone: tuple[float, float]) -> str | None:
    ratios = [layer.ratio for layer in measurement if layer.ratio is not None]
    inside = sum(zone[0] < ratio < zone[1] for ratio in ratios)
    return f"{inside} of {len(ratios)} blocks" if ratios else None


def _excess(layer: LayerMeasurement, zone: tuple[float, float]) -> float:
    """Return how far a ratio is outside the zone, in ln ρ; negative inside."""
    assert layer.log_ratio is not None
    low, high = np.log(zone)
    return float(max(low - layer.log_ratio, layer.log_ratio - high))


def _announced(history: History) -> str:
    counts = Counter(event.level for event in history.events)
    failures = [event for event in history.events if event.level == "failure"]
    warnings = _many(counts["warning"], "warning") if counts["warning"] else "no warning"
    if not failures:
        return f"No failure, {warnings}. Leaving the zone is information."
    when = f"at step {failures[0].step:,}" if len(failures) == 1 else f"the first at step {failures[0].step:,}"
    return f"{_many(len(failures), 'failure')}, {when}; {warnings}. {clear(failures[0].message, 2000)}"


def _tokens(history: History) -> str:
    residuals = history.values("typical_token_residual")
    measured = np.flatnonzero(np.isfinite(residuals).any(axis=0))
    if measured.size == 0:
        return "Tokens were not measured (geometry=True), so no collapse could be seen."
    row = np.flatnonzero(np.isfinite(residuals).any(axis=1))[-1]
    series = residuals[row]
    there = np.flatnonzero(np.isfinite(series))
    lowest = there[np.argmin(series[there])]
    verdict = "that happened" if series[lowest] < COLLAPSED else "that did not happen"
    return (
        f"Token residual behind block {row}: {series[there[0]]:.2g} at step {history.steps[there[0]]:,}, "
        f"{series[there[-1]]:.2g} at step {history.steps[there[-1]]:,}; smallest {series[lowest]:.2g} at step "
        f"{history.steps[lowest]:,}. Tokens count as one vector below {COLLAPSED:g}: {verdict}."
    )


def _steered(history: History) -> str:
    moves = [action for action in history.actions if action["action"] == "rescale"]
    rescaler = history.header.get("rescaler")
    if not rescaler and not history.actions:
        return "The run was watched, not steered."
    if not moves:
        return "The controller was on and moved no scale."
    dry = " would have" if isinstance(rescaler, dict) and rescaler.get("dry_run") else ""
    blocks = len({action["block"] for action in moves})
    steps = [action["step"] for action in moves]
    last = history.measurements[-1]
    scales = [scale for layer in last for scale in (layer.mlp_scale, layer.attention_scale)]
    return (
        f"The controller{dry} moved scales of {_many(blocks, 'block')} in {_many(len(moves), 'action')}, from step "
        f"{min(steps):,} to step {max(steps):,}. Scales end between {min(scales):.3g} and {max(scales):.3g}."
    )


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"

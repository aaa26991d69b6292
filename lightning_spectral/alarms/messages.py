"""Messages of events: what happened, where, since when, the numbers, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import median

from lightning_spectral.alarms.memory import BlockMemory, Point, line_through
from lightning_spectral.records import Event, Forecast, LayerMeasurement, Measurement
from lightning_spectral.records.events import Level

__all__ = ["Tokens", "collapse", "crossing", "drift", "relief"]

TOLD_AT_ONCE = 4  # blocks named in one message
_CALMER = "a smaller learning rate or a longer warm-up"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Evidence from the tokens of one measurement. "Last block" is the last one whose tokens were measured.

    Attributes:
        depth: (index, ln r) of every block whose tokens were measured; r is the token residual.
        history: (step, ln r) of the last block in the last measurements.
        forecast: When the last block reaches collapse, ``None`` if no robust trend leads there.
        arrived: Whether the tokens behind the last block have collapsed.
        coming: Whether they have collapsed or are on their way to it, over depth or over training.
    """

    depth: Sequence[Point]
    history: Sequence[Point]
    forecast: Forecast | None
    arrived: bool
    coming: bool

    def __str__(self) -> str:
        """State the token residual now, its value earlier, and the forecast of its collapse."""
        (first, top), (last, bottom) = self.depth[0], self.depth[-1]
        text = f"token residual {math.exp(top):.2g} behind block {first}, {math.exp(bottom):.2g} behind block {last}"
        if len(self.history) > 1:
            step, value = self.history[0]
            text += f" ({math.exp(value):.2g} at step {step})"
        if self.forecast is not None:
            at, earliest, latest = (f"{step:.0f}" for step in astuple(self.forecast))
            text += f", collapsed by step {at} ({earliest} to {latest}) if it goes on"
        return text


def crossing(layers: Sequence[LayerMeasurement], blocks: Mapping[int, BlockMemory], measurement: Measurement) -> Event:
    """Make the event for blocks that crossed an edge of the zone."""
    where = {-1: "is below", 0: "is back in", 1: "is above"}
    clauses = [
        f"block {layer.index} ({layer.name}) {where[blocks[layer.index].side]} the zone at {layer.ratio:.4g}"
        for layer in layers
    ]
    return _event("info", "spectral ratio", measurement, layers, measurement.step, _listed(clauses))


def drift(
    layers: Sequence[LayerMeasurement],
    blocks: Mapping[int, BlockMemory],
    measurement: Measurement,
    tokens: Tokens | None,
) -> Event:
    """Make the event for blocks that stay outside and drift away from their baseline."""
    clauses = []
    for layer in layers:
        block = blocks[layer.index]
        line = line_through(block.ratios)
        start = block.ratios[0][0]
        pace = "" if line is None else f", times {math.exp(line.slope * (line.at - start)):.3g} since step {start}"
        settled = f"had settled at {math.exp(median(block.settled)):.3g}"
        where = f"block {layer.index} ({layer.name}) at {layer.ratio:.4g}, outside since step {block.since}"
        clauses.append(f"{where}, {settled}{pace}")
    since = min(blocks[layer.index].since for layer in layers)
    seen = "tokens were not measured (geometry=True)" if tokens is None else str(tokens)
    text = f"{_listed(clauses)}. No alarm: ratios alone do not show a collapse; {seen}. "
    text += f"If the loss suffers too, try {_CALMER}"
    return _event("warning", "spectral WARNING", measurement, layers, since, text, tokens)


def collapse(level: Level, blocks: Mapping[int, BlockMemory], measurement: Measurement, tokens: Tokens) -> Event:
    """Make the event for tokens that become one vector, with the ratios that may be the cause."""
    side = -1 if any(block.stays < 0 for block in blocks.values()) else 1
    outside = [layer for layer in measurement if blocks[layer.index].stays == side]
    advice = _CALMER
    if not outside:
        who = "No ratio has stayed outside the zone, so the balance of the branches is not the cause"
    else:
        names = _listed([f"block {layer.index} ({layer.name}) at {layer.ratio:.4g}" for layer in outside])
        strong = "attention outweighs the MLP" if side < 0 else "the MLP outweighs attention"
        who = f"In {len(outside)} of {len(measurement.layers)} blocks {strong}: {names}"
        if side < 0:
            advice += ", balance_init_ before training, or auto_rescale=True"
    since = min((blocks[layer.index].since for layer in outside), default=measurement.step)
    text = f"tokens become one vector: {tokens}. {who}. Try {advice}"
    return _event(level, f"spectral {level.upper()}", measurement, outside, since, text, tokens)


def relief(measurement: Measurement, tokens: Tokens) -> Event:
    """Make the event for tokens that are no longer on their way to collapse."""
    return _event("info", "spectral", measurement, (), measurement.step, f"tokens are apart again: {tokens}")


def _event(
    level: Level,
    title: str,
    measurement: Measurement,
    layers: Sequence[LayerMeasurement],
    since: int,
    text: str,
    tokens: Tokens | None = None,
) -> Event:
    low, high = measurement.safe_zone
    message = f"{title}, step {measurement.step}, zone ({low:g}, {high:g}): {text}"
    blocks = tuple(layer.index for layer in layers)
    return Event(level, measurement.step, since, blocks, message, None if tokens is None else tokens.forecast)


def _listed(clauses: Sequence[str]) -> str:
    more = f"; and {len(clauses) - TOLD_AT_ONCE} more" if len(clauses) > TOLD_AT_ONCE else ""
    return "; ".join(clauses[:TOLD_AT_ONCE]) + more

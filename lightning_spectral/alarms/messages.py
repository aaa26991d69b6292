"""Messages of events.

The first sentence says what happened in plain words, the second one where, since when and how sure it is, with the
numbers; then comes one thing to try.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from statistics import median

from lightning_spectral.alarms.advice import ADVICE, WORDS
from lightning_spectral.alarms.memory import BlockMemory, Memory, line_through
from lightning_spectral.alarms.quality import sureness
from lightning_spectral.alarms.signs import COLLAPSED, Sign, samples_collapsed
from lightning_spectral.records import Event, LayerMeasurement, Measurement
from lightning_spectral.records.events import Level
from lightning_spectral.records.text import numbered

__all__ = ["ON_RATIOS", "RULES", "crossing", "drift", "relief"]

ON_RATIOS = ("ratio_crossed", "ratio_drifts")
"""Names of the notes on ratios, which say nothing of failures."""

TOLD_AT_ONCE = 4  # blocks named in one message
_PAGE = "docs/monitor.md"
_CALM = {
    "not_finite": "everything is finite again",
    "tokens_collapsed": "the tokens are apart again",
    "samples_collapsed": "different samples give different outputs again",
    "nothing_moves": "the blocks have moved",
    "logits_exploding": "no attention logit is above 100 any more",
    "tokens_collapsing": "the tokens are no longer on their way to one vector",
}


def crossing(layers: Sequence[LayerMeasurement], blocks: Mapping[int, BlockMemory], measurement: Measurement) -> Event:
    """Make the note of blocks that crossed an edge of the safe zone."""
    where = {-1: "is below", 0: "is back in", 1: "is above"}
    clauses = [
        f"block {numbered(layer)} {where[blocks[layer.index].told]} the safe zone at {layer.ratio:.4g}"
        for layer in layers
    ]
    low, high = measurement.safe_zone
    text = f"{_listed(clauses)}. The safe zone is ({low:g}, {high:g}); outside is information"
    return _event("note", "ratio_crossed", measurement, layers, measurement.step, text)


def drift(layers: Sequence[LayerMeasurement], blocks: Mapping[int, BlockMemory], measurement: Measurement) -> Event:
    """Make the note of blocks that stay outside and drift away from their baseline."""
    clauses = []
    for layer in layers:
        block = blocks[layer.index]
        line = line_through(block.ratios)
        start = block.ratios[0][0]
        pace = "" if line is None else f", times {math.exp(line.slope * (line.at - start)):.3g} since step {start}"
        settled = f"had settled at {math.exp(median(block.settled)):.3g}"
        where = f"block {numbered(layer)} at {layer.ratio:.4g}, outside since step {block.since}"
        clauses.append(f"{where}, {settled}{pace}")
    since = min(blocks[layer.index].since for layer in layers)
    text = f"ratios move away from where they had settled: {_listed(clauses)}. A ratio alone does not show a failure"
    return _event("note", "ratio_drifts", measurement, layers, since, text)


def relief(name: str, sign: Sign, measurement: Measurement) -> Event:
    """Make the note of a rule whose sign has gone."""
    numbers = _numbers(sign.values)
    text = _CALM[name] + (f": {numbers}" if numbers else "")
    return _event("note", f"{name}_over", measurement, (), measurement.step, text, sign)


def _not_finite(level: Level, sign: Sign, since: int, memory: Memory, measurement: Measurement) -> Event:
    if not sign.layers:
        where = "the output of the network is not finite, its blocks are"
    else:
        layer = sign.layers[0]
        part = "what leaves block" if sign.branch is None else f"the {_branch(sign.branch)} of block"
        where = f"{part} {numbered(layer)} is the first that is not finite"
    known = "" if memory.finite is None else f"; at step {memory.finite} everything was finite"
    grew = _grew(memory, measurement)
    text = f"the network computes with NaN or infinity. At step {measurement.step} {where}{known}{grew}"
    return _told(level, "not_finite", sign, since, measurement, text)


def _tokens_collapsed(level: Level, sign: Sign, since: int, memory: Memory, measurement: Measurement) -> Event:
    layer, samples = sign.layers[0], samples_collapsed(memory, measurement)
    also = ", and different samples give the same output" if samples is not None and samples.seen else ""
    text = (
        f"the network gives every token the same answer. At the output of block {numbered(layer)} the tokens of a "
        f"sample have been nearly identical since step {since}: they differ by {_tokens(sign.values)}{also}"
        f"{_balance(memory, measurement)}"
    )
    return _told(level, "tokens_collapsed", sign, since, measurement, text)


def _samples_collapsed(level: Level, sign: Sign, since: int, memory: Memory, measurement: Measurement) -> Event:
    if sign.layers:
        where, name = f"what leaves block {numbered(sign.layers[0])}", "sample_residual"
    elif sign.values.get("pooled_residual", 1.0) < COLLAPSED:
        where, name = "the vectors that the output is made of, such as class tokens,", "pooled_residual"
    else:
        where, name = "the outputs", "output_residual"
    text = (
        f"the network gives every input the same answer. Since step {since} {where} for different samples have been "
        f"nearly identical: they differ by {sign.values[name]:.2g} of their size"
    )
    return _told(level, "samples_collapsed", sign, since, measurement, text)


def _nothing_moves(level: Level, sign: Sign, since: int, memory: Memory, measurement: Measurement) -> Event:
    branches, step = sign.values["branches"], sign.values["step_before"]
    text = (
        f"no block of the network learns. None of its {branches:.0f} trainable attention and MLP branches has changed "
        f"since step {step:.0f}, not by one bit"
    )
    return _told(level, "nothing_moves", sign, memory.began or 0, measurement, text)


def _logits_exploding(level: Level, sign: Sign, since: int, memory: Memory, measurement: Measurement) -> Event:
    layer, values = sign.layers[0], sign.values
    before = f", {values['attention_logit_before']:.3g} at step {values['step_before']:.0f}"
    earlier = before if values["step_before"] < measurement.step else ""
    text = (
        f"attention fixes on single tokens. In block {numbered(layer)} the largest attention logit, as the softmax "
        f"reads it, has been above 100 since step {since} ({values['attention_logit']:.3g} now{earlier}); a softmax of "
        "logits so large is mostly one-hot, and then passes hardly any gradient"
    )
    return _told(level, "logits_exploding", sign, since, measurement, text)


def _tokens_collapsing(level: Level, sign: Sign, since: int, memory: Memory, measurement: Measurement) -> Event:
    layer, coming = sign.layers[0], ""
    if sign.forecast is not None:
        at, earliest, latest = (f"{step:.0f}" for step in astuple(sign.forecast))
        between = "" if earliest == latest else f" ({earliest} to {latest})"
        coming = f"; at this pace they count as identical by step {at}{between}"
    text = (
        f"the network begins to give every token the same answer. At the output of block {numbered(layer)} the tokens "
        f"of a sample differ by only {_tokens(sign.values)}{coming}{_balance(memory, measurement)}"
    )
    return _told(level, "tokens_collapsing", sign, since, measurement, text)


RULES: Mapping[str, Callable[[Level, Sign, int, Memory, Measurement], Event]] = {
    "not_finite": _not_finite,
    "tokens_collapsed": _tokens_collapsed,
    "samples_collapsed": _samples_collapsed,
    "nothing_moves": _nothing_moves,
    "logits_exploding": _logits_exploding,
    "tokens_collapsing": _tokens_collapsing,
}


def _told(level: Level, name: str, sign: Sign, since: int, measurement: Measurement, text: str) -> Event:
    """Add what to try, without what the run does already, and where to read more."""
    advice = tuple(item for item in ADVICE[name] if not (measurement.is_scaled and item == "ceiling"))
    more = f"; if they are there already, {WORDS[advice[1]]}" if advice[0] == "pre_norm" else ""
    text = f"{text}. Try: {WORDS[advice[0]]}{more}. {sureness(name)}More: {_PAGE}#{name}"
    return _event(level, name, measurement, sign.layers, since, text, sign, advice)


def _event(
    level: Level,
    name: str,
    measurement: Measurement,
    layers: Sequence[LayerMeasurement],
    since: int,
    text: str,
    sign: Sign | None = None,
    advice: tuple[str, ...] = (),
) -> Event:
    sign = Sign(True) if sign is None else sign
    head = f"step {measurement.step}: " if level == "note" else f"{level.upper()} at step {measurement.step}: "
    blocks = tuple(layer.index for layer in layers)
    return Event(
        level,
        measurement.step,
        since,
        blocks,
        head + text,
        sign.forecast,
        name=name,
        branch=sign.branch,
        values=dict(sign.values),
        advice=advice,
    )


def _tokens(values: Mapping[str, float]) -> str:
    """Say by how much of their size tokens differ, now and earlier."""
    now = values["token_residual"]
    earlier, step = values.get("token_residual_before", now), values.get("step_before", 0.0)
    return f"{now:.2g} of their size" + ("" if earlier == now else f" ({earlier:.2g} at step {step:.0f})")


def _numbers(values: Mapping[str, float]) -> str:
    """Say the residuals of a sign that has gone."""
    if "token_residual" in values:
        return f"they differ by {_tokens(values)}"
    found = next(
        (values[name] for name in ("output_residual", "pooled_residual", "sample_residual") if name in values), None
    )
    return "" if found is None else f"they differ by {found:.2g} of their size"


def _balance(memory: Memory, measurement: Measurement) -> str:
    """Say where the ratio is on the side that makes tokens alike: attention averages tokens, an MLP does not."""
    below = [layer for layer in measurement if memory.blocks[layer.index].side < 0]
    if not below:
        return ""
    return f"; attention, which averages tokens, outweighs the MLP in {len(below)} of {len(measurement.layers)} blocks"


def _grew(memory: Memory, measurement: Measurement) -> str:
    """Say what grew most between the last two finite measurements, of all norms, streams and logits."""
    words = {
        "mlp": "norm of the MLP's weights",
        "attention": "norm of the attention's weights",
        "stream": "stream",
        "logit": "largest attention logit",
    }
    grown = []
    for index, block in memory.blocks.items():
        for name, series in block.sizes.items():
            before = [point for point in series if point[0] < measurement.step][-2:]
            if len(before) == 2 and before[0][1] > 0:
                grown.append((before[1][1] / before[0][1], index, name, before[0][0]))
    if not grown:
        return ""
    factor, index, name, step = max(grown)
    if factor < 1.5:
        return ", and nothing had grown much"
    return f", but the {words[name]} in block {index} was {factor:.3g} times that of step {step}"


def _branch(word: str) -> str:
    return "MLP" if word == "mlp" else word


def _listed(clauses: Sequence[str]) -> str:
    more = f"; and {len(clauses) - TOLD_AT_ONCE} more" if len(clauses) > TOLD_AT_ONCE else ""
    return "; ".join(clauses[:TOLD_AT_ONCE]) + more

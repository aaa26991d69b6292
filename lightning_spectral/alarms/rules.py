"""The rules: a measurement and a memory in, events and a memory out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_spectral.alarms import messages, signs
from lightning_spectral.alarms.memory import (
    SETTLING,
    WARMUP_STEPS,
    BlockMemory,
    Memory,
    Point,
    RuleMemory,
    line_through,
)
from lightning_spectral.alarms.signs import Look, log_residual
from lightning_spectral.records import Event, LayerMeasurement, Measurement
from lightning_spectral.records.events import Level

__all__ = ["FAILURES", "RULES", "Rule", "falling_tokens", "observe", "told_side"]

WINDOW = 8  # measurements that a trend is fitted to
DRIFT = math.log(1.5)  # a ratio drifts when it is this far from its baseline, in ln ρ
BACK = 0.9  # a ratio above the safe zone counts as back below 0.9 of its edge; one below, in mirror image
CHECKS = 3  # the last checks of a rule that count


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        name: Its name, which events carry and which never changes.
        level: The level of its event.
        look: Sees its sign in a measurement.
        confirmations: The event comes when so many of the last 3 checks have seen the sign.
        behind: Rules that say more: where one of them is on, this one is silent.
    """

    name: str
    level: Level
    look: Look
    confirmations: int = 2
    behind: tuple[str, ...] = ()


RULES = (
    Rule("not_finite", "failure", signs.not_finite, confirmations=1),
    Rule("tokens_collapsed", "failure", signs.tokens_collapsed, behind=("not_finite",)),
    Rule("samples_collapsed", "failure", signs.samples_collapsed, behind=("not_finite", "tokens_collapsed")),
    Rule("nothing_moves", "failure", signs.nothing_moves, confirmations=3, behind=("not_finite",)),
    Rule("logits_exploding", "warning", signs.logits_exploding, behind=("not_finite",)),
    Rule("tokens_collapsing", "warning", signs.tokens_collapsing, behind=("not_finite", "tokens_collapsed")),
)
"""The worst first, in the order in which they are asked."""

FAILURES = tuple(rule.name for rule in RULES if rule.level == "failure")


def observe(memory: Memory, measurement: Measurement) -> tuple[tuple[Event, ...], Memory]:
    """Add a measurement to the memory of a run, and return what is new as events.

    Args:
        memory: The memory that the previous call returned; ``Memory()`` at first.
        measurement: The new measurement. A block without a ratio keeps its side of the safe zone.

    Returns:
        The events, the most severe last, and the new memory.
    """
    began = measurement.step if memory.began is None else memory.began
    settling = memory.measurements >= SETTLING and measurement.step - began >= WARMUP_STEPS
    before = {layer.index: memory.blocks.get(layer.index, BlockMemory()) for layer in measurement}
    now = {layer.index: _seen(before[layer.index], layer, measurement, settling=settling) for layer in measurement}
    known = {**memory.blocks, **now}
    memory = replace(memory, blocks=known, began=began, measurements=memory.measurements + 1)
    memory = _spread(memory, measurement)
    crossed = [layer for layer in measurement if now[layer.index].told != before[layer.index].told]
    events = [messages.crossing(crossed, now, measurement)] if crossed else []
    told, memory = _drift(memory, measurement)
    events += told
    news: list[Event] = []
    for rule in RULES:
        told, memory = _judged(rule, memory, measurement)
        news += told
    events += reversed(news)
    if not signs.not_finite(memory, measurement).seen:
        memory = replace(memory, finite=measurement.step)
    return tuple(events), memory


def falling_tokens(memory: Memory) -> frozenset[int]:
    """Return the indices of the blocks whose token residual has a robust downward trend over training."""
    lines = {index: line_through(block.residuals) for index, block in memory.blocks.items()}
    return frozenset(index for index, line in lines.items() if line is not None and line.falls)


def _seen(block: BlockMemory, layer: LayerMeasurement, measurement: Measurement, *, settling: bool) -> BlockMemory:
    """Add the values of a measurement, and drop values older than the window."""
    step, residual = measurement.step, log_residual(layer)
    if residual is not None:
        block = replace(block, residuals=(*block.residuals, (step, residual))[-WINDOW:])
    block = replace(block, sizes=_sizes(block.sizes, layer, step))
    if layer.ratio is None or layer.log_ratio is None:
        return block
    low, high = measurement.safe_zone
    side = (layer.ratio >= high) - (layer.ratio <= low)
    since, times = (block.since, block.times + 1) if side == block.side and block.times else (step, 1)
    ratios = (*block.ratios, (step, layer.log_ratio))[-WINDOW:]
    settled = (*block.settled, layer.log_ratio)[:SETTLING] if settling else block.settled
    told = told_side(block.told, layer.ratio, measurement.safe_zone)
    block = replace(block, side=side, told=told, since=since, times=times, ratios=ratios, settled=settled)
    return replace(block, warned=_warned(block, step))


def _spread(memory: Memory, measurement: Measurement) -> Memory:
    """Add how far tokens and samples are from being one."""
    now = {name: signs.logarithm(value, least=signs.ROUNDING) for name, value in signs.spreads(measurement).items()}
    series = {name: (*memory.spreads.get(name, ()), (measurement.step, value))[-CHECKS:] for name, value in now.items()}
    peaks = {name: max(value, memory.peaks.get(name, value)) for name, value in now.items()}
    return replace(
        memory,
        spreads={**memory.spreads, **series},
        firsts={**now, **memory.firsts},
        peaks={**memory.peaks, **peaks},
    )


def told_side(before: int, ratio: float, zone: tuple[float, float]) -> int:
    """Return the side to tell, with hysteresis: of the safe zone (0.5, 2), a block leaves at 2 and is back at 1.8."""
    low, high = zone
    back = max(BACK, (low / high) ** 0.25)  # in a narrow zone, half of it is left between the two edges inside
    if ratio >= high or (before > 0 and ratio > back * high):
        return 1
    if ratio <= low or (before < 0 and ratio < low / back):
        return -1
    return 0


def _sizes(before: Mapping[str, Sequence[Point]], layer: LayerMeasurement, step: int) -> dict[str, Sequence[Point]]:
    logit = None if layer.functional is None else layer.functional.attention_logit
    now = {"mlp": layer.mlp_norm, "attention": layer.attention_norm, "stream": layer.stream_rms, "logit": logit}
    return {
        name: (*before.get(name, ()), *([] if value is None else [(step, value)]))[-CHECKS:]
        for name, value in now.items()
    }


def _warned(block: BlockMemory, step: int) -> int | None:
    """Return the step at which a drift began. A drift begins at ``DRIFT`` from the baseline and ends at half of it."""
    if not block.stays or block.excess is None:
        return None
    if block.warned is not None:
        return block.warned if block.excess > DRIFT / 2 else None
    return step if block.excess > DRIFT else None


def _drift(memory: Memory, measurement: Measurement) -> tuple[list[Event], Memory]:
    """Tell which blocks drift. They tend to do so one after the other: another note comes when they have doubled."""
    drifting = memory.drifting
    if not drifting:
        return [], replace(memory, told_drifting=0)
    if len(drifting) < 2 * memory.told_drifting:
        return [], memory
    layers = [layer for layer in measurement if layer.index in drifting]
    return [messages.drift(layers, memory.blocks, measurement)], replace(memory, told_drifting=len(drifting))


def _judged(rule: Rule, memory: Memory, measurement: Measurement) -> tuple[list[Event], Memory]:
    """Ask one rule. There is an event when its sign is confirmed, and one when it has gone."""
    sign = rule.look(memory, measurement)
    if sign is None:
        return [], memory
    before = memory.rules.get(rule.name, RuleMemory())
    seen = (*before.seen, sign.seen)[-CHECKS:]
    since = before.since if any(seen) else None
    now = RuleMemory(seen, measurement.step if sign.seen and since is None else since, before.told)
    events: list[Event] = []
    if not now.told and sum(seen) >= rule.confirmations and sign.seen and not memory.is_on(*rule.behind):
        events = [messages.RULES[rule.name](rule.level, sign, now.since or 0, memory, measurement)]
        now = replace(now, told=True)
    elif now.told and not any(seen):
        events = [messages.relief(rule.name, sign, measurement)]
        now = replace(now, told=False)
    return events, replace(memory, rules={**memory.rules, rule.name: now})

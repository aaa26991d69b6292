"""The rules: a measurement and a memory in, events and a memory out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from lightning_spectral.alarms import messages
from lightning_spectral.alarms.memory import SETTLING, WARMUP_STEPS, BlockMemory, Memory, line_through
from lightning_spectral.alarms.trends import forecast
from lightning_spectral.records import Event, LayerMeasurement, Measurement
from lightning_spectral.records.events import Level

__all__ = ["falling_tokens", "observe"]

WINDOW = 8  # measurements that a trend is fitted to
DRIFT = math.log(1.5)  # a ratio drifts when it is this far from its baseline, in ln ρ
CHECKS, CONFIRMATIONS = 3, 2  # tokens count as a witness after 2 of the last 3 checks
TOWARD = 0.1  # a fall over depth counts only if it ends below this token residual
COLLAPSED = 0.02  # below this token residual, tokens are one vector to within 2 % of their size
_LEAST = 1e-12  # a token residual of 0 counts as this, because trends are fitted to ln r


def observe(memory: Memory, measurement: Measurement) -> tuple[tuple[Event, ...], Memory]:
    """Add a measurement to the memory of a run, and return what is new as events.

    Args:
        memory: The memory that the previous call returned; ``Memory()`` at first.
        measurement: The new measurement. A block without a ratio keeps its side of the zone.

    Returns:
        The events, the most severe last, and the new memory.
    """
    began = measurement.step if memory.began is None else memory.began
    settling = memory.measurements >= SETTLING and measurement.step - began >= WARMUP_STEPS
    before = {layer.index: memory.blocks.get(layer.index, BlockMemory()) for layer in measurement}
    now = {layer.index: _seen(before[layer.index], layer, measurement, settling=settling) for layer in measurement}
    known = {**memory.blocks, **now}
    memory = replace(memory, blocks=known, began=began, measurements=memory.measurements + 1)
    crossed = [layer for layer in measurement if now[layer.index].side != before[layer.index].side]
    events = [messages.crossing(crossed, now, measurement)] if crossed else []
    tokens = _tokens(now, measurement)
    # Blocks tend to drift one after the other. A second warning comes only when the number of them has doubled.
    drifting = memory.drifting
    if drifting and len(drifting) >= 2 * memory.told_drifting:
        events.append(
            messages.drift([layer for layer in measurement if layer.index in drifting], now, measurement, tokens)
        )
        memory = replace(memory, told_drifting=len(drifting))
    elif not drifting:
        memory = replace(memory, told_drifting=0)
    if tokens is not None:
        told, memory = _judged(memory, measurement, tokens)
        events += told
    return tuple(events), memory


def falling_tokens(memory: Memory) -> frozenset[int]:
    """Return the indices of the blocks whose token residual has a robust downward trend over training."""
    lines = {index: line_through(block.residuals) for index, block in memory.blocks.items()}
    return frozenset(index for index, line in lines.items() if line is not None and line.falls)


def _seen(block: BlockMemory, layer: LayerMeasurement, measurement: Measurement, *, settling: bool) -> BlockMemory:
    """Add the values of a measurement, and drop values older than the window."""
    step, residual = measurement.step, _log_residual(layer)
    if residual is not None:
        block = replace(block, residuals=(*block.residuals, (step, residual))[-WINDOW:])
    if layer.ratio is None or layer.log_ratio is None:
        return block
    low, high = measurement.safe_zone
    side = (layer.ratio >= high) - (layer.ratio <= low)
    since, times = (block.since, block.times + 1) if side == block.side and block.times else (step, 1)
    ratios = (*block.ratios, (step, layer.log_ratio))[-WINDOW:]
    settled = (*block.settled, layer.log_ratio)[:SETTLING] if settling else block.settled
    block = replace(block, side=side, since=since, times=times, ratios=ratios, settled=settled)
    return replace(block, warned=_warned(block, step))


def _log_residual(layer: LayerMeasurement) -> float | None:
    """Return ln r without massive activations, which can hide a collapse of the other tokens or look like one."""
    residual = layer.typical_token_residual
    return None if residual is None else math.log(max(residual, _LEAST))


def _warned(block: BlockMemory, step: int) -> int | None:
    """Return the step at which a drift began. A drift begins at ``DRIFT`` from the baseline and ends at half of it."""
    if not block.stays or block.excess is None:
        return None
    if block.warned is not None:
        return block.warned if block.excess > DRIFT / 2 else None
    return step if block.excess > DRIFT else None


def _tokens(blocks: Mapping[int, BlockMemory], measurement: Measurement) -> messages.Tokens | None:
    """Return what the tokens of a measurement show; ``None`` if no tokens were measured."""
    depth = tuple((layer.index, r) for layer in measurement if (r := _log_residual(layer)) is not None)
    if not depth:
        return None
    history = tuple(blocks[depth[-1][0]].residuals)
    line, fall = line_through(history), line_through(depth)
    coming = forecast(line, math.log(COLLAPSED)) if line is not None and line.falls else None
    arrived = depth[-1][1] < math.log(COLLAPSED)
    over_depth = fall is not None and fall.falls and fall.level < math.log(TOWARD)
    # Soon: the trend was seen for n steps, and collapse is at most n steps ahead.
    soon = coming is not None and coming.at - history[-1][0] <= history[-1][0] - history[0][0]
    return messages.Tokens(depth, history, coming, arrived=arrived, coming=arrived or over_depth or soon)


def _judged(memory: Memory, measurement: Measurement, tokens: messages.Tokens) -> tuple[list[Event], Memory]:
    """Combine the two witnesses. There is an event when the level rises, and one when the tokens have recovered."""
    checks = (*memory.checks, tokens.coming)[-CHECKS:]
    arrived = (*memory.arrived, tokens.arrived)[-CHECKS:]
    memory = replace(memory, checks=checks, arrived=arrived)
    level = _level(memory)
    if level is not None and memory.told != level and memory.told != "alarm":
        return [messages.collapse(level, memory.blocks, measurement, tokens)], replace(memory, told=level)
    if memory.told is not None and not any(checks):
        return [messages.relief(measurement, tokens)], replace(memory, told=None)
    return [], memory


def _level(memory: Memory) -> Level | None:
    """Return the level that both witnesses together give; ``None`` for no event."""
    sides = {block.stays for block in memory.blocks.values()}
    coming, arrived = (sum(seen) >= CONFIRMATIONS for seen in (memory.checks, memory.arrived))
    if (coming and -1 in sides) or (arrived and 1 in sides):
        return "alarm"
    return "warning" if arrived else None

"""Everything that happened in a run, in one list: events of the rules, and what the controller began and could not do.

The messages of events are made for a console, where each stands alone. In a table with columns for step and level, they
are shown without these, and with every block.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.control.ceiling import FLOORED
from lightning_spectral.pages.words import block_list, clear, zone_of
from lightning_spectral.records import Event
from lightning_spectral.runs.history import History

__all__ = ["is_ceiling", "since_stopped", "stopped", "timeline"]

Flags = NDArray[np.bool_]

HELD = "held by the bounds"
REFUSED = "attention not raised"
NEAR = 0.05  # nats from a bound: the optimizer pulls a scale off its bound again and again

_HEAD = re.compile(r"^(?:step \d+|(?:FAILURE|WARNING|ALARM) at step \d+|spectral \w+, step \d+[^:]*): ")
_ADVICE = re.compile(r"\. Try(?: this first)?: .*$", re.DOTALL)


def timeline(history: History) -> tuple[Event, ...]:
    """Return all events in the order of their steps, with messages for a table."""
    told = [_for_a_table(event, history) for event in history.events]
    return tuple(sorted([*told, *_steering(history)], key=lambda event: event.step))


def is_ceiling(history: History) -> bool:
    """Whether the ceiling law steers the run. It stops at its floor; the band law stops at the bounds of the scales."""
    rescaler = history.header.get("rescaler")
    return isinstance(rescaler, dict) and rescaler.get("law") == "GainCeiling"


def stopped(history: History) -> Flags:
    """Return which block was outside the safe zone where its law can do no more, shape ``(blocks, measurements)``."""
    rescaler = history.header.get("rescaler")
    ratios = history.values("log_ratio")
    zone = zone_of(history.measurements[-1])
    if zone is None or not isinstance(rescaler, dict) or rescaler.get("dry_run"):
        return np.zeros(ratios.shape, dtype=bool)
    low, high = np.log(zone)
    with np.errstate(invalid="ignore"):
        outside: Flags = (ratios <= low) | (ratios >= high)
    if not is_ceiling(history):
        return outside & _at_bounds(history, rescaler)
    # No law acts on the measurement that ends a run: there a block counts if it counted in the one before.
    left = outside & _left_alone(history, rescaler)
    left[:, -1] &= left[:, -2] if len(history.steps) > 1 else False
    return left


def _at_bounds(history: History, rescaler: Mapping[str, Any]) -> Flags:
    """Return which block has a scale at a bound."""
    bounds: Any = rescaler.get("bounds")
    scales = [history.values(name) for name in ("mlp_scale", "attention_scale")]
    if not _is_interval(bounds):
        return np.zeros(scales[0].shape, dtype=bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        held = [np.abs(np.log(scale) - math.log(bound)) < NEAR for scale in scales for bound in bounds]
    at_one: Flags = np.logical_or.reduce(held)
    return at_one


def _left_alone(history: History, rescaler: Mapping[str, Any]) -> Flags:
    """Return which block the ceiling law has not moved, or only to its floor or to its norm at the start."""
    warmup = rescaler.get("warmup_steps")
    place = {step: column for column, step in enumerate(history.steps)}
    free: Flags = np.zeros(history.values("log_ratio").shape, dtype=bool)
    free[:] = np.asarray(history.steps) >= (warmup if isinstance(warmup, int) else 0)
    for action in history.actions:
        if action["step"] in place and action["block"] < len(free) and FLOORED not in action["reason"]:
            free[action["block"], place[action["step"]]] = False
    return free


def since_stopped(history: History) -> Mapping[int, int]:
    """Return the blocks that :func:`stopped` names at the end, and the step since which it does."""
    table = stopped(history)
    free = [np.flatnonzero(~row) for row in table]
    return {
        block: history.steps[int(off[-1]) + 1 if off.size else 0]
        for block, off in enumerate(free)
        if table.size and table[block, -1]
    }


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(bound, int | float) and 0 < bound < math.inf for bound in value)
    )


def _for_a_table(event: Event, history: History) -> Event:
    text = _crossed(event, history) if event.name == "ratio_crossed" else None
    if text is None:
        text = _ADVICE.sub("", _HEAD.sub("", event.message))
    return Event(event.level, event.step, event.since, event.blocks, clear(text, 2000), name=event.name)


def _crossed(event: Event, history: History) -> str | None:
    """Say which blocks crossed an edge of the safe zone, all of them: the message names the first few."""
    measured = {item.step: item for item in history.measurements}.get(event.step)
    if measured is None:
        return None
    sides: dict[str, list[str]] = {"above": [], "below": [], "back in": []}
    ratios = {layer.index: layer.ratio for layer in measured}
    low, high = measured.safe_zone
    for block in event.blocks:
        if (ratio := ratios.get(block)) is None:
            return None
        side = "above" if ratio >= high else "below" if ratio <= low else "back in"
        sides[side].append(f"{block} (ρ = {ratio:.3g})")
    return "; ".join(
        f"{side} the safe zone: {'block' if len(blocks) == 1 else 'blocks'} {', '.join(blocks)}"
        for side, blocks in sides.items()
        if blocks
    )


def _steering(history: History) -> Iterator[Event]:
    """Yield what is new in the actions of the controller, as it said on the console."""
    by_step: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for action in history.actions:
        by_step[action["step"]].append(action)
    place = {step: position for position, step in enumerate(history.steps)}
    last: dict[int, tuple[int, str]] = {}  # by block: position of the measurement before the action, and what it was
    for step in sorted(by_step):
        news: defaultdict[str, list[int]] = defaultdict(list)
        for action in by_step[step]:
            block, what = action["block"], _kind(action["reason"])
            before = last.get(block)
            resumed = before is None or place.get(step, 0) - before[0] > 1
            if what != "moves" and (before is None or before[1] != what):
                news[what].append(block)
            elif resumed and what == "moves":
                news[f"begins to steer, {_why(action['reason'])}"].append(block)
            last[block] = place.get(step, 0), what
        for what, blocks in news.items():
            yield _steering_event(step, what, blocks)


def _kind(reason: str) -> str:
    if reason.startswith(HELD):
        return "the bounds of the scales stop the controller"
    if FLOORED in reason:
        return "the controller has come to a floor, or to a norm at the start"
    return "attention is not raised, because the token residual falls" if REFUSED in reason else "moves"


def _why(reason: str) -> str:
    """Return a reason without its numbers, which differ from block to block."""
    return clear(re.sub(r": [\d.e+-]+, limit [\d.e+-]+", "", reason), 200)


def _steering_event(step: int, what: str, blocks: Sequence[int]) -> Event:
    text = f"controller {what}: {block_list(blocks)}" if what.startswith("begins") else f"{what}: {block_list(blocks)}"
    return Event("note", step, step, tuple(blocks), text, name="steering")

"""Words that all pages share: texts made safe, counts, lists of blocks, what a zone says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from lightning_spectral.records import LayerMeasurement, Measurement
from lightning_spectral.runs.history import History

__all__ = ["block_list", "clear", "clear_name", "damaged_lines", "many", "zone_of", "zone_words"]

LISTED = 10  # damaged lines named in a sentence


def clear(text: str, most: int = 100) -> str:
    """Return a text from a file in a form that is safe to show: printable, and not too long."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def clear_name(name: str, most: int = 100) -> str:
    """Return the name of a block like :func:`clear`, but cut in its middle: blocks differ at the end of their names."""
    head = most // 3
    whole = clear(name, len(name))
    return whole if len(whole) <= most else f"{whole[:head]}…{whole[head + 1 - most :]}"


def many(count: int, word: str) -> str:
    """Return a count with its noun: "1 step", "2,000 steps"."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def block_list(blocks: Iterable[int]) -> str:
    """Return indices of blocks as ranges: "block 3", "blocks 0–4, 7"."""
    ranges: list[list[int]] = []
    for block in sorted(set(blocks)):
        if ranges and block == ranges[-1][-1] + 1:
            ranges[-1].append(block)
        else:
            ranges.append([block])
    parts = [f"{part[0]}" if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in ranges]
    one = len(ranges) == 1 and len(ranges[0]) == 1
    return f"{'block' if one else 'blocks'} {', '.join(parts)}"


def zone_of(measurement: Measurement) -> tuple[float, float] | None:
    """Return the safe zone, ``None`` for Jacobians, for which nobody has calibrated a safe zone."""
    return measurement.safe_zone if measurement.has_zone else None


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
        yield f"{many(len(missing), 'block')} without a ratio {moments[1]}; the table of blocks says why."
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
        yield f"Farthest {side}: block {worst.index} ({clear_name(worst.name)}) at ρ = {worst.ratio:.4g}."


def _inside(measurement: Measurement, zone: tuple[float, float]) -> str | None:
    ratios = [layer.ratio for layer in measurement if layer.ratio is not None]
    inside = sum(zone[0] < ratio < zone[1] for ratio in ratios)
    return f"{inside} of {len(ratios)} blocks" if ratios else None


def _excess(layer: LayerMeasurement, zone: tuple[float, float]) -> float:
    """Return how far a ratio is outside the safe zone, in ln ρ; negative inside."""
    assert layer.log_ratio is not None
    low, high = np.log(zone)
    return float(max(low - layer.log_ratio, layer.log_ratio - high))

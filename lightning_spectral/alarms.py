"""Series of measurements in, events out.

Leaving the safe zone is information, not an alarm: the zone is a heuristic (see the README), so an event says what
happened and judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_spectral.records import Measurement

__all__ = ["Crossing", "announcement", "zone_crossings"]

TOLD_AT_ONCE = 4  # blocks named in one message

Sides = dict[int, int]  # block index -> -1 below, 0 inside, 1 above the zone


@dataclass(frozen=True, slots=True)
class Crossing:
    """One block left the safe zone or came back.

    Attributes:
        index: Index of the block.
        name: Module path of the block.
        ratio: The ratio that was measured.
        side: Where it is now: -1 below, 0 inside, 1 above the zone.
    """

    index: int
    name: str
    ratio: float
    side: int

    def __str__(self) -> str:
        """Say what happened in one clause."""
        where = {-1: "is below", 0: "is back in", 1: "is above"}[self.side]
        return f"block {self.index} ({self.name}) {where} the zone at {self.ratio:.4g}"


def zone_crossings(sides: Mapping[int, int], measurement: Measurement) -> tuple[list[Crossing], Sides]:
    """Compare a measurement with where the blocks were before.

    Args:
        sides: What the previous call returned; empty at first. A block that is not in it counts as inside.
        measurement: The new measurement. A block without a ratio stays where it was.

    Returns:
        The blocks that changed sides, in order of execution, and where all blocks are now.
    """
    low, high = measurement.safe_zone
    now, crossings = dict(sides), []
    for layer in measurement:
        if layer.ratio is None:
            continue
        side = (layer.ratio >= high) - (layer.ratio <= low)
        if side != sides.get(layer.index, 0):
            crossings.append(Crossing(layer.index, layer.name, layer.ratio, side))
        now[layer.index] = side
    return crossings, now


def announcement(crossings: Sequence[Crossing], measurement: Measurement) -> str:
    """Say in one line which blocks crossed an edge of the zone, with value and step."""
    low, high = measurement.safe_zone
    more = f"; and {len(crossings) - TOLD_AT_ONCE} more" if len(crossings) > TOLD_AT_ONCE else ""
    listed = "; ".join(map(str, crossings[:TOLD_AT_ONCE]))
    return f"spectral ratio, step {measurement.step}, zone ({low:g}, {high:g}): {listed}{more}"

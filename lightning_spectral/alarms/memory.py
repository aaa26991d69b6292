"""The memory of the alarms between two measurements of a run. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from lightning_spectral.alarms.trends import Trend, trend
from lightning_spectral.records.events import Level

__all__ = ["BlockMemory", "Memory", "Point", "line_through"]

PATIENCE = 3  # a ratio is a witness after this many measurements in a row outside of the zone
# Skip the first 5 measurements and the first 100 steps. The median of the next 5 measurements is the baseline.
SETTLING = 5
WARMUP_STEPS = 100

Point = tuple[int, float]  # (step, value), or (index of a block, value)


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """The memory of one block.

    Attributes:
        side: Side of the zone that the last ratio was on: -1 below, 0 inside, 1 above.
        since: Step at which the ratio came to this side.
        times: Measurements in a row on this side.
        settled: ln ρ in the measurements that make the baseline.
        ratios: The last values of ln ρ, with their steps.
        residuals: The last values of ln r, with their steps; r is the token residual of the block's output.
        warned: Step at which the drift began, ``None`` for a block that does not drift.
    """

    side: int = 0
    since: int = 0
    times: int = 0
    settled: Sequence[float] = ()
    ratios: Sequence[Point] = ()
    residuals: Sequence[Point] = ()
    warned: int | None = None

    @property
    def stays(self) -> int:
        """The side of a block that has stayed outside long enough to be a witness; 0 for every other block."""
        return self.side if self.times >= PATIENCE else 0

    @property
    def excess(self) -> float | None:
        """Distance of the block from its baseline, away from the zone, in ln ρ: median of the last 3 measurements."""
        if len(self.settled) < SETTLING or not self.side:
            return None
        return self.side * (median(value for _, value in self.ratios[-PATIENCE:]) - median(self.settled))


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a run.

    Attributes:
        blocks: The memory of each block, by its index.
        began: Step of the first measurement.
        measurements: Measurements so far.
        checks: For each of the last checks, whether the tokens were on their way to collapse or collapsed.
        arrived: For each of the last checks, whether the tokens had collapsed.
        told: Level of the last event about the tokens; ``None`` before the first one and after an all-clear.
        told_drifting: Number of drifting blocks in the last event about drift.
    """

    blocks: Mapping[int, BlockMemory] = field(default_factory=dict)
    began: int | None = None
    measurements: int = 0
    checks: Sequence[bool] = ()
    arrived: Sequence[bool] = ()
    told: Level | None = None
    told_drifting: int = 0

    @property
    def drifting(self) -> frozenset[int]:
        """Indices of the blocks that drift away from their baseline."""
        return frozenset(index for index, block in self.blocks.items() if block.warned is not None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Memory:
        """Rebuild a memory from ``dataclasses.asdict``. Unknown keys are ignored; missing keys get their default."""
        blocks = {index: BlockMemory(**_known(BlockMemory, block)) for index, block in values.get("blocks", {}).items()}
        return cls(**_known(cls, values) | {"blocks": blocks})


def line_through(points: Sequence[Point]) -> Trend | None:
    """Fit a line to points; ``None`` for fewer than 4 points."""
    return trend(*zip(*points, strict=True)) if points else None


def _known(record: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(record) if item.name in values}

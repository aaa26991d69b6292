"""What is said of a run, and what is remembered of it between two measurements. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from lightning_spectral.alarms.trends import Trend, trend
from lightning_spectral.records.events import Level

__all__ = ["BlockMemory", "Memory", "Point", "line_through"]

PATIENCE = 3  # measurements in a row that a ratio has to be outside before it is a witness
SETTLING = 5  # a baseline is the median of so many measurements, after as many, and these steps, that are passed over
WARMUP_STEPS = 100

Point = tuple[int, float]  # step, or index of a block, and value


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """What is remembered of one block.

    Attributes:
        side: Where its ratio was last: -1 below, 0 inside, 1 above the zone.
        since: Step since which it has been there.
        times: Measurements in a row that it has been there.
        settled: ln ρ in the measurements that the baseline is taken from.
        ratios: The last values of ln ρ.
        residuals: The last values of ln r, r the token residual of the block's output.
        warned: Step since which it drifts away, ``None`` where it does not.
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
        """The side on which the block has stayed for long enough to be a witness, 0 for neither."""
        return self.side if self.times >= PATIENCE else 0

    @property
    def excess(self) -> float | None:
        """How far the block is beyond its baseline, in ln ρ, by the median of its last measurements."""
        if len(self.settled) < SETTLING or not self.side:
            return None
        return self.side * (median(value for _, value in self.ratios[-PATIENCE:]) - median(self.settled))


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of a run.

    Attributes:
        blocks: By the index of the block.
        began: Step of the first measurement.
        measurements: Measurements so far.
        checks: Whether the tokens were on their way to collapse, or there, in each of the last checks.
        arrived: Whether they were there, in each of the last checks.
        told: What was last said of the tokens, ``None`` while they give no reason to say anything.
        told_drifting: How many blocks were drifting away when that was last said.
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
        """Indices of the blocks that drift away."""
        return frozenset(index for index, block in self.blocks.items() if block.warned is not None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Memory:
        """Rebuild what ``dataclasses.asdict`` made; unknown keys are ignored and missing ones have their default."""
        blocks = {index: BlockMemory(**_known(BlockMemory, block)) for index, block in values.get("blocks", {}).items()}
        return cls(**_known(cls, values) | {"blocks": blocks})


def line_through(points: Sequence[Point]) -> Trend | None:
    """Fit a line to points, ``None`` where there are too few."""
    return trend(*zip(*points, strict=True)) if points else None


def _known(record: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(record) if item.name in values}

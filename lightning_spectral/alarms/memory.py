"""The memory of the rules between two measurements of a run. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from lightning_spectral.alarms.trends import Trend, trend

__all__ = ["BlockMemory", "Memory", "Point", "RuleMemory", "line_through"]

PATIENCE = 3  # a ratio has moved to a side after this many measurements in a row there
# Skip the first 5 measurements and the first 100 steps. The median of the next 5 measurements is the baseline.
SETTLING = 5
WARMUP_STEPS = 100

Point = tuple[int, float]  # (step, value), or (index of a block, value)


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """The memory of one block.

    Attributes:
        side: Side of the safe zone that the last ratio was on: -1 below, 0 inside, 1 above.
        told: Side that was told last. A block counts as back only when it is well inside, so that one at an edge is
            told once.
        since: Step at which the ratio came to this side.
        times: Measurements in a row on this side.
        settled: ln ρ in the measurements that make the baseline.
        ratios: The last values of ln ρ, with their steps.
        residuals: The last values of ln r, with their steps; r is the token residual of the block's output.
        sizes: What grows before a block is not finite, by name, with the steps: norms, the stream, attention logits.
        warned: Step at which the drift began, ``None`` for a block that does not drift.
    """

    side: int = 0
    told: int = 0
    since: int = 0
    times: int = 0
    settled: Sequence[float] = ()
    ratios: Sequence[Point] = ()
    residuals: Sequence[Point] = ()
    sizes: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    warned: int | None = None

    @property
    def stays(self) -> int:
        """The side of a block that has stayed outside for a while; 0 for every other block."""
        return self.side if self.times >= PATIENCE else 0

    @property
    def excess(self) -> float | None:
        """Distance of the block from its baseline, outwards, in ln ρ: median of the last 3 measurements."""
        if len(self.settled) < SETTLING or not self.side:
            return None
        return self.side * (median(value for _, value in self.ratios[-PATIENCE:]) - median(self.settled))


@dataclass(frozen=True, slots=True)
class RuleMemory:
    """The memory of one rule.

    Attributes:
        seen: For each of the last checks, whether the rule saw its sign. A measurement that cannot show it is no check.
        since: Step of the first check of those that have seen it and were told, or may soon be; else ``None``.
        told: Whether the event of the rule is on.
    """

    seen: Sequence[bool] = ()
    since: int | None = None
    told: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a run.

    Attributes:
        blocks: The memory of each block, by its index.
        began: Step of the first measurement.
        measurements: Measurements so far.
        rules: The memory of each rule, by its name.
        finite: Step of the last measurement in which everything was finite.
        told_drifting: Number of drifting blocks in the last event about drift.
        spreads: The last values of ln r, with their steps: of what :func:`~lightning_spectral.alarms.signs.spreads`
            names, over tokens or over samples.
        firsts: The first value of each of them in the run.
        peaks: The largest value of each of them in the run.
    """

    blocks: Mapping[int, BlockMemory] = field(default_factory=dict)
    began: int | None = None
    measurements: int = 0
    rules: Mapping[str, RuleMemory] = field(default_factory=dict)
    finite: int | None = None
    told_drifting: int = 0
    spreads: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    firsts: Mapping[str, float] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)

    @property
    def drifting(self) -> frozenset[int]:
        """Indices of the blocks that drift away from their baseline."""
        return frozenset(index for index, block in self.blocks.items() if block.warned is not None)

    def is_on(self, *names: str) -> bool:
        """Whether the event of one of some rules has been told and is not over."""
        return any(name in self.rules and self.rules[name].told for name in names)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Memory:
        """Rebuild a memory from ``dataclasses.asdict``. Unknown keys are ignored; missing keys get their default."""
        known = {index: _known(BlockMemory, block) for index, block in values.get("blocks", {}).items()}
        # A state from before ``told`` was written when every crossing was told.
        blocks = {index: BlockMemory(**{"told": block.get("side", 0), **block}) for index, block in known.items()}
        rules = {name: RuleMemory(**_known(RuleMemory, rule)) for name, rule in values.get("rules", {}).items()}
        return cls(**_known(cls, values) | {"blocks": blocks, "rules": rules})


def line_through(points: Sequence[Point]) -> Trend | None:
    """Fit a line to points; ``None`` for fewer than 4 points."""
    return trend(*zip(*points, strict=True)) if points else None


def _known(record: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(record) if item.name in values}

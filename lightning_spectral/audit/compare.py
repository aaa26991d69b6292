"""Two measurements of one architecture, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_spectral.errors import CheckpointError
from lightning_spectral.records import LayerMeasurement, Measurement

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two measurements of the same blocks.

    Attributes:
        before: The first measurement.
        after: The second one.
    """

    before: Measurement
    after: Measurement

    def log_ratio_changes(self) -> tuple[float | None, ...]:
        """Return the change of ln ρ of every block, ``None`` where one of the two ratios does not exist."""
        return tuple(
            None if one.log_ratio is None or two.log_ratio is None else two.log_ratio - one.log_ratio
            for one, two in zip(self.before, self.after, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that ``json.dumps`` accepts."""
        changes = list(self.log_ratio_changes())
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), "log_ratio_change": changes}

    def __str__(self) -> str:
        """Return a readable table, one line per block."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = max(len(layer.name) for layer in (*self.before, LayerMeasurement(0, "block", None, None)))
        yield f"before -> after, linearization={self.after.linearization!r}"
        heads = "".join(f"  {word:^21}" for word in ("mlp", "attention", "ratio"))
        yield f"{'':>4}  {'block':<{width}}{heads}  {'Δ ln ratio':>10}"
        for one, two, change in zip(self.before, self.after, self.log_ratio_changes(), strict=True):
            values = ((one.mlp_norm, two.mlp_norm), (one.attention_norm, two.attention_norm), (one.ratio, two.ratio))
            columns = "".join(f"  {_number(left):>9} -> {_number(right):<8}" for left, right in values)
            delta = "-" if change is None else format(change, "+.4f")
            yield f"{one.index:>4}  {one.name:<{width}}{columns}  {delta:>10}"
        for when, measurement in (("before", self.before), ("after", self.after)):
            yield from (f"note on the one {when}: {note}" for note in measurement.notes)


def _number(value: float | None) -> str:
    return "-" if value is None else format(value, ".4g")


def compare(before: Measurement, after: Measurement) -> Comparison:
    """Put two measurements side by side.

    Args:
        before: A measurement.
        after: One of the same architecture, by the same linearization and with the same part of its adapters.

    Raises:
        CheckpointError: They are of different architectures, or not of the same quantity.
    """
    names = [layer.name for layer in before], [layer.name for layer in after]
    if before.adapters != after.adapters:
        raise CheckpointError(
            f"two measurements cannot be compared: one has adapters={before.adapters!r}, the other "
            f"adapters={after.adapters!r}; measure both with the same adapters="
        )
    if before.linearization != after.linearization or names[0] != names[1]:
        raise CheckpointError(
            f"two checkpoints cannot be compared: one has {len(names[0])} blocks by {before.linearization!r}, the "
            f"other {len(names[1])} by {after.linearization!r}, expected the same names and the same linearization"
        )
    return Comparison(before, after)

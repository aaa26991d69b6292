"""Two measurements of one architecture, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_spectral.errors import CheckpointError
from lightning_spectral.records.measurements import Measurement
from lightning_spectral.records.text import Table, Tabular

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Tabular):
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

    def _table(self) -> Table:
        rows = []
        for one, two, change in zip(self.before, self.after, self.log_ratio_changes(), strict=True):
            pairs = ((one.mlp_norm, two.mlp_norm), (one.attention_norm, two.attention_norm), (one.ratio, two.ratio))
            delta = "-" if change is None else format(change, "+.4f")
            rows.append([str(one.index), one.name, *(_pair(*pair) for pair in pairs), delta])
        notes = [
            f"note on the one {when}: {note}"
            for when, measurement in (("before", self.before), ("after", self.after))
            for note in measurement.notes
        ]
        columns = [">4", "<block", "^21mlp", "^21attention", "^21ratio", ">10Δ ln ratio"]
        return Table(f"before -> after, linearization={self.after.linearization!r}", columns, rows, notes)


def _pair(before: float | None, after: float | None) -> str:
    left, right = ("-" if value is None else format(value, ".4g") for value in (before, after))
    return f"{left:>9} -> {right:<8}"


def compare(before: Measurement, after: Measurement) -> Comparison:
    """Put two measurements side by side.

    Args:
        before: A measurement.
        after: One of the same architecture, by the same linearization and with the same part of its adapters.

    Raises:
        CheckpointError: They are of different architectures, or not of the same quantity.

    Example:
        >>> before = measure(model)
        >>> compare(before, measure(model)).log_ratio_changes()
        (0.0, 0.0, 0.0)
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

"""Two measurements of one architecture, block by block."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_spectral.errors import CheckpointError
from lightning_spectral.records.measurements import LayerMeasurement, Measurement
from lightning_spectral.records.text import Table, Tabular, numbered

__all__ = ["Comparison", "compare", "moved_by"]

SAME = 0.01  # a ratio that changes by less is the same: norms are estimates
WIDTH = 80  # characters of a line
LONGEST, LEAST = 15, 8  # characters of a name: numbers lose digits before a name has less than the second


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

    def summary(self) -> str:
        """Return one line on the largest change: the block, by which factor its ratio changed, and by which branch."""
        changes = [0.0 if change is None else change for change in self.log_ratio_changes()]
        place = max(range(len(changes)), key=lambda index: abs(changes[index]), default=None)
        if place is None or abs(changes[place]) < SAME:
            return f"largest change: none, every ratio is the same to {SAME:.0%}"
        one, two = self.before.layers[place], self.after.layers[place]
        return f"largest change: block {numbered(two)}, ratio {_factor(changes[place])}, by {_mover(one, two)}"

    def _table(self) -> Table:
        for digits in (3, 2, 1):
            columns = self._columns(digits)
            room = WIDTH - sum(2 + max(map(len, [name, *column])) for name, column in columns.items())
            if room >= LEAST:
                break
        names = {"block": [_ending(layer.name, min(room, LONGEST)) for layer in self.after]}
        columns = {"": columns.pop(""), **names, **columns}
        notes = [
            f"note on the one {when}: {note}"
            for when, measurement in (("before", self.before), ("after", self.after))
            for note in measurement.notes
        ]
        title = f"before → after, linearization={self.after.linearization!r}, {self.after.zone_words}"
        below = [line for text in (self.summary(), *notes) for line in _lines(text)]
        aligned = [side + name for side, name in zip("><^^^><", columns, strict=True)]
        return Table(title, aligned, list(zip(*columns.values(), strict=True)), below)

    def _columns(self, digits: int) -> dict[str, list[str]]:
        """Return all columns but the names, which get what is left of a line."""
        both = tuple(zip(self.before, self.after, strict=True))
        pairs = {"mlp": "mlp_norm", "attention": "attention_norm", "ratio": "ratio"}
        return {
            "": [f"{one.index:>3}" for one, _ in both],
            **{
                name: _pairs([(getattr(one, key), getattr(two, key)) for one, two in both], digits)
                for name, key in pairs.items()
            },
            "change": ["-" if change is None else _factor(change, digits) for change in self.log_ratio_changes()],
            " ": [_where(self.before.side(one), self.after.side(two)) for one, two in both],
        }


def _pairs(values: Sequence[tuple[float | None, float | None]], digits: int) -> list[str]:
    """Return a column of "before → after", with the arrows below each other."""
    texts = [["-" if value is None else _number(value, digits) for value in pair] for pair in values]
    left, right = (max((len(pair[side]) for pair in texts), default=0) for side in (0, 1))
    return [f"{before:>{left}} → {after:<{right}}" for before, after in texts]


def _number(value: float, digits: int) -> str:
    """Return a number with three digits, or with fewer where these make it long: 1.23e-12, 1e-12."""
    text = f"{value:.3g}"
    if digits == 3 or (len(text) <= 5 and "e" not in text):
        return text
    short = f"{value:.{digits}g}" if "e" not in text else f"{value:.{digits - 1}e}"
    return re.sub(r"e\+?(-?)0*", r"e\1", short)


def _where(before: str, after: str) -> str:
    """Return the side of the safe zone that a block is on, behind an arrow if it has come to it."""
    return after if before == after else f"→ {after or 'inside'}"


def _factor(change: float, digits: int = 3) -> str:
    return f"×{_number(math.exp(change), digits)}"


def _ending(name: str, most: int) -> str:
    return name if len(name) <= most else f"…{name[len(name) - most + 1 :]}"


def _lines(text: str) -> list[str]:
    """Return a text in lines that a terminal shows whole."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def moved_by(mlp: float, attention: float) -> Literal["MLP", "attention", "both"]:
    """Return the branch that has moved a ratio: both, where the smaller part is more than half of the larger one.

    Args:
        mlp: The part of the MLP in a change of ln ρ, positive if it has the direction of the change.
        attention: That of the attention, whose norm moves ρ the other way.
    """
    if min(mlp, attention) > max(mlp, attention) / 2:
        return "both"
    return "MLP" if mlp > attention else "attention"


def _mover(one: LayerMeasurement, two: LayerMeasurement) -> str:
    """Name the branch that moved a ratio, with the factors of both if both did."""
    assert one.mlp_norm
    assert two.mlp_norm
    assert one.attention_norm
    assert two.attention_norm
    mlp, attention = math.log(two.mlp_norm / one.mlp_norm), math.log(one.attention_norm / two.attention_norm)
    sign = math.copysign(1.0, mlp + attention)
    branch = moved_by(sign * mlp, sign * attention)
    if branch == "both":
        return f"both branches (MLP {_factor(mlp)}, attention {_factor(-attention)})"
    return f"its {branch}"


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
        apart = next(((one, two) for one, two in zip(*names, strict=False) if one != two), None)
        raise CheckpointError(
            f"two checkpoints cannot be compared: one has {len(names[0])} blocks by {before.linearization!r}, the "
            f"other {len(names[1])} by {after.linearization!r}"
            + ("" if apart is None else f", and a block is {apart[0]!r} in one and {apart[1]!r} in the other")
            + ", expected the same names and the same linearization"
        )
    return Comparison(before, after)

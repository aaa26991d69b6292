"""How one run differs from another, block by block. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_spectral.pages.tables import Table, number
from lightning_spectral.pages.words import clear_name
from lightning_spectral.records import LayerMeasurement
from lightning_spectral.runs.history import History

__all__ = ["Difference", "difference_table", "differences", "shared_steps", "told_difference"]

ALIKE = math.log(1.05)  # ratios that are closer count as equal


@dataclass(frozen=True, slots=True)
class Difference:
    """One block in two runs, at one step.

    Attributes:
        one: The block in the first run.
        other: The block in the other run.
    """

    one: LayerMeasurement
    other: LayerMeasurement

    @property
    def log_factor(self) -> float | None:
        """ln of the ratio in the other run over the ratio in the first; ``None`` where one of them does not exist."""
        if self.one.log_ratio is None or self.other.log_ratio is None:
            return None
        return self.other.log_ratio - self.one.log_ratio

    @property
    def mlp_factor(self) -> float | None:
        """Norm of the MLP in the other run over the one in the first run."""
        return _factor(self.one.mlp_norm, self.other.mlp_norm)

    @property
    def attention_factor(self) -> float | None:
        """The same for the attention."""
        return _factor(self.one.attention_norm, self.other.attention_norm)


def shared_steps(one: History, other: History) -> tuple[int, ...]:
    """Return the steps at which both runs were measured."""
    return tuple(sorted(set(one.steps) & set(other.steps)))


def differences(one: History, other: History, step: int) -> tuple[Difference, ...]:
    """Return the blocks that both runs have, by their index, at a step at which both were measured."""
    first, second = ({layer.index: layer for layer in _at(history, step)} for history in (one, other))
    return tuple(Difference(first[block], second[block]) for block in sorted(first.keys() & second.keys()))


def _at(history: History, step: int) -> tuple[LayerMeasurement, ...]:
    return tuple(next(iter(item for item in history.measurements if item.step == step)))


def told_difference(found: Sequence[Difference], letters: tuple[str, str], step: int) -> str:
    """Return a sentence on the block that differs most."""
    one, other = letters
    known = [(abs(item.log_factor), item) for item in found if item.log_factor is not None]
    if not known:
        return f"At step {step:,}, no block has a ratio in both {one} and {other}."
    size, most = max(known, key=lambda pair: pair[0])
    if size < ALIKE:
        return f"At step {step:,}, the ratios of all blocks agree within 5 % in {one} and {other}."
    alike = sum(distance < ALIKE for distance, _ in known)
    block = f"block {most.other.index} ({clear_name(most.other.name)})"
    return (
        f"At step {step:,}, {other} differs most from {one} in {block}: "
        f"ρ = {most.one.ratio:.4g} in {one} and {most.other.ratio:.4g} in {other}. Its MLP is ×{most.mlp_factor:.3g}, "
        f"its attention ×{most.attention_factor:.3g}. {alike} of {len(known)} blocks agree within 5 %."
    )


def difference_table(found: Sequence[Difference], letters: tuple[str, str], step: int) -> Table:
    """Return a table with one row per block."""
    one, other = letters
    rows = []
    for item in found:
        factor = None if item.log_factor is None else math.exp(item.log_factor)
        values = (item.one.ratio, item.other.ratio, factor, item.mlp_factor, item.attention_factor)
        rows.append((str(item.other.index), clear_name(item.other.name), *map(number, values)))
    both = f"{other} / {one}"
    head = ("block", "name", f"ρ, {one}", f"ρ, {other}", f"ρ, {both}", f"‖MLP‖₂, {both}", f"‖attention‖₂, {both}")
    return Table(f"{other} against {one} at step {step:,}", head, tuple(rows))


def _factor(one: float | None, other: float | None) -> float | None:
    return other / one if one and other is not None else None

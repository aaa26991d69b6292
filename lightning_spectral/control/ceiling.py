r"""The ceiling law: no branch above a ceiling, no ratio outside the safe zone, and no scale is ever raised.

Let N be the number of branches that add to the residual stream, and n the spectral norm of a branch, measured *with*
its residual scale s. Each branch has a limit. A branch above its limit is lowered to the limit:

    s  ←  s · min(1, limit / n)

This is exact, because n is proportional to s. The limit comes from four rules:

* Ceiling: κ / √N. Let N branches add independent outputs of size κ / √N to a stream of size 1. The squares add up, and
  the stream ends at a size of √(1 + κ²), whatever the depth (the same reason as for depth-scaled residuals). In
  training, branches grow to about ten times their initial norm. So both branches of a block end at the ceiling, where
  their ratio is 1.
* Safe zone: if the ratio of a block is outside the safe zone less a margin, the limit of its stronger branch is the
  norm of the weaker branch times the ratio at the edge. The weaker branch is never raised.
* Floor: no limit is below the floor, a fraction of the ceiling. Otherwise a branch that starts at zero would pull the
  other one down to zero. Hence a block of two weak branches may have any ratio.
* Trained models: if the model was trained before the run, no limit is below the norm of the branch at the start, since
  lowering a trained branch would change the function of the model.

The law remembers only the norms at the start, and what it has told. Applied twice to fixed weights, it does nothing the
second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from lightning_spectral import _checks
from lightning_spectral.control.law import Action, Reading, State
from lightning_spectral.errors import ConfigurationError

__all__ = ["FLOORED", "GainCeiling", "strength"]

_CRUMB = 1e-3  # nats: a smaller excess is not worth a move
_WORDS = ("MLP", "attention")
FLOORED = "lowered to its"  # in the reason of an action that leaves the ratio beyond the edge: no limit is lower


@dataclass(frozen=True, slots=True, kw_only=True)
class GainCeiling:
    """Settings of the ceiling law, for ``SpectralMonitor(auto_rescale=GainCeiling(...))``.

    Attributes:
        ceiling: κ: no branch may have a spectral norm above κ / √(number of branches).
        margin: Distance inside the edges of the safe zone to which a ratio is brought back, in nats (0.2 is a factor of
            1.22).
        floor: Fraction of the ceiling below which no branch is lowered, in (0, 1].
        warmup_steps: Number of optimizer steps before the first action.
        dry_run: Whether to report the actions and change nothing.
        learnable: Whether the optimizer trains the scales too. If not, only the law moves them.

    Raises:
        ConfigurationError: A setting cannot be used; the message names it.

    Example:
        >>> GainCeiling(ceiling=3.0)
        GainCeiling(ceiling=3.0, margin=0.35, floor=0.1, warmup_steps=0, dry_run=False, learnable=False)
    """

    ceiling: float = 1.0
    margin: float = 0.35
    floor: float = 0.1
    warmup_steps: int = 0
    dry_run: bool = False
    learnable: bool = False

    at_once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check every setting."""
        _checks.number("ceiling", self.ceiling, 0.0, math.inf, above=True)
        _checks.number("margin", self.margin, 0.0, math.inf)
        _checks.number("floor", self.floor, 0.0, 1.0, above=True)
        _checks.steps("warmup_steps", self.warmup_steps, least=0)
        _checks.flag("dry_run", self.dry_run)
        _checks.flag("learnable", self.learnable)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"law": type(self).__name__} | asdict(self)

    def check(self, safe_zone: tuple[float, float]) -> None:
        """Check that the safe zone contains 1, also after the margin is taken off both ends.

        Raises:
            ConfigurationError: The safe zone less its margins does not contain 1.
        """
        low, high = map(math.log, safe_zone)
        if not low + self.margin < 0 < high - self.margin:
            raise ConfigurationError(
                f"margin={self.margin!r}: expected less than the distance from 1 to either edge of "
                f"safe_zone={safe_zone!r}, {min(-low, high):.3g} nats"
            )

    def decide(
        self, safe_zone: tuple[float, float], step: int, readings: Sequence[Reading], states: Sequence[State]
    ) -> tuple[tuple[Action, ...], list[dict[str, Any]]]:
        """Decide what to do after a measurement (see :class:`~lightning_spectral.control.law.Law`)."""
        known = states if len(states) == len(readings) else [{}] * len(readings)
        after = [dict(state) or _first(reading) for reading, state in zip(readings, known, strict=True)]
        if step < self.warmup_steps:
            return (), after
        ceiling = math.log(strength(self.ceiling, (reading.kinds for reading in readings)))
        edges = (math.log(safe_zone[1]) - self.margin, -math.log(safe_zone[0]) - self.margin)
        bounds = _Bounds(ceiling, ceiling + math.log(self.floor), edges)
        found = (_action(block, *seen, bounds) for block, seen in enumerate(zip(readings, after, strict=True)))
        actions = tuple(action for action in found if action is not None)
        for action in actions:
            after[action.block]["begun"] = True
            if action.held:
                after[action.block]["stopped"] = True
        return actions, after


class _Bounds(NamedTuple):
    """The numbers that the limits of all branches are made of, as natural logarithms.

    Attributes:
        ceiling: Largest norm of a branch.
        floor: Smallest limit that the safe zone may set.
        edges: Largest excess of the MLP over the attention, and of the attention over the MLP.
    """

    ceiling: float
    floor: float
    edges: tuple[float, float]


# An example for _action, with a ceiling of 0.3, a floor of 0.03 and the edge of the safe zone at a ratio of 1.4:
#
#     MLP      attention        MLP      attention
#     0.50     0.40      ──>    0.30     0.30          both at the ceiling
#     0.25     0.10      ──>    0.14     0.10          the MLP at the edge of the safe zone
#     0.25     0.001     ──>    0.03     0.001         the MLP at the floor, which the ratio may not undercut
def _action(block: int, reading: Reading, state: State, bounds: _Bounds) -> Action | None:
    """Return the action that lowers the branches of a block to their limits, ``None`` if both are below."""
    norms = _log(reading.mlp_norm), _log(reading.attention_norm)
    starts = state.get("mlp", -math.inf), state.get("attention", -math.inf)
    # The norms after the ceiling alone. The safe zone compares these, not the norms of now: both branches of a block
    # may be lowered at once, and the partner of a branch counts as it will be.
    caps = [
        None if norm is None else min(norm, max(bounds.ceiling, start))
        for norm, start in zip(norms, starts, strict=True)
    ]
    changes, reasons, held = [0.0, 0.0], [], False
    for place, scale in enumerate((reading.mlp, reading.attention)):
        norm, cap, beside = norms[place], caps[place], caps[1 - place]
        if norm is None or cap is None or scale is None:
            continue
        least = max(bounds.floor, starts[place])
        limit = cap if beside is None else min(cap, max(beside + bounds.edges[place], least))
        if norm - limit > _CRUMB:
            changes[place] = limit - norm
            what = "outside the safe zone less its margin" if limit < cap else "above its ceiling"
            if beside is not None and beside + bounds.edges[place] < limit == least:
                held = True
                what += f", {FLOORED} {'floor' if least == bounds.floor else 'norm at the start'}"
            reasons.append(f"{_WORDS[place]} {what}: {math.exp(norm):.4g}, limit {math.exp(limit):.4g}")
    if not reasons:
        return None
    held = held and not state.get("stopped", False)
    return Action(block, changes[0], changes[1], ", ".join(reasons), begins=not state["begun"], held=held)


def strength(gain: float, kinds: Iterable[int]) -> float:
    """Return κ / √N, the spectral norm of one of N branches that together have the gain κ.

    N counts every kind of branch of every block once. Cross-attention, mixers and branches that cannot be measured or
    moved count too. A block that is listed once counts once, even if it runs several times.

    Args:
        gain: κ.
        kinds: Number of kinds of branches, per block.
    """
    return gain / math.sqrt(max(sum(kinds), 1))


def _first(reading: Reading) -> dict[str, Any]:
    """Return the state of a block at its first measurement: of a trained model, it keeps the norms."""
    norms = {"mlp": _log(reading.mlp_norm), "attention": _log(reading.attention_norm)}
    kept = {name: norm for name, norm in norms.items() if norm is not None and reading.trained}
    return {"begun": False} | kept


def _log(norm: float | None) -> float | None:
    """Return the logarithm of a norm, ``None`` for a norm that is unknown, zero or infinite."""
    return math.log(norm) if norm is not None and 0 < norm < math.inf else None

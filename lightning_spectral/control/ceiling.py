r"""The ceiling law: no branch above a ceiling, no ratio outside the safe zone, and no scale is ever raised.

Let N be the number of branches that add to the residual stream, and n the spectral norm of a branch, measured *with*
its residual scale. Each branch has a limit, and a branch above its limit is lowered to it,

    s  ←  s · min(1, limit / n),

the projection of ln s onto the scales under which the norm is allowed. It is exact, because n is proportional to s.

* The ceiling is κ / √N. A stream of unit size that N branches add independent outputs of size κ / √N to ends at a size
  of √(1 + κ²), whatever the depth: the reason of depth-scaled residuals. Branches outgrow their start tenfold in
  training, so both branches of a block come to stand at the ceiling, where their ratio is 1.
* A block whose ratio is outside the safe zone, less a margin, has the limit of its stronger branch at the edge: the
  norm of the weaker branch times the ratio there. The weaker branch is never raised.
* No limit is below the floor, a fraction of the ceiling, so that a branch that starts at zero does not take the other
  with it. Blocks of two weak branches may therefore have any ratio.
* In a model that was trained before the run, no limit is below the norm that the branch had at the start: to scale down
  what a model has learned to use would change its function.

The law has no memory but those norms. Applied twice to fixed weights, it does nothing the second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from lightning_spectral import _checks
from lightning_spectral.control.law import Action, Reading, State
from lightning_spectral.errors import ConfigurationError

__all__ = ["GainCeiling", "strength"]

_CRUMB = 1e-3  # nats: what is not worth a move
_WORDS = ("MLP", "attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class GainCeiling:
    """Settings of the ceiling law, for ``SpectralMonitor(auto_rescale=GainCeiling(...))``.

    Attributes:
        ceiling: κ: no branch may have a spectral norm above κ / √(number of branches).
        margin: How far inside the edges of the safe zone a ratio is brought back to, in nats (0.2 is a factor of 1.22).
        floor: Fraction of the ceiling below which no branch is lowered, in (0, 1].
        warmup_steps: Optimizer steps before the first action.
        dry_run: Whether to say what would be done and change nothing.
        learnable: Whether the optimizer trains the scales too. Otherwise the law alone moves them.

    Raises:
        ConfigurationError: A setting cannot be used; the message names it.
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
        """Check that the safe zone is around 1, and wider than the margins.

        Raises:
            ConfigurationError: It is not.
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
        return actions, after


class _Bounds(NamedTuple):
    """What the limits of all branches are made of, in logarithms.

    Attributes:
        ceiling: What no branch may exceed.
        floor: Below this nothing is lowered for the sake of a ratio.
        edges: How far the MLP may be above the attention, and how far the attention above the MLP.
    """

    ceiling: float
    floor: float
    edges: tuple[float, float]


def _action(block: int, reading: Reading, state: State, bounds: _Bounds) -> Action | None:
    """Return what lowers the branches of a block to their limits, ``None`` where there is nothing to do."""
    norms = _log(reading.mlp_norm), _log(reading.attention_norm)
    starts = state.get("mlp", -math.inf), state.get("attention", -math.inf)
    caps = [
        None if norm is None else min(norm, max(bounds.ceiling, start))
        for norm, start in zip(norms, starts, strict=True)
    ]
    changes, reasons = [0.0, 0.0], []
    for place, scale in enumerate((reading.mlp, reading.attention)):
        norm, cap, beside = norms[place], caps[place], caps[1 - place]
        if norm is None or cap is None or scale is None:
            continue
        least = max(bounds.floor, starts[place])
        limit = cap if beside is None else min(cap, max(beside + bounds.edges[place], least))
        if norm - limit > _CRUMB:
            changes[place] = limit - norm
            what = "outside the safe zone" if limit < cap else "above its ceiling"
            reasons.append(f"{_WORDS[place]} {what}: {math.exp(norm):.4g}, limit {math.exp(limit):.4g}")
    if not reasons:
        return None
    return Action(block, changes[0], changes[1], ", ".join(reasons), begins=not state["begun"])


def strength(gain: float, kinds: Iterable[int]) -> float:
    """Return κ / √N, the spectral norm of one of N branches that together have the gain κ.

    N counts every kind of branch of every block once, whether it can be measured and moved or not: cross-attention and
    mixers too. A module that several blocks share, and a block that runs several times, count where they are listed,
    which is once.

    Args:
        gain: κ.
        kinds: How many kinds of branches each block has.
    """
    return gain / math.sqrt(max(sum(kinds), 1))


def _first(reading: Reading) -> dict[str, Any]:
    """Return the state of a block that is seen for the first time."""
    norms = {"mlp": _log(reading.mlp_norm), "attention": _log(reading.attention_norm)}
    kept = {name: norm for name, norm in norms.items() if norm is not None and reading.trained}
    return {"begun": False} | kept


def _log(norm: float | None) -> float | None:
    """Return the logarithm of a norm, ``None`` for a norm that is not known or zero."""
    return math.log(norm) if norm is not None and 0 < norm < math.inf else None

"""The band law: it steers a ratio that is too high or too low, and keeps the geometric mean of the block's two norms.

The law is proportional control in ln ρ with hysteresis. Let e be the smoothed ln ρ of a block, measured *with* its
residual scales. If the ratio of a block stays outside the safe zone for ``patience`` measurements, each measurement
changes it by

    Δ ln ρ = - clip(gain · e, ± max_step)

until the ratio is inside the inner zone:

    ρ    0.5      0.7        1        1.4      2
    ──────┤────────┤─────────┼─────────├────────├──────
    starts         ends                ends     starts      safe zone (0.5, 2), inner zone (0.7, 1.4)

The ratio follows the scales exactly, d ln ρ / d ln(s_mlp / s_attention) = 1. With fixed weights, every action
multiplies the error by 1 - gain. The error is the distance from ρ = 1. With the distance from the edge of the safe zone
instead, the law would converge to the edge and never end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from lightning_spectral import _checks
from lightning_spectral.control.law import Action, Reading, State
from lightning_spectral.errors import ConfigurationError

__all__ = ["BlockState", "ResidualRescaler", "check_zones", "decide"]

_CRUMB = 1e-3  # nats: a smaller distance to a bound is not worth a move

Mode = Literal["both", "mlp", "attention"]
Sides = Literal["both", "low", "high"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualRescaler:
    """Settings of the band law, for ``SpectralMonitor(auto_rescale=ResidualRescaler(...))``.

    Attributes:
        gain: Fraction of the error in ln ρ that one action removes, in (0, 1].
        max_step: Largest change of ln ρ by one action, in nats (0.4 is a factor of 1.5).
        patience: Number of measurements in a row outside of the safe zone after which a ratio is steered.
        smoothing: Weight of the past in the moving average of ln ρ, in [0, 1).
        margin: Distance before the edge of the safe zone from which on a ratio counts as outside, in nats (0.2 is a
            factor of 1.22). With 0, a drifting ratio is outside of the safe zone for ``patience`` measurements before
            the law acts.
        inner_zone: Interval of ratios inside which steering ends. It contains 1 and lies inside the safe zone.
        mode: The scales that move: ``"mlp"``, ``"attention"``, or ``"both"``, in opposite directions and by one amount,
            so that their geometric mean stays.
        sides: The ratios that are steered: ``"low"`` (attention dominates), ``"high"`` (the MLP dominates) or
            ``"both"``. At initialization only a dominating attention makes tokens collapse.
        bounds: Smallest and largest residual scale that the law sets.
        guard: Whether to refuse to raise the attention of a block whose token residual falls over training, because
            more attention makes tokens more alike. The MLP still takes its share of the step. Without measured tokens
            (``SpectralMonitor(geometry=False)``) nothing is refused.
        warmup_steps: Number of optimizer steps before the first action.
        dry_run: Whether to report the actions and change nothing.
        learnable: Whether the optimizer trains the scales too. If not, only the law moves them.

    Raises:
        ConfigurationError: A setting cannot be used; the message names it.

    Example:
        >>> ResidualRescaler(sides="low", dry_run=True).sides
        'low'
    """

    gain: float = 0.5
    max_step: float = 0.4
    patience: int = 2
    smoothing: float = 0.5
    margin: float = 0.0
    inner_zone: tuple[float, float] = (0.7, 1.4)
    mode: Mode = "both"
    sides: Sides = "both"
    bounds: tuple[float, float] = (0.25, 4.0)
    guard: bool = True
    warmup_steps: int = 0
    dry_run: bool = False
    learnable: bool = True

    at_once: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every setting."""
        _checks.number("gain", self.gain, 0.0, 1.0, above=True)
        _checks.number("max_step", self.max_step, 0.0, math.inf, above=True)
        _checks.steps("patience", self.patience)
        _checks.number("smoothing", self.smoothing, 0.0, 1.0, below=True)
        _checks.number("margin", self.margin, 0.0, math.inf)
        _checks.choice("mode", self.mode, get_args(Mode))
        _checks.choice("sides", self.sides, get_args(Sides))
        _checks.steps("warmup_steps", self.warmup_steps, least=0)
        _checks.flag("guard", self.guard)
        _checks.flag("dry_run", self.dry_run)
        _checks.flag("learnable", self.learnable)
        for name in ("inner_zone", "bounds"):
            low, high = _checks.interval(name, getattr(self, name))
            if not low < 1 < high:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: expected an interval around 1")
            object.__setattr__(self, name, (low, high))  # a list, from a file, becomes a tuple

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"law": type(self).__name__} | asdict(self)

    def check(self, safe_zone: tuple[float, float]) -> None:
        """Check that the inner zone lies inside the safe zone (see :func:`check_zones`)."""
        check_zones(self, safe_zone)

    def decide(
        self, safe_zone: tuple[float, float], step: int, readings: Sequence[Reading], states: Sequence[State]
    ) -> tuple[tuple[Action, ...], list[dict[str, Any]]]:
        """Decide what to do after a measurement (see :class:`~lightning_spectral.control.law.Law`)."""
        known = [BlockState.from_dict(state) for state in states] if len(states) == len(readings) else []
        actions, after = decide(self, safe_zone, step, readings, known)
        return actions, [state.to_dict() for state in after]


def check_zones(rescaler: ResidualRescaler, safe_zone: tuple[float, float]) -> None:
    """Check that the inner zone lies inside the safe zone less its margin.

    Raises:
        ConfigurationError: The inner zone reaches outside, so that steering could begin and end at one ratio.
    """
    (low, high), (inner_low, inner_high) = safe_zone, rescaler.inner_zone
    if not low * math.exp(rescaler.margin) < inner_low < inner_high < high * math.exp(-rescaler.margin):
        less = f" less margin={rescaler.margin!r}" if rescaler.margin else ""
        raise ConfigurationError(
            f"inner_zone={rescaler.inner_zone!r}: expected an interval inside safe_zone={safe_zone!r}{less}; "
            "pass ResidualRescaler(inner_zone=...) with the safe zone"
        )


@dataclass(frozen=True, slots=True)
class BlockState:
    """Memory of the law for one block. Plain numbers.

    Attributes:
        smoothed: Moving average of ln ρ, ``None`` before the first measurement.
        outside: Number of measurements in a row with both the ratio and its average outside of the safe zone. (One
            outlier moves the average for several measurements, and is no reason to steer.)
        active: Whether the block is being steered.
        bounded: Whether a bound cut the last action short.
        refused: Whether the guard refused to raise the attention in the last action.
    """

    smoothed: float | None = None
    outside: int = 0
    active: bool = False
    bounded: bool = False
    refused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockState:
        """Rebuild a state. Unknown keys are ignored; missing keys get their default."""
        return cls(**{name: values[name] for name in cls.__slots__ if name in values})


def decide(
    rescaler: ResidualRescaler,
    safe_zone: tuple[float, float],
    step: int,
    readings: Sequence[Reading],
    states: Sequence[BlockState],
) -> tuple[tuple[Action, ...], tuple[BlockState, ...]]:
    """Decide what to do after a measurement. A function of plain numbers: equal numbers give equal decisions.

    Args:
        rescaler: The settings.
        safe_zone: The interval of ratios that counts as balanced.
        step: Optimizer step of the measurement.
        readings: One per block.
        states: One per block, as the previous call returned them; none at first.

    Returns:
        The actions, in order of the blocks, and the new states.
    """
    known = [*states, *[BlockState()] * (len(readings) - len(states))]
    actions, after = [], []
    for block, (reading, state) in enumerate(zip(readings, known, strict=True)):
        if reading.log_ratio is None or not math.isfinite(reading.log_ratio):
            after.append(state)
            continue
        seen = _seen(rescaler, safe_zone, reading.log_ratio, state, warm=step >= rescaler.warmup_steps)
        action = _action(rescaler, block, reading, seen) if seen.active else None
        if action is not None:
            moved = 0.0 if rescaler.dry_run else action.mlp - action.attention
            assert seen.smoothed is not None
            # The effect of an action on ln ρ is known exactly. Adding it to the average at once keeps the average from
            # lagging behind the scales, which would make the law overshoot.
            seen = replace(seen, smoothed=seen.smoothed + moved, bounded=action.held, refused=action.refused)
            # Report a persistent bound once. The scale can still move: the optimizer may pull it back inside.
            held, refused = action.held and not state.bounded, action.refused and not state.refused
            if action.moves or held or refused:
                actions.append(replace(action, begins=not state.active, held=held, refused=refused))
        after.append(seen)
    return tuple(actions), tuple(after)


def _seen(
    rescaler: ResidualRescaler, safe_zone: tuple[float, float], log_ratio: float, state: BlockState, *, warm: bool
) -> BlockState:
    """Return the state of a block after a measurement."""
    past = log_ratio if state.smoothed is None else state.smoothed
    smoothed = rescaler.smoothing * past + (1 - rescaler.smoothing) * log_ratio
    wrong = all(_wrong(rescaler, value, safe_zone, rescaler.margin) for value in (log_ratio, smoothed))
    outside = state.outside + 1 if warm and wrong else 0
    ready = state.active or outside >= rescaler.patience
    active = warm and ready and _wrong(rescaler, smoothed, rescaler.inner_zone)
    return BlockState(smoothed, outside, active, state.bounded and active, state.refused and active)


def _wrong(rescaler: ResidualRescaler, log_ratio: float, zone: tuple[float, float], margin: float = 0.0) -> bool:
    """Whether a ratio is outside of a zone, on a side that the law steers."""
    low, high = math.log(zone[0]) + margin, math.log(zone[1]) - margin
    return (log_ratio <= low and rescaler.sides != "high") or (log_ratio >= high and rescaler.sides != "low")


def _action(rescaler: ResidualRescaler, block: int, reading: Reading, state: BlockState) -> Action | None:
    """Return the proportional step of a block, cut to the bounds; ``None`` if it has no scale to move."""
    error = state.smoothed
    moving = {"both": ("mlp", "attention")}.get(rescaler.mode, (rescaler.mode,))
    if error is None or any(getattr(reading, name) is None for name in moving):
        return None
    wanted = -math.copysign(min(abs(rescaler.gain * error), rescaler.max_step), error)
    # ln ρ = ln s_mlp − ln s_attention + const. In mode "both", each scale takes half of the step, with opposite signs.
    # A bound on one scale holds the other one too, so that their geometric mean stays.
    shares = {name: (1 if name == "mlp" else -1) / len(moving) for name in moving}
    refused = rescaler.guard and reading.tokens_fall and error > 0 and shares.pop("attention", None) is not None
    room = min(
        (
            _room(rescaler.bounds, getattr(reading, name), math.copysign(share, share * wanted)) / abs(share)
            for name, share in shares.items()
        ),
        default=math.inf,
    )
    # The optimizer pulls a scale off its bound again and again. Moving it back by tiny amounts would reset its momentum
    # every time.
    step = math.copysign(min(abs(wanted), room), wanted) if room > _CRUMB else 0.0
    held = abs(step) < abs(wanted)
    reason = f"ratio too {'high' if error > 0 else 'low'}"
    if held:
        reason = f"held by the bounds of the scales, {reason}"
    if refused:
        reason += ", attention not raised because the token residual falls"
    mlp, attention = (step * shares[name] + 0.0 if name in shares else 0.0 for name in ("mlp", "attention"))
    return Action(block, mlp, attention, reason, error, held=held, refused=refused)


def _room(bounds: tuple[float, float], log_scale: float, direction: float) -> float:
    """Return the distance of a scale from the bound ahead of it, in nats; 0 for a scale beyond the bound."""
    low, high = math.log(bounds[0]), math.log(bounds[1])
    return max(high - log_scale if direction > 0 else log_scale - low, 0.0)

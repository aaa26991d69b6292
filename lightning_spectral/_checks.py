"""Arguments of the public door, checked once. Each message says what came and what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

from lightning_spectral.errors import ConfigurationError

__all__ = ["choice", "choices", "flag", "interval", "linearization_of_weights", "name", "number", "steps"]


def steps(argument: str, value: Any, *, least: int = 1) -> int:
    """Return a number of steps."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{argument}={value!r}: expected an integer of at least {least}")
    return value


def number(argument: str, value: Any, low: float, high: float, *, above: bool = False, below: bool = False) -> float:
    """Return a finite number between two others, which it may equal unless it has to be above or below."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or not math.isfinite(value) or (above and value == low) or (below and value == high):
        floor = f"above {low:g}" if above else f"at least {low:g}"
        ceiling = "" if high == math.inf else f" and below {high:g}" if below else f" and at most {high:g}"
        raise ConfigurationError(f"{argument}={value!r}: expected a number {floor}{ceiling}")
    return float(value)


def flag(argument: str, value: Any) -> bool:
    """Return a truth value."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{argument}={value!r}: expected True or False")
    return value


def choice(argument: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return one of the choices."""
    if not any(value is known or (isinstance(value, str) and value == known) for known in choices):
        raise ConfigurationError(f"{argument}={value!r}: expected {' or '.join(map(repr, choices))}")
    return value


def linearization_of_weights(value: Any, choices: tuple[Any, ...]) -> Any:
    """Return one of the linearizations that need only weights. The message for Jacobians says where they are."""
    if isinstance(value, str) and value == "jacobian":
        expected = " or ".join(map(repr, choices))
        raise ConfigurationError(
            f"linearization={value!r}: expected {expected} here; Jacobians are measured once, on a batch: "
            "measure(model, linearization='jacobian', batch=...)"
        )
    return choice("linearization", value, choices)


def choices(argument: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return some of the choices, each once, in the order of the choices."""
    asked = value if isinstance(value, Collection) and not isinstance(value, str) else [value]
    if wrong := [item for item in asked if item not in known]:
        names = ", ".join(map(repr, known))
        raise ConfigurationError(f"{argument}={value!r}: {wrong[0]!r} is none of {names}; expected a tuple of some")
    return tuple(item for item in known if item in asked)


def interval(argument: str, value: Any) -> tuple[float, float]:
    """Return an interval of ratios, 0 < low < high."""
    try:
        low, high = map(float, value)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not 0 < low < high < math.inf:
        raise ConfigurationError(f"{argument}={value!r}: expected two ratios, 0 < low < high, such as (0.5, 2.0)")
    return low, high


def name(argument: str, value: Any) -> str:
    """Return a name that is safe in keys of loggers and in file names."""
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w.-]*", value, re.ASCII):
        raise ConfigurationError(f"{argument}={value!r}: expected letters, digits, '_', '.' or '-', such as 'spectral'")
    return value

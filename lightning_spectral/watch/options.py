"""How a run is watched: every setting that the shells have in common, checked once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lightning_spectral import _checks
from lightning_spectral.control import GainCeiling, ResidualRescaler
from lightning_spectral.control.law import Law
from lightning_spectral.discovery.asked import check_blocks, check_hints
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.solvers import SolverChoice, solver_named
from lightning_spectral.measuring.signals import SIGNALS
from lightning_spectral.records import ResidualBlock

__all__ = ["AutoRescale", "Look", "OnAlarm", "Options", "Wanted"]

AutoRescale = bool | GainCeiling | ResidualRescaler
OnAlarm = Literal["log", "checkpoint", "stop"]
Look = Literal["tokens", "updates", "logits"]
"""What can be looked at in a batch: tokens and samples, updates of the branches, attention logits."""
Wanted = Sequence[ResidualBlock] | Mapping[str, Any] | None
"""Blocks, hints for finding them, or nothing."""


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of a watched run. :class:`SpectralMonitor` says what each of them means.

    Raises:
        ConfigurationError: One of them cannot be used.
    """

    every_n_steps: int = 50
    auto_rescale: AutoRescale = False
    linearization: Literal["circuit", "paper"] = "circuit"
    safe_zone: tuple[float, float] = (0.5, 2.0)
    blocks: Wanted = None
    solver: SolverChoice = None
    geometry: bool | Collection[str] = True
    signals: Collection[str] = ()
    per_layer: bool = False
    on_alarm: OnAlarm | Callable[..., object] = "log"
    on_error: Literal["warn", "raise"] = "warn"
    prefix: str = "spectral"
    verbose: bool = False

    def __post_init__(self) -> None:
        solver_named(self.solver)
        if isinstance(self.blocks, Mapping):
            check_hints(self.blocks)
        else:
            check_blocks(self.blocks, "blocks=find_blocks(model), or hints as a dict")
        checked = {
            "every_n_steps": _checks.steps("every_n_steps", self.every_n_steps),
            "linearization": _checks.linearization_of_weights(self.linearization, ("circuit", "paper")),
            "safe_zone": _checks.interval("safe_zone", self.safe_zone),
            "signals": _checks.choices("signals", self.signals, SIGNALS),
            "per_layer": _checks.flag("per_layer", self.per_layer),
            "on_error": _checks.choice("on_error", self.on_error, ("warn", "raise")),
            "prefix": _checks.name("prefix", self.prefix),
        }
        if not callable(self.on_alarm):
            checked["on_alarm"] = _checks.choice("on_alarm", self.on_alarm, get_args(OnAlarm))
        if not isinstance(self.geometry, bool):
            checked["geometry"] = _checks.choices("geometry", self.geometry, get_args(Look))
        checked["verbose"] = _checks.flag("verbose", self.verbose)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.law is not None:
            self.law.check(self.safe_zone)

    def changed(self) -> str:
        """Return the settings that differ from the defaults, and always the interval, as arguments of a call."""
        usual = type(self)()
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        kept = {
            name: value for name, value in values.items() if name == "every_n_steps" or value != getattr(usual, name)
        }
        return ", ".join(f"{name}={_brief(value)}" for name, value in kept.items())

    @property
    def looks(self) -> tuple[str, ...]:
        """What is looked at in a batch, among :data:`Look`."""
        return tuple(self.geometry) if not isinstance(self.geometry, bool) else get_args(Look) if self.geometry else ()

    @property
    def law(self) -> Law | None:
        """The control law, ``None`` in a run that is only watched."""
        if isinstance(self.auto_rescale, GainCeiling | ResidualRescaler):
            return self.auto_rescale
        if not isinstance(self.auto_rescale, bool):
            raise ConfigurationError(
                f"auto_rescale={self.auto_rescale!r}: expected True, False, a GainCeiling(...) or a "
                "ResidualRescaler(...)"
            )
        return GainCeiling() if self.auto_rescale else None


def _brief(value: object) -> str:
    return (
        f"<{len(value)} blocks>"
        if isinstance(value, Sequence) and value and isinstance(value[0], ResidualBlock)
        else repr(value)
    )

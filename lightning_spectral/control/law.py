"""The interface of a control law: a pure function from readings and plain state to changes of residual scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Action", "Law", "Reading", "State"]

State = Mapping[str, Any]  # memory of a law for one block: plain values, empty at first


@dataclass(frozen=True, slots=True)
class Reading:
    """The input of a law for one block.

    Attributes:
        log_ratio: ln ρ, measured with the residual scales; ``None`` if it could not be measured.
        mlp: Logarithm of the residual scale of the MLP branch, ``None`` if there is no scale to move.
        attention: The same for the attention branch.
        tokens_fall: Whether the token residual behind the block falls over training.
        mlp_norm: Spectral norm of the MLP branch, with its scale; ``None`` if there is no MLP or no measurement.
        attention_norm: The same for the attention branch.
        kinds: Number of kinds of branches in the block. Each kind adds the sum of its branches to the stream.
        trained: Whether the weights were trained before the run.
    """

    log_ratio: float | None
    mlp: float | None
    attention: float | None
    tokens_fall: bool = False
    mlp_norm: float | None = None
    attention_norm: float | None = None
    kinds: int = 2
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Action:
    """One decision about one block.

    Attributes:
        block: Position of the block in the measurement.
        mlp: Change of the logarithm of the MLP branch's scale.
        attention: The same for the attention branch.
        reason: The reason, in one clause.
        log_ratio: The smoothed ln ρ before the action; ``None`` for a law that does not smooth.
        begins: Whether steering of the block begins with this action.
        held: Whether a bound or a floor cut this step short, and did not cut the step before.
        refused: Whether the guard refused to raise the attention in this step, and did not in the step before.
    """

    block: int
    mlp: float
    attention: float
    reason: str
    log_ratio: float | None = None
    begins: bool = False
    held: bool = False
    refused: bool = False

    @property
    def moves(self) -> bool:
        """Whether the action changes a scale. An action without a change reports a bound or the guard."""
        return self.mlp != 0.0 or self.attention != 0.0


class Law(Protocol):
    """Frozen settings of a control law."""

    @property
    def learnable(self) -> bool:
        """Whether the optimizer trains the scales too."""

    @property
    def dry_run(self) -> bool:
        """Whether the law only reports its actions."""

    @property
    def at_once(self) -> bool:
        """Whether the law acts on the measurement before the first step."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""

    def check(self, safe_zone: tuple[float, float]) -> None:
        """Check the settings against the safe zone.

        Raises:
            ConfigurationError: The settings do not fit the safe zone.
        """

    def decide(
        self, safe_zone: tuple[float, float], step: int, readings: Sequence[Reading], states: Sequence[State]
    ) -> tuple[tuple[Action, ...], list[dict[str, Any]]]:
        """Decide what to do after a measurement. Equal numbers give equal decisions.

        Args:
            safe_zone: The interval of ratios that counts as balanced.
            step: Optimizer step of the measurement.
            readings: One per block.
            states: One per block, as the previous call returned them; none at first.

        Returns:
            The actions, in order of the blocks, and the new states.
        """

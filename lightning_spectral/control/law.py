"""What every control law is: a pure function from measurements and plain state to changes of residual scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Action", "Law", "Reading", "State"]

State = Mapping[str, Any]  # what a law remembers of one block: plain values, empty at first


@dataclass(frozen=True, slots=True)
class Reading:
    """What a law sees of one block.

    Attributes:
        log_ratio: ln ρ, measured with the residual scales; ``None`` where it could not be measured.
        mlp: Logarithm of the residual scale of the MLP branch, ``None`` where there is none to move.
        attention: The same for the attention branch.
        tokens_fall: Whether the token residual behind the block falls over training.
        mlp_norm: Spectral norm of the MLP branch, with its scale; ``None`` where there is none or it is not measured.
        attention_norm: The same for the attention branch.
        kinds: How many kinds of branches the block has: each adds to the stream once, by the sum of its branches.
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
        reason: Why, in one clause.
        log_ratio: ln ρ as the law saw it before the action, where it looks at a smoothed one.
        begins: Whether the block was left alone until now.
        held: Whether a bound cut the step short and had not cut the step before: news, as ``begins`` is.
        refused: Whether the guard refused to raise the attention and had not refused it before: news too.
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
        """Whether it changes a scale (an action may also say that a bound holds it)."""
        return self.mlp != 0.0 or self.attention != 0.0


class Law(Protocol):
    """Frozen settings of a control law."""

    @property
    def learnable(self) -> bool:
        """Whether the optimizer trains the scales too."""

    @property
    def dry_run(self) -> bool:
        """Whether the law only says what it would do."""

    @property
    def at_once(self) -> bool:
        """Whether the law acts on the measurement before the first step."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""

    def check(self, safe_zone: tuple[float, float]) -> None:
        """Check the settings against the safe zone.

        Raises:
            ConfigurationError: They do not go together.
        """

    def decide(
        self, safe_zone: tuple[float, float], step: int, readings: Sequence[Reading], states: Sequence[State]
    ) -> tuple[tuple[Action, ...], list[dict[str, Any]]]:
        """Decide what to do after a measurement; equal numbers give equal decisions.

        Args:
            safe_zone: The interval of ratios that counts as balanced.
            step: Optimizer step of the measurement.
            readings: One per block.
            states: One per block, as the previous call returned them; none at first.

        Returns:
            The actions, in order of the blocks, and the new states.
        """

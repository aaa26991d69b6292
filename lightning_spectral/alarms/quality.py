"""How often each rule was right in the benchmark: figures of `benchmarks/collapses.py`, on seeds and cases held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["QUALITY", "Quality", "sureness"]


@dataclass(frozen=True, slots=True)
class Quality:
    """What came of a rule in the benchmark.

    Attributes:
        told: Runs with its event, among those that failed in its way; for a failure also with that of a rule that says
            more. A warning has to come by itself.
        failing: Such runs.
        false: Healthy runs with its event.
        healthy: Healthy runs.
    """

    told: int
    failing: int
    false: int
    healthy: int


QUALITY: Mapping[str, Quality] = {
    "not_finite": Quality(9, 9, 0, 119),
    "tokens_collapsed": Quality(60, 63, 0, 119),
    "samples_collapsed": Quality(64, 70, 0, 119),
    "nothing_moves": Quality(3, 3, 0, 119),
    "logits_exploding": Quality(18, 18, 0, 119),
    "tokens_collapsing": Quality(1, 63, 0, 119),
}


def sureness(name: str) -> str:
    """Return a sentence on how often a rule was right, empty for a rule without figures."""
    quality = QUALITY.get(name)
    if quality is None:
        return ""
    return (
        f"How sure: {quality.false} of {quality.healthy} healthy runs of the benchmark got this message, and "
        f"{quality.told} of {quality.failing} such failures did. "
    )

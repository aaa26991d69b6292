"""A register of small trainings that fail, each beside a healthy twin that differs by one switch.

Each case rebuilds a kind of public report on text of the standard library or on made-up data, in seconds on one
thread. The register knows nothing of how a failure could be noticed. `failures_check.py` shows what happens in each.
"""

from __future__ import annotations

from . import language, pairs, pretrained, sequences, vision
from .register import Case, Training

CASES: tuple[Case, ...] = tuple(
    value
    for module in (language, sequences, vision, pairs, pretrained)
    for value in vars(module).values()
    if isinstance(value, Case)
)

__all__ = ["CASES", "Case", "Training"]

"""What a configuration names, which has to be importable."""

from __future__ import annotations

from typing import Any

HEARD: list[tuple[int, str]] = []


def answer(trainer: Any, pl_module: Any, event: Any) -> None:
    """What a configuration names as the answer to an alarm."""
    HEARD.append((trainer.global_step, event.level))

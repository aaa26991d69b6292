"""Errors that nobody foresaw while a pass is read. Each costs one branch, and its message becomes the reason."""

from __future__ import annotations

__all__ = ["SURPRISES", "surprise"]

# Every error that an unknown program can cause. Errors of the machine, such as too little memory, are not caught.
SURPRISES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def surprise(what: str, error: Exception) -> str:
    """Return the reason that a user reads.

    Args:
        what: What could not be done, such as ``"its product could not be read"``.
        error: Why.
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{what}: {type(error).__name__}: {lines[0][:200]}"

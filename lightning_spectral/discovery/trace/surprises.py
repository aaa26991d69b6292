"""What goes wrong in reading a forward pass that nobody foresaw: it costs one branch, and becomes its reason."""

from __future__ import annotations

__all__ = ["SURPRISES", "surprise"]

# Every error that an operation in an unknown place can lead to; not those of the machine, such as too little memory.
SURPRISES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def surprise(what: str, error: Exception) -> str:
    """Return the reason that a user reads.

    Args:
        what: What could not be done, such as ``"its product could not be read"``.
        error: Why.
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{what}: {type(error).__name__}: {lines[0][:200]}"

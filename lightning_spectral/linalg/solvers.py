"""Choose a solver by an object or by a word."""

from __future__ import annotations

from typing import Any, Literal

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg.norms.exact import ExactSVD
from lightning_spectral.linalg.norms.randomized import RandomizedSVD
from lightning_spectral.linalg.norms.solution import Solver

__all__ = ["SolverChoice", "solver_named"]

SolverChoice = Solver | Literal["randomized", "exact"] | None
"""A solver, or its name; ``None`` for the default."""


def solver_named(solver: Any, default: Solver | None = None) -> Solver:
    """Return the chosen solver.

    Args:
        solver: A solver, ``"randomized"``, ``"exact"`` or ``None``.
        default: The solver for ``None``; a :class:`RandomizedSVD` by default.

    Raises:
        ConfigurationError: ``solver`` is no solver and no such word.
    """
    if solver is None:
        return default or RandomizedSVD()
    if isinstance(solver, str):
        named: dict[str, Solver] = {"randomized": RandomizedSVD(), "exact": ExactSVD()}
        if solver in named:
            return named[solver]
    elif not isinstance(solver, type) and hasattr(solver, "init") and hasattr(solver, "compute"):
        return solver  # type: ignore[no-any-return]
    came = f"{solver.__name__}, a class ({solver.__name__}() makes one)" if isinstance(solver, type) else repr(solver)
    raise ConfigurationError(f"solver={came}: expected 'randomized', 'exact', RandomizedSVD(...) or ExactSVD(...)")

"""Threads of the CPU: the many small steps of a solver run in one, large products in all that the process may use.

Each parallel step ends when its last thread has finished. On a machine that does other work, a thread may have to wait
for a core, for milliseconds, and a solver has hundreds of steps of microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["all_threads", "one_thread"]

# The number of threads outside of `one_thread`, 0 outside of it.
_allowed: ContextVar[int] = ContextVar("_allowed", default=0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread inside; :func:`all_threads` allows again as many as there were before."""
    before = torch.get_num_threads()
    token = _allowed.set(before)
    try:
        _set(1)
        yield
    finally:
        _set(before)
        _allowed.reset(token)


@contextmanager
def all_threads() -> Iterator[None]:
    """Compute in as many threads as outside of :func:`one_thread`."""
    before = torch.get_num_threads()
    try:
        _set(_allowed.get() or before)
        yield
    finally:
        _set(before)


def _set(count: int) -> None:
    if count != torch.get_num_threads():
        torch.set_num_threads(count)

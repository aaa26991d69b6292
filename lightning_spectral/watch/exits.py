"""What is done when a process ends, by itself or by SIGTERM, which a scheduler sends before it takes a machine back."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["at_exit", "not_at_exit"]

_actions: list[Callable[[], object]] = []
_process: int | None = None  # a process that was forked has the handler too, and nothing to end


def at_exit(action: Callable[[], object]) -> None:
    """Have something done when the process ends.

    SIGTERM is listened to only where nothing else does, and where Python allows it: in the main thread. The process
    then ends by that signal, as it would have.
    """
    global _process
    atexit.register(action)
    _actions.append(action)
    _process = os.getpid()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)


def not_at_exit(action: Callable[[], object]) -> None:
    """Undo :func:`at_exit`; nothing happens where it was not called."""
    atexit.unregister(action)
    if action in _actions:
        _actions.remove(action)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not _actions and in_main_thread and signal.getsignal(signal.SIGTERM) is _terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminated(number: int, frame: FrameType | None) -> None:
    try:
        if os.getpid() == _process:
            for action in [*_actions]:
                action()
    finally:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

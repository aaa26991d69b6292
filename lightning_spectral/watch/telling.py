"""What is said on the console: by the first process, past closed streams, muted like any other log."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress

from torch import distributed

from lightning_spectral.records.text import writable

__all__ = ["inform", "is_first_process", "speak_like", "warn", "warn_here"]

LOG = logging.getLogger("lightning_spectral")
# Launchers start processes under these numbers before the processes know of each other.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


class _Console(logging.Handler):
    """Writes to standard error where no logger above has a handler: else nobody would hear of what is no warning."""

    def emit(self, record: logging.LogRecord) -> None:
        if LOG.parent is None or not LOG.parent.hasHandlers():
            sys.stderr.write(writable(self.format(record), sys.stderr) + "\n")


LOG.addHandler(_Console())
if LOG.level == logging.NOTSET:
    LOG.setLevel(logging.INFO)


def speak_like(name: str) -> None:
    """Have messages stand where those of another package do. Its level counts too, unless a user has set ours."""
    LOG.parent = logging.getLogger(name)
    if LOG.level == logging.INFO:
        LOG.setLevel(logging.NOTSET)


def inform(message: str, level: int = logging.INFO) -> None:
    """Say something, in the first process."""
    if is_first_process():
        with suppress(Exception):  # of a closed stream
            LOG.log(level, message)


def warn(message: str) -> None:
    """Warn of something, in the first process.

    Raises:
        UserWarning: Warnings are errors in this run.
    """
    if is_first_process():
        warn_here(message)


def warn_here(message: str) -> None:
    """Warn of something, in this process.

    Raises:
        UserWarning: Warnings are errors in this run.
    """
    if LOG.level > logging.WARNING:  # of its own: many set Lightning's to ERROR, to be spared its information
        return
    try:
        if not _all_are_ignored():
            warnings.warn(message, stacklevel=4)
        elif LOG.manager.disable < logging.WARNING:
            LOG.handle(LOG.makeRecord(LOG.name, logging.WARNING, __file__, 0, message, (), None))
    except Warning:
        raise
    except Exception:  # a closed stream: nobody reads it
        return


def _all_are_ignored() -> bool:
    """Whether the program ignores every warning, as many do for the sake of other libraries.

    A filter that names a text or a module is somebody's decision about these warnings, and is obeyed.
    """
    for action, text, category, module, _ in warnings.filters:
        if issubclass(UserWarning, category):
            return action == "ignore" and text is None and module is None
    return False

"""What is said on the console: by the first process, past closed streams, muted like any other log."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import suppress

from torch import distributed

__all__ = ["inform", "is_first_process", "warn", "warn_here"]

LOG = logging.getLogger("lightning_spectral")
# Launchers start processes under these numbers before the processes know of each other.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def inform(message: str) -> None:
    """Say something, in the first process."""
    if is_first_process():
        with suppress(Exception):  # of a closed stream
            LOG.info(message)


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
        warnings.warn(message, stacklevel=4)
    except Warning:
        raise
    except Exception:  # a closed stream: nobody reads it
        return

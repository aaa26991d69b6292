"""Keep the global random streams of Python, of numpy, and of torch on every device."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["random_streams_kept"]


@contextmanager
def random_streams_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put the global random streams back at the end.

    Args:
        devices: The devices, beside the CPU, on which numbers may be drawn.
    """
    python, of_numpy, cpu = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    others = []
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            place = () if device.type == "mps" else (device,)  # there is a single MPS device
            others.append((module, place, module.get_rng_state(*place)))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(cpu)
        for module, place, state in others:
            module.set_rng_state(state, *place)

"""The arithmetic of a solver, whatever the training has allowed itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_spectral.linalg.threads import one_thread

__all__ = ["full_precision", "own_arithmetic"]


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute without a graph, without autocast, in full precision, and small steps in one thread."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision(), one_thread():
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 in float32: neither TF32 on CUDA nor bfloat16 in oneDNN.

    ``torch.set_float32_matmul_precision("medium")`` allows both, to speed training up. Their rounding errors, 5e-4 and
    4e-3, are as large as what a warm start has to resolve. The settings are those of the process, and put back.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    reduced = [(item, item.fp32_precision) for item in settings if item.fp32_precision not in ("ieee", "none")]
    try:
        for item, _ in reduced:
            item.fp32_precision = "ieee"
        yield
    finally:
        for item, precision in reduced:
            item.fp32_precision = precision

"""Computations on a device that ask for numbers on the host, and one transfer for all that wait at the same time.

On an accelerator each transfer waits until everything before it has been computed. A solver that decides after every
product, for every batch of operators, would wait most of the time. So a computation is a generator: it launches what it
can, yields the tensors that its next decision needs, and is sent their copies::

    batch 0:  products, products ─┐                       ┌─ done
    batch 1:  products, products ─┼── one transfer ───────┼─ products ─┬── one transfer ── done
    batch 2:  products, products ─┘                       └─ products ─┘
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Asking", "answered", "sent"]

T = TypeVar("T")

Asking = Generator[Sequence[Tensor], list[Tensor], T]
"""Yields tensors, is sent their copies in float64 on the CPU, and returns a result."""


def answered(computations: Sequence[Asking[T]]) -> list[T]:
    """Run computations side by side and return their results.

    Each runs ahead until it asks; then one transfer per device answers all of them.
    """
    results: dict[int, T] = {}
    waiting: dict[int, Sequence[Tensor]] = {}

    def go_on(i: int, answer: list[Tensor] | None) -> None:
        try:
            waiting[i] = next(computations[i]) if answer is None else computations[i].send(answer)
        except StopIteration as stop:
            results[i] = stop.value

    for i in range(len(computations)):
        go_on(i, None)
    while waiting:
        asked = dict(waiting)
        waiting.clear()
        copies = iter(_on_host([tensor for tensors in asked.values() for tensor in tensors]))
        for i, tensors in asked.items():
            go_on(i, [next(copies) for _ in tensors])
    return [results[i] for i in range(len(computations))]


def sent(numbers: Tensor, like: Tensor) -> Tensor:
    """Copy a tensor from the CPU to the device and dtype of another one, without waiting for the device."""
    # From ordinary memory, CUDA takes its own copy before it returns: the source may be freed at once.
    return numbers.to(like, non_blocking=True)


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the CPU in float64, with one transfer per device."""
    copies = [tensor.double() if tensor.device.type == "cpu" else tensor for tensor in tensors]
    for device in {tensor.device for tensor in copies if tensor.device.type != "cpu"}:
        members = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        together = torch.cat([tensors[i].flatten() for i in members]).cpu().double()
        parts = torch.split(together, [tensors[i].numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            copies[i] = part.view(tensors[i].shape)
    return copies

"""The content of a symbolic pass, computed when a probe asks for it.

A symbolic pass has computed nothing. What a probe asks for is computed backwards on the tape::

    input, constant, buffer      its true content
    parameter                    made up, of its true shape
    value of the stream          noise: no block needs the blocks before it
    any other value              its operation is run, in float64, on the content of its inputs
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_spectral.discovery.trace.noise import made_up, noise
from lightning_spectral.discovery.trace.operations import addends, base_name, is_product, is_zero_allocation
from lightning_spectral.discovery.trace.replay import execute
from lightning_spectral.discovery.trace.tape import Operation, Tape, wide_copy

__all__ = ["Contents"]

_SEED = 1000  # the seeds of probes are smaller: their noise never equals the content that they hold fixed


class Contents:
    """Computes the content of the values of a tape, each once.

    Args:
        tape: The tape of a symbolic pass.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._made: dict[int, Tensor] = {}

    def __call__(self, value: int) -> Tensor:
        """Return the content of a value in float64, or in its own dtype if it is not floating point; on the CPU."""
        with torch.no_grad():
            for item in sorted(self._needed(value)):
                if item not in self._made:
                    self._make(item)
        return self._made[value]

    def _needed(self, value: int) -> set[int]:
        """Return the values without content that have to be made for a value, itself included."""
        seen, queue = set[int](), [value]
        while queue:
            item = queue.pop()
            if item in seen or item in self._made:
                continue
            seen.add(item)
            operation = self._tape.producer(item)
            if operation is not None and not self._is_noise(item, operation):
                queue += operation.inputs
        return seen

    def _make(self, value: int) -> None:
        tape = self._tape
        like, operation = tape.tensors[value], tape.producer(value)
        if operation is None:
            unknown = tape.made_up >> value & 1
            self._made[value] = made_up(like, _SEED + value) if unknown else wide_copy(like)
        elif self._is_noise(value, operation):
            self._made[value] = noise(like, _SEED + value)
        else:
            for output, content in zip(operation.outputs, self._run(operation), strict=True):
                if content is not None and output not in self._made:
                    self._made[output] = content
            if value not in self._made:  # a result that the replay has not computed
                self._made[value] = noise(like, _SEED + value)

    def _run(self, operation: Operation) -> list[Tensor | None]:
        if is_zero_allocation(operation) or operation.name == "empty_strided":
            # Memory that nobody has written to may hold NaN.
            likes = [self._tape.tensors[output] for output in operation.outputs]
            return [torch.zeros_like(like, dtype=_wide_dtype(like), device="cpu") for like in likes]
        return list(execute(self._tape, operation, self._made.__getitem__))

    def _is_noise(self, value: int, operation: Operation) -> bool:
        """Whether noise stands for a value: of a table of embeddings, or of the stream."""
        tape = self._tape
        if not tape.tensors[value].is_floating_point() or not tape.ancestors[value] & tape.made_up:
            return False
        if base_name(operation) == "embedding":
            return True
        terms = sorted(addends(tape, operation)) if tape.is_data(value) else []
        return any(self._is_branch(earlier, later) for earlier, later in itertools.pairwise(terms))

    def _is_branch(self, stream: int, end: int) -> bool:
        """Whether a value is made of another one by products with weights. h + sin(h)² is no stream, but a function."""
        producers = map(self._tape.producer, self._tape.between(stream, end)[1:])
        return any(operation is not None and is_product(self._tape, operation) for operation in producers)


def _wide_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.is_floating_point() else like.dtype

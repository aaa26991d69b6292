"""Recognize two parts of a tape as one program: the same function of the stream, up to the values of the weights.

A model of 80 equal layers then costs one probe per question, and not 80.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.discovery.trace.operations import is_allocation, moved_input
from lightning_spectral.discovery.trace.tape import Ref, Tape

__all__ = ["program_hash"]


def program_hash(tape: Tape, values: Sequence[int]) -> int:
    """Return a hash that is equal for parts of a tape that run the same program.

    The content of parameters and of data is ignored. Everything else counts: operations, wiring, every argument,
    shapes, strides, dtypes, how weights are made of parameters, which parameters are shared, and the content of
    constants. Constants count because two layers may differ in a permutation only.

    Args:
        tape: The recorded forward pass.
        values: The values of the part. The first is its input; every other value depends on it.
    """
    return hash(_Reader(tape, values).lines())


class _Reader:
    """Describes a part of a tape in hashable terms. Values inside are named by their place, not by their number."""

    def __init__(self, tape: Tape, values: Sequence[int]) -> None:
        self.tape, self.values = tape, values
        self._names: dict[int, Hashable] = {value: ("inside", place) for place, value in enumerate(values)}
        self._opaque = 0

    def lines(self) -> tuple[Hashable, ...]:
        """Return one line for the input and one for each further value."""
        return (self._kind(self.values[0]), *(self._made(value) for value in self.values[1:]))

    def _made(self, value: int) -> Hashable:
        """Describe the operation that made a value."""
        operation = self.tape.producer(value)
        assert operation is not None
        # A refreshed view has no recorded arguments: its inputs describe it.
        arguments = self._argument(operation.args), self._argument(operation.kwargs)
        sources = () if operation.function is not None else tuple(self._name(item) for item in operation.inputs)
        return operation.name, operation.outputs.index(value), arguments, sources, self._kind(value)

    def _kind(self, value: int) -> Hashable:
        place = self.tape.places[value]
        return place.shape, place.strides, place.dtype

    def _argument(self, item: Any) -> Hashable:
        """Describe an argument. Its type is part of it, because 1, 1.0 and True hash alike."""
        if isinstance(item, Ref):
            return self._name(item.value)
        if isinstance(item, list | tuple):
            return tuple(map(self._argument, item))
        if isinstance(item, dict):
            return tuple((key, self._argument(value)) for key, value in sorted(item.items()))
        if item is None or isinstance(item, bool | int | float | complex | str | torch.dtype | torch.device):
            return type(item).__name__, item
        return type(item).__name__, str(item)

    def _name(self, value: int) -> Hashable:
        """Return the description of a value that an operation reads, the same each time."""
        if value not in self._names:
            self._names[value] = self._outside(value)
        return self._names[value]

    def _outside(self, value: int) -> Hashable:
        """Describe a value that does not depend on the input of the part."""
        tape = self.tape
        like = tape.tensors[value]
        if self._is_allocated(value):
            return self._made(value)  # its numbers are what the operation says, and may be as many as the data
        if not (like.is_floating_point() or like.is_complex()):
            return "numbers", self._kind(value), _content(tape.content(value))
        if tape.is_data(value) or value in tape.names:
            self._opaque += 1  # numbered: two readings of one parameter differ from readings of two parameters
            return "data" if tape.is_data(value) else "parameter", self._opaque, self._kind(value)
        if not tape.made_of_parameters(value):
            return "numbers", self._kind(value), _content(tape.content(value))
        # A weight that is made of parameters. The way is short (views, slices, parametrizations): recursion is safe.
        return self._made(value)

    def _is_allocated(self, value: int) -> bool:
        """Whether a value is memory that an operation has filled with one number or not at all, or a part of it."""
        while (operation := self.tape.producer(value)) is not None:
            if is_allocation(operation):
                return True
            moved = moved_input(operation)
            if moved is None:
                return False
            value = moved
        return False


def _content(tensor: Tensor) -> int:
    """Return a hash of the bytes of a tensor."""
    # clone, not contiguous(): a tensor of one entry counts as contiguous with any strides, and odd strides forbid
    # the view as bytes.
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return hash(tensor.view(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else 0

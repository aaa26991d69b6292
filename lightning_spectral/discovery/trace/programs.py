"""When two parts of a tape are one program: the same function of the stream, whatever their weights are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.discovery.trace.tape import Ref, Tape

__all__ = ["program_hash"]


def program_hash(tape: Tape, values: Sequence[int]) -> int:
    """Return a hash that is equal for parts of a tape that run the same program.

    What may differ is what a measurement reads anew: the content of parameters and of data. Everything else counts:
    operations, wiring, every argument, shapes, dtypes, how weights are made of parameters, which parameters are one,
    and the content of constants: two layers may differ in nothing but a permutation.

    Args:
        tape: The recorded forward pass.
        values: The part: the first is what it reads, and each further one depends on it.
    """
    return hash(_Reader(tape, values).lines())


class _Reader:
    def __init__(self, tape: Tape, values: Sequence[int]) -> None:
        self.tape, self.values = tape, values
        self._names: dict[int, Hashable] = {value: ("inside", place) for place, value in enumerate(values)}
        self._opaque = 0

    def lines(self) -> tuple[Hashable, ...]:
        return (self._kind(self.values[0]), *(self._made(value) for value in self.values[1:]))

    def _made(self, value: int) -> Hashable:
        """Describe how a value was made."""
        operation = self.tape.producer(value)
        assert operation is not None
        arguments = self._argument(operation.args), self._argument(operation.kwargs)
        sources = () if operation.function is not None else tuple(self._name(item) for item in operation.inputs)
        return operation.name, operation.outputs.index(value), arguments, sources, self._kind(value)

    def _kind(self, value: int) -> Hashable:
        place = self.tape.places[value]
        return place.shape, place.strides, place.dtype

    def _argument(self, item: Any) -> Hashable:
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
        """Describe a value that is read."""
        if value not in self._names:
            self._names[value] = self._outside(value)
        return self._names[value]

    def _outside(self, value: int) -> Hashable:
        tape = self.tape
        content = tape.tensors[value]
        if not (content.is_floating_point() or content.is_complex()):
            return "numbers", self._kind(value), _content(content)
        if tape.is_data(value) or value in tape.names:
            self._opaque += 1  # numbered, because it matters whether two of them are one
            return "data" if tape.is_data(value) else "parameter", self._opaque, self._kind(value)
        if not tape.made_of_parameters(value):
            return "numbers", self._kind(value), _content(content)
        # Ways from parameters to weights are short: views, slices, a parametrization.
        return self._made(value)


def _content(tensor: Tensor) -> int:
    # A tensor of one entry counts as contiguous whatever its strides are, and could not be read as bytes.
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return hash(tensor.view(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else 0

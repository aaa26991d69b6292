"""One forward pass as a graph of values, in static single assignment.

An operation never changes a value; it makes new ones. In-place operations and views are brought to that form while they
are recorded. So the graph says which value depends on which, and any slice of the graph can be run again.

    code                            tape
    h = x.view(6, 4)                v1 = view(v0)
    h.add_(1)                       v2 = add_(v1)            h is now v2
    y = x.sum()                     v3 = refresh(v0, v2)     x after the write to its storage
                                    v4 = sum(v3)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Call", "Operation", "Place", "Ref", "Tape", "bits", "probe_device", "probe_dtype", "wide_copy"]


class Ref(NamedTuple):
    """A value in the recorded arguments of an operation, in the place of its tensor."""

    value: int


class Place(NamedTuple):
    """Where a tensor lies in memory. Two tensors with one place, and no write between them, are one value."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The offset behind the last entry."""
        if 0 in self.shape:
            return self.offset
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + 1 + sum((size - 1) * stride for size, stride in steps)

    def covers(self, other: Place) -> bool:
        """Whether a write to this place overwrites all of another place in the same storage."""
        if self == other:
            return True
        dense = self.end - self.offset == math.prod(self.shape)
        return dense and self.dtype == other.dtype and self.offset <= other.offset and other.end <= self.end


@dataclass(slots=True)
class Operation:
    """One recorded operation; ``function`` is ``None`` for a view that was refreshed after a write to its storage."""

    index: int
    name: str
    function: Callable[..., Any] | None
    args: Any
    kwargs: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    call: int = -1


@dataclass(slots=True)
class Call:
    """One call of one module.

    Attributes:
        index: Number of the call.
        path: Path of the module.
        parent: Number of the call around it, −1 for none.
        inputs: The values among the arguments.
        outputs: The returned values, each with its index, key or field in the returned structure; ``None`` for a
            tensor that was returned by itself.
    """

    index: int
    path: str
    parent: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[tuple[int | str | None, int], ...] = ()


class Tape:
    """The recorded graph.

    Values are numbered in the order of their creation. ``tensors[v]`` is the recorded content, ``producers[v]`` the
    index of the operation that made it (−1 for inputs, parameters and constants), ``names[v]`` the attribute path of a
    parameter or buffer, ``attributes[path]`` the value of a weight that a module computes anew for every pass.
    On the tape of a symbolic pass, ``tensors[v]`` has a shape and strides and no content, ``made_up`` is the bit set of
    the inputs and parameters whose content is made up, and ``contents(v)`` computes the content of a value.
    ``ancestors[v]`` is a bit set over values and includes ``v``; ``data`` is the bit set of the values that depend on
    the model's inputs.
    """

    def __init__(self) -> None:
        """Create an empty tape."""
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.tensors: list[Tensor] = []
        self.producers: list[int] = []
        self.places: list[Place] = []
        self.names: dict[int, str] = {}
        self.attributes: dict[str, int] = {}
        self.ancestors: list[int] = []
        self.readers: defaultdict[int, list[int]] = defaultdict(list)
        self.data = 0
        self.parameters = 0
        self.made_up = 0
        self.contents: Callable[[int], Tensor] | None = None
        self.products: dict[int, bool] = {}  # the answers of `is_product` so far, by the index of the operation
        self._returned: dict[int, list[Call]] | None = None
        self._wide: dict[int, Tensor] = {}

    def shape(self, value: int) -> tuple[int, ...]:
        """Return the shape of a value."""
        return self.places[value].shape

    def is_real(self, value: int) -> bool:
        """Whether the value has numbers with a fraction (or complex ones), not integers or truth values."""
        return self.tensors[value].is_floating_point() or self.tensors[value].is_complex()

    def depends(self, value: int, on: int) -> bool:
        """Whether ``value`` is ``on`` or was computed from it."""
        return bool(self.ancestors[value] >> on & 1)

    def is_data(self, value: int) -> bool:
        """Whether the value depends on the inputs of the model."""
        return bool(self.data >> value & 1)

    def count_as_data(self, value: int) -> None:
        """Count a value, and every value that was computed from it, as data."""
        for other in range(value, len(self.tensors)):
            if self.depends(other, value):
                self.data |= 1 << other
        self.products.clear()  # data can turn an operation into a product

    def producer(self, value: int) -> Operation | None:
        """Return the operation that made a value, ``None`` for inputs, parameters and constants."""
        index = self.producers[value]
        return None if index < 0 else self.operations[index]

    def made_of_parameters(self, value: int) -> bool:
        """Whether the value was computed from parameters or buffers (and perhaps constants), not from the inputs."""
        return bool(self.ancestors[value] & self.parameters) and not self.is_data(value)

    def parents_with_names(self, value: int) -> list[int]:
        """Return the parameters and buffers that a value was computed from."""
        return list(bits(self.ancestors[value] & self.parameters))

    def calls_that_return(self, value: int) -> list[Call]:
        """Return the module calls that returned the value, alone or inside a structure."""
        if self._returned is None:
            self._returned = {}
            for call in self.calls:
                for _, output in call.outputs:
                    self._returned.setdefault(output, []).append(call)
        return self._returned.get(value, [])

    def add_value(self, tensor: Tensor, place: Place, producer: int, parents: Iterable[int]) -> int:
        """Append a value and return its number."""
        value = len(self.tensors)
        self.tensors.append(tensor)
        self.places.append(place)
        self.producers.append(producer)
        mask = 1 << value
        for parent in parents:
            mask |= self.ancestors[parent]
        self.ancestors.append(mask)
        if mask & self.data:
            self.data |= 1 << value
        return value

    def between(self, start: int, end: int) -> list[int]:
        """Return the values on all ways from ``start`` to ``end``, both included, in order."""
        mask = self.ancestors[end] & ~((1 << start) - 1)
        return [value for value in bits(mask) if self.depends(value, start)]

    def wide(self, value: int) -> Tensor:
        """Return the content in float64, in which rounding cannot hide structure.

        The content of a recorded pass is on its device, or on the CPU where that device has no float64. The content of
        a symbolic pass is made when it is asked for, on the CPU.
        """
        if self.contents is not None:
            return self.contents(value)
        if value in self._wide:
            return self._wide[value]
        tensor = self.tensors[value].detach()
        result = wide_copy(tensor)
        if result is not tensor and value not in self.names:  # keeping a copy of every parameter would double the model
            self._wide[value] = result
        return result

    def content(self, value: int) -> Tensor:
        """Return the content of a value as it was recorded, in the dtype of the pass where that is known."""
        return self.tensors[value] if self.contents is None else self.contents(value)

    def filled(self, value: int, number: float = 0.0) -> Tensor:
        """Return a tensor for a value with the same number everywhere, in the layout and the dtype of its content."""
        like = self.tensors[value]
        return torch.full_like(
            like,
            number,
            dtype=probe_dtype(like) if self.is_real(value) else like.dtype,
            device=probe_device(like.device),
            requires_grad=False,
        )


def wide_copy(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype and on the device of probes; the tensor itself where it is there already."""
    floats = tensor.is_floating_point() or tensor.is_complex()
    return tensor.to(probe_device(tensor.device), probe_dtype(tensor) if floats else tensor.dtype)


def probe_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which probes replace a tensor: complex128 or float64."""
    return torch.complex128 if tensor.is_complex() else torch.float64


@cache
def probe_device(device: torch.device) -> torch.device:
    """Return the device on which probes of a pass run: the device of the pass, or the CPU where it has no float64."""
    try:
        float(torch.ones(1, dtype=torch.float64, device=device) + 1)
    except (RuntimeError, TypeError, AssertionError):  # Apple's, many of Intel's; or this machine has no such device
        return torch.device("cpu")
    return device


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low

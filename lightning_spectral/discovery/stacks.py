"""Find the residual adds of models that keep several streams side by side: hyper-connections and their kin.

Such a model reads one stream z = Σᵢ pᵢ Sᵢ out of a stack S of them, and writes what a branch makes of it to all:
S′ⱼ = Σᵢ Rᵢⱼ Sᵢ + qⱼ f(z). The maps p, q and R act on the streams and on no channel. So the branch f is an ordinary one
from z to f(z), and that is what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.discovery.linear import LinearPart
from lightning_spectral.discovery.operands import UnmeasurableError
from lightning_spectral.discovery.operations import (
    Multiplier,
    base_name,
    is_contraction,
    is_product,
    matrix_operands,
    moved_input,
    multiplied_input,
)
from lightning_spectral.discovery.probe import Prober, Region
from lightning_spectral.discovery.replay import replay
from lightning_spectral.discovery.steps import Steps
from lightning_spectral.discovery.tape import Operation, Tape

__all__ = ["Stack", "stack_at"]

_TOLERANCE = 1e-8


@dataclass(frozen=True, slots=True)
class Stack:
    """How a sum writes to a stack of streams.

    Attributes:
        kept: The term that carries the streams on.
        before: The streams as they were.
        read: The one stream that was read from them.
        written: What was made of it and is written to all.
        spine: Every value from the sum down to what is written.
        writers: What multiplies it, the same at every token; ``None`` where that depends on the data.
        count: The number of streams.
    """

    kept: int
    before: int
    read: int
    written: int
    spine: tuple[int, ...]
    writers: tuple[Multiplier, ...] | None
    count: int


def stack_at(tape: Tape, prober: Prober, operation: Operation) -> Stack | None:
    """Return how a sum writes to a stack of streams, ``None`` for any other operation."""
    data = [value for value in operation.inputs if tape.is_data(value)]
    if base_name(operation) != "add" or len(data) != 2:
        return None
    for kept, put in (data, data[::-1]):
        spine = _down_to_one(tape, operation.outputs[0], put)
        before = None if spine is None else _before(tape, kept, spine[-1])
        if spine is None or before is None:
            continue
        read = _read(tape, prober, before, spine[-1])
        if read is not None and _keeps_channels(tape, before, kept, tape.shape(read)[-1]):
            count = tape.tensors[before].numel() // tape.tensors[read].numel()
            return Stack(kept, before, read, spine[-1], spine, _writers(tape, spine), count)
    return None


def _down_to_one(tape: Tape, total: int, put: int) -> tuple[int, ...] | None:
    """Follow what is written to all streams down to the one stream that it was made of."""
    whole, spine = tape.tensors[total].numel(), [total, put]
    while True:
        size = tape.tensors[spine[-1]].numel()
        if 0 < size < whole:
            tokens = math.prod(tape.shape(spine[-1])[1:-1])
            return tuple(spine) if whole % size == 0 and tokens > 1 else None
        producer = tape.producer(spine[-1])
        carrier = None if producer is None else _carrier(tape, producer)
        if carrier is None:
            return None
        spine.append(carrier)


def _carrier(tape: Tape, operation: Operation) -> int | None:
    """Return the operand of a map of streams that holds the channels: the larger one."""
    moved = moved_input(operation)
    if moved is not None:
        return moved if tape.is_data(moved) else None
    multiplied = multiplied_input(tape, operation)
    if multiplied is not None:
        return multiplied[0]
    name = base_name(operation)
    if name not in ("mul", "multiply") and not (is_contraction(operation) and "attention" not in operation.name):
        return None
    operands = [value for value in matrix_operands(operation) if tape.is_data(value)]
    return max(operands, key=lambda value: tape.tensors[value].numel(), default=None)


def _before(tape: Tape, kept: int, written: int) -> int | None:
    """Walk from what is kept of the streams back to the streams that the branch was made of."""
    value, whole = kept, tape.tensors[kept].numel()
    while not tape.depends(written, value):
        producer = tape.producer(value)
        carrier = None if producer is None else _carrier(tape, producer)
        if carrier is None or tape.tensors[carrier].numel() < whole:
            return None
        value = carrier
    return value


def _read(tape: Tape, prober: Prober, before: int, written: int) -> int | None:
    """Return the first value of one stream that all ways from the streams to the branch lead through."""
    size = tape.tensors[written].numel()
    if tape.tensors[before].numel() <= size:
        return None
    region = Region(tape, before, written)
    gateways = [value for value in region.gateways() if tape.tensors[value].numel() == size and value != before]
    if not gateways:
        return None
    read = gateways[0]
    works = any(
        (operation := tape.producer(value)) is not None and is_product(tape, operation)
        for value in tape.between(read, written)[1:]
    )
    reader = Region(tape, before, read)
    return read if works and prober.once(reader, "reads one stream", lambda: _reads(prober, reader)) else None


def _reads(prober: Prober, reader: Region) -> bool:
    """Whether a value is made of a stack of streams channel by channel and token by token."""
    linear = LinearPart(Steps(reader.tape, reader, prober), mixes_tokens=False)
    width = reader.tape.shape(reader.leaf)[-1]
    try:
        return prober.moved_positions(reader) == 0 and _channelwise(
            reader.tape, reader.stream, width, lambda content: linear.run(reader.leaf, {reader.stream: content})
        )
    except (UnmeasurableError, RuntimeError, IndexError):
        return False


def _keeps_channels(tape: Tape, before: int, kept: int, width: int) -> bool:
    """Whether the streams are mixed channel by channel, what mixes them held as it was recorded."""
    if before == kept:
        return True
    held = dict(_beside(tape, before, kept))
    return _channelwise(tape, before, width, lambda content: replay(tape, {before: content}, kept, held=held))


def _beside(tape: Tape, before: int, kept: int) -> Iterator[tuple[int, Tensor]]:
    """Yield what the streams are multiplied by on their way."""
    value: int | None = kept
    while value is not None and value != before:
        operation = tape.producer(value)
        value = None if operation is None else _carrier(tape, operation)
        yield from ((item, tape.wide(item)) for item in (operation.inputs if operation else ()) if item != value)


def _channelwise(tape: Tape, source: int, width: int, run: Callable[[Tensor], Tensor]) -> bool:
    """Whether numbers that multiply each channel make a value of another one, whatever its channels hold."""
    generator = torch.Generator().manual_seed(19)
    like, gains = tape.wide(source), list[Tensor]()
    if like.shape[-1] % width:
        return False
    for _ in range(2):
        u = 1 + torch.rand(width, generator=generator, dtype=torch.float64, device="cpu").to(like)
        result = run(u.repeat(like.shape[-1] // width).expand(like.shape).clone())
        if result.shape[-1] % width:
            return False
        gains.append(result / u.repeat(result.shape[-1] // width))
    largest = gains[0].abs().max()
    return bool(largest > 0) and bool((gains[0] - gains[1]).abs().max() <= _TOLERANCE * largest)


def _writers(tape: Tape, spine: tuple[int, ...]) -> tuple[Multiplier, ...] | None:
    """Return what multiplies a branch on its way to all streams, ``None`` where that depends on the data."""
    found: list[Multiplier] = []
    for value in spine[1:-1]:
        operation = tape.producer(value)
        assert operation is not None
        multiplied = multiplied_input(tape, operation)
        if multiplied is not None:
            found.append(multiplied[1])
        elif moved_input(operation) is None:
            return None
    return tuple(found)

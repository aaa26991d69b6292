"""Walk along a stream: up through norms and constants, and down to what reads it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lightning_spectral.discovery.structure.terms import transparent
from lightning_spectral.discovery.trace.operands import is_statistic, normalized_operand
from lightning_spectral.discovery.trace.operations import (
    addends,
    base_name,
    is_attention,
    is_norm,
    is_product,
    moved_input,
)
from lightning_spectral.discovery.trace.tape import Operation, Tape

__all__ = ["begin_streams", "goes_on", "leads_only_to", "stream_source", "stream_step", "stream_values"]


def begin_streams(tape: Tape) -> None:
    """Count a parameter as data if a stream begins with it: learned queries, latents, a class token.

    A stream begins with a parameter if a value of its shape that was computed from it is added to it. That value is
    data; or attention made it before any data came in, as for the object queries of DETR, whose stream begins at zero.
    """
    for operation in tape.operations:
        if base_name(operation) != "add" or len(operation.inputs) != 2:
            continue
        for begin, other in (operation.inputs, operation.inputs[::-1]):
            size = tape.shape(operation.outputs[0])
            if tape.is_data(begin) or not tape.depends(other, begin) or tape.shape(begin) != size:
                continue
            learned = tape.made_of_parameters(begin) if tape.is_data(other) else _attends(tape, begin, other)
            if learned and not _is_stream(tape, other):
                tape.count_as_data(begin)


def _is_stream(tape: Tape, value: int) -> bool:
    """Whether a value is a residual sum, up to norms. A parameter that is added to it is a position code."""
    sums = (operation for item in stream_values(tape, value) if (operation := tape.producer(item)) is not None)
    return any(
        base_name(operation) == "add" and tape.depends(one, other) and tape.shape(one) == tape.shape(other)
        for operation in sums
        for one, other in itertools.permutations(operation.inputs, 2)
    )


def _attends(tape: Tape, start: int, end: int) -> bool:
    """Whether attention leads from a parameter to a value, without data."""
    operations = (tape.producer(value) for value in tape.between(start, end))
    return tape.made_of_parameters(end) and any(item is not None and is_attention(item) for item in operations)


def goes_on(tape: Tape, value: int) -> bool:
    """Whether a norm, a product, another sum or the caller reads a sum, as they read a stream.

    Inside of a recurrent cell, only gates and activations read a sum.
    """
    queue = [value]
    while queue:
        value = queue.pop()
        if not tape.readers[value] and tape.calls_that_return(value):
            return True
        for reader in tape.readers[value]:
            operation = tape.operations[reader]
            if is_norm(operation) or is_product(tape, operation) or len(addends(tape, operation)) > 1:
                return True
            if normalized_operand(tape, operation) == value:
                return True
            if stream_step(tape, operation) == value or moved_input(operation) == value:
                queue += operation.outputs
    return False


def leads_only_to(tape: Tape, value: int, output: int) -> bool:
    """Whether every use of a value ends in ``output``. Unused views do not count."""
    seen, queue = {value}, [value]
    while queue:
        for reader in set(tape.readers[queue.pop()]):
            operation = tape.operations[reader]
            outputs = [item for item in operation.outputs if item != output and item not in seen]
            leads = any(tape.depends(output, item) for item in operation.outputs)
            if not leads and moved_input(operation) is None:
                return False
            seen.update(outputs)
            queue += outputs
    return True


def stream_source(tape: Tape, value: int, outputs: set[int]) -> int | None:
    """Return the first of the given sums on the way from a value up its stream, through norms and constants."""
    return next((item for item in stream_values(tape, value) if item in outputs), None)


def stream_values(tape: Tape, value: int) -> Iterator[int]:
    """Yield a value and the values up its stream, through norms and constants, the nearest first."""
    source: int | None = value
    while source is not None:
        yield source
        producer = tape.producer(source)
        source = None if producer is None else stream_step(tape, producer)


def stream_step(tape: Tape, operation: Operation) -> int | None:
    """Return the value that an operation passes on as a stream: moved, multiplied by constants, or normalized."""
    step = transparent(tape, operation)
    if step is not None:
        return step[0]
    if is_norm(operation):
        return operation.inputs[0]
    if base_name(operation) == "sub" and len(operation.inputs) == 2:  # x − mean(x)
        value, mean = operation.inputs
        return value if tape.depends(mean, value) and is_statistic(tape, mean, value) else None
    return normalized_operand(tape, operation)

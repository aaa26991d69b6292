"""Which operand of an operation carries the values. The other operand is an attention pattern or a statistic."""

from __future__ import annotations

from lightning_spectral.discovery.trace.operations import (
    base_name,
    is_attention,
    is_broadcast,
    is_contraction,
    is_fused_attention,
    is_norm,
    is_product,
    is_softmax,
    matrix_operands,
    norm_channels_second,
    refs,
)
from lightning_spectral.discovery.trace.tape import Operation, Tape

__all__ = [
    "UnmeasurableError",
    "before_broadcast",
    "is_statistic",
    "norm_channel",
    "normalized_operand",
    "value_operand",
]


class UnmeasurableError(Exception):
    """The branch has no weight linearization; the message is the reason that the user sees."""


def normalized_operand(tape: Tape, operation: Operation) -> int | None:
    """Return the value that a norm written out in elementary operations normalizes; ``None`` for other operations.

    Such a norm multiplies a value x by a statistic of x, or x − mean(x) by a statistic of x::

        x ──────────────────────────┐
        └─ pow ─ mean ─ rsqrt ────── mul ── x / rms(x)
    """
    if base_name(operation) not in ("mul", "div") or len(operation.inputs) != 2:
        return None
    if not tape.is_data(operation.outputs[0]):
        return None  # a weight that is divided by its own norm is still a weight
    first, second = operation.inputs
    for value, statistic in ((first, second), (second, first)):
        statistic = before_broadcast(tape, statistic)
        if not is_statistic(tape, statistic, value):
            continue
        for base in (value, _centred(tape, value)):
            if tape.depends(statistic, base):
                inside = tape.between(base, statistic)[1:]
                return None if any(_is_weighted(tape, item) for item in inside) else base
    return None


def before_broadcast(tape: Tape, statistic: int) -> int:
    """Return a statistic as it was before it was broadcast to the shape of the value that it multiplies."""
    source = tape.producer(statistic)
    while source is not None and (is_broadcast(source) or source.name == "view"):
        statistic = source.inputs[0]
        source = tape.producer(statistic)
    return statistic


def is_statistic(tape: Tape, statistic: int, value: int) -> bool:
    """Whether one value has a single entry for all channels of another value."""
    return _reduced(tape, statistic, value) is not None


def _reduced(tape: Tape, statistic: int, value: int) -> int | None:
    """Return the dimension of the channels of ``value``, last or second, along which ``statistic`` has one entry."""
    shape = tape.shape(value)
    whole = (1,) * (len(shape) - len(tape.shape(statistic))) + tape.shape(statistic)
    dims = (-1, 1) if len(shape) > 2 else (-1,) * len(shape[:1])
    return next((dim for dim in dims if whole[dim] == 1 and shape[dim] > 1), None)


def norm_channel(tape: Tape, operation: Operation) -> int:
    """Return the dimension of the channels of a norm: −1, or 1 for feature maps."""
    if is_norm(operation):
        return 1 if norm_channels_second(operation) else -1
    output = operation.outputs[0]
    # A gain is no statistic, and the value itself is not: it has as many entries as the output.
    data = (before_broadcast(tape, value) for value in operation.inputs if tape.is_data(value))
    statistics = (value for value in data if tape.tensors[value].numel() < tape.tensors[output].numel())
    found = (_reduced(tape, statistic, output) for statistic in statistics)
    return next((dim for dim in found if dim is not None), -1)


def _centred(tape: Tape, value: int) -> int:
    """Return x for x − mean(x), any other value unchanged. The variance may have been computed from x itself."""
    operation = tape.producer(value)
    return operation.inputs[0] if operation is not None and base_name(operation) == "sub" else value


def _is_weighted(tape: Tape, value: int) -> bool:
    """Whether a product with a weight, or attention, made the value. No norm computes its statistic so."""
    operation = tape.producer(value)
    return operation is not None and (is_product(tape, operation) or is_attention(operation))


def value_operand(tape: Tape, operation: Operation) -> int:
    """Return the operand of an attention product that carries the values. The other operand is the pattern.

    Raises:
        UnmeasurableError: Both operands are data of one kind, or one is a constant of unknown origin.
    """
    if is_fused_attention(operation):
        found = refs(operation, 2)
        if found:
            return found[0]
    operands = matrix_operands(operation)
    # First without, then through products with weights: talking heads multiply the pattern by a weight.
    patterns = ([value for value in operands if _is_pattern(tape, value, through)] for through in (False, True))
    weighted: list[int] = next(filter(None, patterns), [])
    others = [value for value in operands if value not in weighted]
    if not all(map(tape.is_data, others)):
        raise UnmeasurableError("it is multiplied by a matrix that belongs to no parameter and no buffer")
    if len(others) != 1:
        raise UnmeasurableError(f"no value path: both operands of {operation.name!r} depend on the tokens alike")
    return others[0]


def _is_pattern(tape: Tape, value: int, through: bool) -> bool:
    """Whether a softmax made the value. The search goes backwards and stops at products of data with data.

    Args:
        tape: The recorded forward pass.
        value: The value.
        through: Whether the search passes products with weights.
    """
    seen, queue = set(), [value]
    while queue:
        operation = tape.producer(queue.pop())
        if operation is None or operation.index in seen:
            continue
        if is_contraction(operation) and not (through and is_product(tape, operation)):
            continue
        if is_softmax(operation):
            return True
        seen.add(operation.index)
        queue += operation.inputs
    return False

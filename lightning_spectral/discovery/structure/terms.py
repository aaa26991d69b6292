"""Flatten a sum into its terms, and follow each term back to what it is a moved or multiplied copy of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_spectral.discovery.trace.operands import normalized_operand
from lightning_spectral.discovery.trace.operations import (
    Multiplier,
    addends,
    base_name,
    is_multiplication,
    is_part,
    moved_input,
    multiplied_input,
    refs,
)
from lightning_spectral.discovery.trace.tape import Operation, Tape

__all__ = ["Term", "followed", "gated_by", "terms_of", "transparent"]


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a sum.

    Attributes:
        start: The added value: an operand of the sum, in the layout of the stream.
        leaf: The first value behind the start, read backwards, that is not a moved or multiplied copy of another one.
        spine: Every value from the whole sum down to the leaf, partial sums included.
        multipliers: The constants on the spine (numbers or values), outermost first, each with the value it multiplies.
        outer: The multipliers that act on a partial sum, above the start.
        gated: The values behind the leaf that gates multiply, nearest first. Scaling one of them scales the term.

    In ``x + 0.5 * dropout(gate * h)`` the branch has the start ``0.5 * …``, the leaf ``gate * h``, the multiplier 0.5,
    and h is gated.
    """

    start: int
    leaf: int
    spine: tuple[int, ...]
    multipliers: tuple[tuple[int, Multiplier], ...] = ()
    outer: tuple[tuple[int, Multiplier], ...] = ()
    gated: tuple[int, ...] = ()

    def inside(self, total: int) -> Term:
        """Return the term as a term of a partial sum, without the multipliers that act on the partial sum as a whole.

        They multiply the stream as well, so they belong to no branch.
        """
        spine = self.spine[self.spine.index(total) :]
        multipliers, outer = (
            tuple(item for item in items if item[0] < total) for items in (self.multipliers, self.outer)
        )
        return replace(self, spine=spine, multipliers=multipliers, outer=outer)


def terms_of(tape: Tape, whole: Operation, absorbed: set[int], above: tuple[int, ...] = ()) -> list[Term]:
    """Flatten a sum into its terms. A partial sum that only this sum reads is absorbed.

    Args:
        tape: The recorded forward pass.
        whole: The sum.
        absorbed: The indices of absorbed partial sums, which this function adds to.
        above: The values above the sum, where it is itself written to a stack of streams.
    """
    found = []
    # An explicit stack: a sum over hundreds of experts is hundreds of adds deep, too deep for recursion.
    stack: list[tuple[Operation, tuple[int, ...], tuple[tuple[int, Multiplier], ...]]] = [
        (whole, above or (whole.outputs[0],), ())
    ]
    while stack:
        operation, spine, multipliers = stack.pop()
        # The second operand of add and sub, and the first of rsub, is multiplied.
        name = base_name(operation)
        alpha = float(operation.kwargs.get("alpha", 1)) * (-1 if name in ("sub", "rsub") else 1)
        scaled = () if name == "sum" else refs(operation, 0 if name == "rsub" else 1)
        inner = []
        for start in _operands(tape, operation):
            outer = (*multipliers, (start, alpha)) if alpha != 1 and start in scaled else multipliers
            value, path, factors = followed(tape, start, spine, outer)
            producer = tape.producer(value)
            # Readers other than this sum would see the partial sum: then it is a value of its own, a term. So is a sum
            # without channels, such as a sum of routing weights.
            private = _is_private(tape, path[len(spine) :]) and _has_channels(tape, value, whole.outputs[0])
            if producer is not None and len(addends(tape, producer)) > 1 and private:
                absorbed.add(producer.index)
                inner.append((producer, path, factors))
            else:
                found.append(Term(start, value, path, factors, outer, tuple(gated_by(tape, value))))
        stack += reversed(inner)
    return found


def _operands(tape: Tape, operation: Operation) -> list[int]:
    """Return the terms of one addition, each as often as it is added: x + x has two."""
    parts = addends(tape, operation)
    if base_name(operation) == "sum":
        return list(parts)
    return [value for position in (0, 1) for value in refs(operation, position) if value in parts]


def followed(
    tape: Tape, value: int, spine: tuple[int, ...], factors: tuple[tuple[int, Multiplier], ...]
) -> tuple[int, tuple[int, ...], tuple[tuple[int, Multiplier], ...]]:
    """Walk from a term backwards through data movement and multipliers, down to a sum or to the leaf.

    Args:
        tape: The recorded forward pass.
        value: The term.
        spine: The values above the term.
        factors: The multipliers above the term.

    Returns:
        The value at which the walk ends, the longer spine, and all multipliers.
    """
    while True:
        spine = (*spine, value)
        producer = tape.producer(value)
        if producer is None or len(addends(tape, producer)) > 1:
            return value, spine, factors
        step = transparent(tape, producer)
        if step is None:
            return value, spine, factors
        if step[1] is not None:
            factors = (*factors, (step[0], step[1]))
        value = step[0]


def _is_private(tape: Tape, values: Sequence[int]) -> bool:
    """Whether each value has one reader. A partial sum with a second reader is a value of its own."""
    return all(len(set(tape.readers[value])) == 1 for value in values)


def _has_channels(tape: Tape, value: int, whole: int) -> bool:
    """Whether a value still has a dimension of the size of the sum's channels, which are last or second."""
    shape = tape.shape(whole)
    return not shape or not {shape[-1], *shape[1:2]}.isdisjoint(tape.shape(value))


def gated_by(tape: Tape, leaf: int) -> Iterator[int]:
    """Yield the values that gates multiply to make a leaf, nearest first.

    In gate · h, h can be the branch if it is the later operand: computed from more values than the gate, and not an
    ancestor of the gate. A gate of a conditioning vector, or with one entry for all channels, is never the branch. The
    walk ends where both operands could be the branch.
    """
    value = leaf
    while True:
        producer = tape.producer(value)
        if producer is None or not is_multiplication(producer) or len(producer.inputs) != 2:
            return
        if normalized_operand(tape, producer) is not None:
            return  # a norm takes back what scales its input
        size = tape.tensors[value].numel()
        # Of two operands of full size, the one with more ancestors is the branch, unless the gate is made of it.
        whole = [item for item in producer.inputs if tape.tensors[item].numel() == size and tape.is_data(item)]
        if len(whole) == 2:
            gate, latest = sorted(whole, key=lambda item: tape.ancestors[item].bit_count())
            whole = [] if gate == latest or tape.depends(gate, latest) else [latest]
        if len(whole) != 1:
            return
        (value,) = whole
        yield value
        while (step := _next(tape, value)) is not None:
            value = step
            yield value


def _next(tape: Tape, value: int) -> int | None:
    """Return the value that a value is a moved or multiplied copy of, ``None`` for a sum or other operations."""
    producer = tape.producer(value)
    if producer is None or len(addends(tape, producer)) > 1:
        return None
    step = transparent(tape, producer)
    return None if step is None else step[0]


def transparent(tape: Tape, operation: Operation) -> tuple[int, Multiplier | None] | None:
    """Return the carried input of a move, a multiplication or a bias, with its multiplier, if any; else ``None``."""
    moved = moved_input(operation)
    if moved is not None:
        # A part of a tensor is not the stream, but a stream of its own.
        whole = len(operation.outputs) == 1 and not is_part(operation)
        return (moved, None) if whole and tape.is_data(moved) else None
    multiplied = multiplied_input(tape, operation)
    if multiplied is not None:
        return multiplied
    shifted = [value for value in operation.inputs if tape.is_data(value)]
    if operation.name in ("add", "add_", "sub", "sub_") and len(shifted) == 1:
        return shifted[0], None
    return None

"""Sums inside of a sum's branch: its own inner sums, the blocks that a long skip leads around, and other streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lightning_spectral.discovery.structure.adds import Refusal, ResidualAdd
from lightning_spectral.discovery.structure.residual_stream import leads_only_to, stream_source, stream_values
from lightning_spectral.discovery.trace.operations import addends
from lightning_spectral.discovery.trace.tape import Tape, bits

__all__ = ["outermost"]


def outermost(tape: Tape, adds: Sequence[ResidualAdd]) -> tuple[list[ResidualAdd], list[Refusal]]:
    """Return the adds of the outermost level, and those among them whose branch reads its stream through another one.

    Args:
        tape: The recorded forward pass.
        adds: Every sum that adds a branch to a stream, in the order of execution.
    """
    found, refusals = [], []
    origins = _origins_of(tape, adds)
    adds = _without_readings(tape, adds, origins)
    for add in _of_outermost_level(tape, adds, origins):
        others = [other.output for other in adds if _passes_by(add, other, origins)]
        if _reads_second_stream(tape, add) or _reads_only_through(tape, add, others):
            reason = (
                f"a sum of shape {tape.shape(add.output)} adds a branch that reads a second stream (reversible or "
                "crossed streams are not of the form x + f(x))"
            )
            refusals.append(Refusal(add.output, reason))
        else:
            found.append(add)
    return found, refusals


def _without_readings(tape: Tape, adds: Sequence[ResidualAdd], origins: Mapping[int, _Origin]) -> Sequence[ResidualAdd]:
    """Leave out the sums of a stream and a foreign value that one branch reads and nothing else.

    A code of positions that is made of the input, or a condition, is often added in every layer. From the second layer
    on the stream is made of the code, so that norm(x) + code looks like a residual add to the code.
    """
    written = continued = 0
    for add in adds:
        written |= 1 << add.output
        continued |= origins[add.output].values
    # No other sum writes to the stream of these. (That of pairs of tokens is written to in every layer.)
    alone = [add for add in adds if not (origins[add.output].values & written or continued >> add.output & 1)]
    readings = {
        other.output
        for add in adds
        for other in alone
        if add.interior >> other.output & 1
        and not tape.depends(other.skip.leaf, add.skip.leaf)
        and all(tape.depends(term.leaf, add.skip.leaf) for term in other.branches)
        and leads_only_to(tape, other.output, add.output)
    }
    return [add for add in adds if add.output not in readings]


def _of_outermost_level(
    tape: Tape, adds: Sequence[ResidualAdd], origins: Mapping[int, _Origin]
) -> Iterator[ResidualAdd]:
    """Leave out the adds inside another add's branch, and the long skips around a chain of blocks.

    Both look alike, adds inside of an add. Inside a long skip they are chained: the stream of one is the output of
    another::

        long skip     x ──┬─ block ─ block ─ block ─┬─ +      drop the outer add
                          └─────────────────────────┘
        inner sums    x ──┬─ norm ─ (a + f(a)) ─ W ─┬─ +      drop the inner add
                          └─────────────────────────┘
    """
    dropped: set[int] = set()
    # The largest interior first: a dropped add no longer drops the adds inside it.
    for add in sorted(adds, key=lambda item: -item.interior.bit_count()):
        if add.output in dropped:
            continue
        inner = [
            other
            for other in adds
            if other is not add
            and other.output not in dropped
            and add.interior >> other.output & 1
            and not _passes_by(add, other, origins)
        ]
        outputs = {other.output for other in inner}
        chained = any(stream_source(tape, other.skip.leaf, outputs) is not None for other in inner)
        # A long skip around one block has no chain. There the "branch" is the output of the inner add itself.
        chained |= any(term.leaf in outputs for term in add.branches)
        if chained:
            dropped.add(add.output)
        else:
            dropped |= outputs
    yield from (add for add in adds if add.output not in dropped)


class _Origin(NamedTuple):
    """Where the stream of a sum comes from: all values up the stream as a bit set, and the first of them."""

    values: int
    first: int


def _origins_of(tape: Tape, adds: Sequence[ResidualAdd]) -> dict[int, _Origin]:
    """Return the origin of the stream of every sum, by the output of the sum."""
    origins: dict[int, _Origin] = {}
    for add in adds:  # in the order of execution
        values, first = 0, add.skip.leaf
        for first in stream_values(tape, add.skip.leaf):
            values |= 1 << first
            if first in origins:
                values, first = values | origins[first].values, origins[first].first
                break
        origins[add.output] = _Origin(values, first)
    return origins


def _passes_by(add: ResidualAdd, other: ResidualAdd, origins: Mapping[int, _Origin]) -> bool:
    """Whether a sum on the way to a branch belongs to another stream, which did not begin on this way.

    The pairs of tokens of a model of proteins are such a stream: a sequence writes to it, and attention on the next
    sequence reads it.
    """
    if not add.interior >> other.output & 1:
        return False
    origin = origins[other.output]
    return not (origin.values >> add.skip.leaf & 1 or add.interior >> origin.first & 1)


def _reads_second_stream(tape: Tape, add: ResidualAdd) -> bool:
    """Whether a sum inside the branch adds a foreign value and goes on as a stream of its own (reversible streams).

    The foreign value has the size of the stream and does not come from it. A position code or the embedding may be
    added inside of a branch as well, but then only the branch reads the sum.
    """
    size = tape.shape(add.output if add.stack is None else add.stack.read)
    for value in bits(add.interior):
        operation = tape.producer(value)
        if operation is None or tape.shape(value) != size:
            continue
        parts = addends(tape, operation)
        # A part that does not come from the stream of this add.
        foreign = len(parts) > 1 and not all(tape.depends(part, add.skip.leaf) for part in parts)
        if foreign and not leads_only_to(tape, value, add.output):
            return True
    return False


def _reads_only_through(tape: Tape, add: ResidualAdd, others: Sequence[int]) -> bool:
    """Whether every way from the stream of a sum to its branches leads through sums of other streams."""
    if not others:
        return False
    reached = {add.skip.leaf}
    for value in tape.between(add.skip.leaf, max(term.start for term in add.branches)):
        operation = tape.producer(value)
        if operation is not None and value not in others and not reached.isdisjoint(operation.inputs):
            reached.add(value)
    return reached.isdisjoint(term.start for term in add.branches)

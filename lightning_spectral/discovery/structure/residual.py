"""Find the residual adds of a recorded forward pass: where the stream meets the output of a branch.

Nothing here reads a name. Four traps:

* A sum of many terms is a tree of adds. It is flattened first (``terms``), and then cut back to the smallest partial
  sum that has the skip and all branches (``adds``): what happens to the sum later happens to the whole stream.
* A branch contains sums of its own (biases, a residual MLP inside of it). Only the outermost adds count (``nesting``).
* A long skip over several blocks looks like a residual add around them. It is dropped if blocks are chained inside.
* A stream can begin with a parameter, such as learned queries, which then counts as data (``residual_stream``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_

from lightning_spectral.discovery.structure.adds import Refusal, ResidualAdd, as_residual, on_stack
from lightning_spectral.discovery.structure.nesting import outermost
from lightning_spectral.discovery.structure.residual_stream import begin_streams, stream_source
from lightning_spectral.discovery.structure.stacks import stack_at
from lightning_spectral.discovery.structure.terms import terms_of
from lightning_spectral.discovery.trace.operations import (
    addends,
    base_name,
    is_addition,
    is_mixing_without_weights,
    is_part,
    is_product,
    moved_input,
)
from lightning_spectral.discovery.trace.probe import Prober
from lightning_spectral.discovery.trace.tape import Tape

__all__ = ["residual_adds"]


def residual_adds(tape: Tape, prober: Prober) -> tuple[list[ResidualAdd], list[Refusal]]:
    """Find the residual adds of the outermost level.

    Args:
        tape: The recorded forward pass.
        prober: Answers numerical questions about maps of several streams.

    Returns:
        The adds in the order of execution, and the refused sums, which look like residual adds.
    """
    begin_streams(tape)  # before the search: a term can only be a skip if it is data
    adds, refusals = outermost(tape, _candidates(tape, prober))
    refusals += _of_another_shape(tape, adds)
    return adds, refusals or ([] if adds else list(_gated_streams(tape)))


def _of_another_shape(tape: Tape, adds: Sequence[ResidualAdd]) -> Iterator[Refusal]:
    """Yield the sums of a stream and a branch of fewer tokens: x[:, :1] + f(x), x + f(x)[:, :1].

    A last layer of which only the class token is read has such a sum.
    """
    streams = {add.output for add in adds}
    inside = reduce(or_, (add.interior for add in adds), 0)
    for operation in tape.operations:
        output = operation.outputs[0] if operation.outputs else 0
        if not is_addition(operation) or output in streams or inside >> output & 1:
            continue
        for one, other in itertools.permutations(filter(tape.is_data, operation.inputs), 2):
            producer = tape.producer(one)
            part = moved_input(producer) if producer is not None and is_part(producer) else None
            whole = one if part is None else part
            if part is None and tape.shape(one) == tape.shape(other):
                continue
            if stream_source(tape, whole, streams) is not None and _leads_through_weight(tape, whole, other):
                what = f"a branch of shape {tape.shape(other)} to all" if part is None else "to a part"
                reason = (
                    f"a sum of shape {tape.shape(output)} adds {what} of a stream of shape {tape.shape(whole)}: it is "
                    "not of the form x + f(x)"
                )
                yield Refusal(output, reason)
                break


def _gated_streams(tape: Tape) -> Iterator[Refusal]:
    """Yield the sums that have a stream times a gate of data as a term: highways, and gates as in a GRU."""
    for operation in tape.operations:
        parts = addends(tape, operation)
        for part in parts:
            producer = tape.producer(part)
            if producer is None or base_name(producer) != "mul" or len(producer.inputs) != 2:
                continue
            others = [other for other in parts if other != part]
            gates = [(value, other) for value in producer.inputs for other in others]
            if any(
                tape.shape(one) == tape.shape(other) and _leads_through_weight(tape, one, other) for one, other in gates
            ):
                reason = (
                    f"a sum of shape {tape.shape(part)} multiplies its stream by a gate of data (a highway, "
                    "a GRU): it is not of the form x + f(x)"
                )
                yield Refusal(operation.outputs[0], reason)
                break


def _leads_through_weight(tape: Tape, value: int, end: int) -> bool:
    """Whether a value is data, and leads to another value through a product with a weight."""
    if not tape.is_data(value) or not tape.depends(end, value):
        return False
    between = (tape.producer(item) for item in tape.between(value, end)[1:])
    return any(operation is not None and is_product(tape, operation) for operation in between)


def _candidates(tape: Tape, prober: Prober) -> list[ResidualAdd]:
    """Return every sum that adds a branch to a stream, in the order of execution.

    The operations are read backwards. So a whole sum is seen before its partial sums, which it absorbs.
    """
    products = 0  # bit set of the values that a weight, or mixing without a weight, has made
    for operation in tape.operations:
        if is_product(tape, operation) or is_mixing_without_weights(operation):
            for output in operation.outputs:
                products |= 1 << output
    absorbed: set[int] = set()
    found = []
    for operation in reversed(tape.operations):
        if operation.index in absorbed:
            continue
        # A stack first: a sum that writes to a stack can also look like an ordinary residual add.
        stack = stack_at(tape, prober, operation)
        if stack is not None:
            found.append(on_stack(tape, operation, stack, absorbed))
        elif len(addends(tape, operation)) > 1:
            add = as_residual(tape, operation.outputs[0], terms_of(tape, operation, absorbed), products)
            if add is not None:
                found.append(add)
    return found[::-1]

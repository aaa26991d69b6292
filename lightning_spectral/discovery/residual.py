"""Find the residual adds of a recorded forward pass: where the stream meets the output of a branch.

Nothing here reads a name. A residual add is a sum of which one term, the skip, is an ancestor of another, the branch,
with a product with a weight in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_spectral.discovery.operations import (
    Multiplier,
    addends,
    is_mixing_without_weights,
    is_norm,
    is_product,
    moved_input,
    multiplied_input,
    refs,
)
from lightning_spectral.discovery.tape import Operation, Tape, bits

__all__ = ["ResidualAdd", "Term", "residual_adds", "stream_source"]


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a sum.

    Attributes:
        start: The value that is added: an operand of the sum, in the layout of the stream.
        leaf: The value at which data movement and multiplication by constants end, read backwards from the start.
        spine: Every value from the whole sum down to the leaf, partial sums included.
        multipliers: The constants on the way (numbers or values), outermost first, each with the value it multiplies.
        outer: The multipliers among them that act on a partial sum, above the start.
    """

    start: int
    leaf: int
    spine: tuple[int, ...]
    multipliers: tuple[tuple[int, Multiplier], ...] = ()
    outer: tuple[tuple[int, Multiplier], ...] = ()


@dataclass(slots=True)
class ResidualAdd:
    """A sum that adds branches to the stream.

    Attributes:
        output: The value of the sum.
        skip: The term that carries the stream.
        branches: The terms that were computed from it.
        others: What else is added: nothing in a plain block.
        interior: Bit set of the values strictly between the skip and the sum.
    """

    output: int
    skip: Term
    branches: tuple[Term, ...]
    others: tuple[Term, ...] = ()
    interior: int = 0


def residual_adds(tape: Tape) -> tuple[list[ResidualAdd], list[str]]:
    """Find the residual adds of the outermost level.

    Args:
        tape: The recorded forward pass.

    Returns:
        The adds in the order of execution, and why some sums that look like one were refused.
    """
    products = 0
    for operation in tape.operations:
        if is_product(tape, operation) or is_mixing_without_weights(operation):
            for output in operation.outputs:
                products |= 1 << output
    absorbed: set[int] = set()
    found = []
    for operation in reversed(tape.operations):
        if len(addends(tape, operation)) < 2 or operation.index in absorbed:
            continue
        terms = list(_terms(tape, operation, (operation.outputs[0],), (), absorbed))
        add = _as_residual(tape, operation.outputs[0], terms, products)
        if add is not None:
            found.append(add)
    adds, refusals = [], []
    for add in _outermost(tape, found[::-1]):
        if _reads_second_stream(tape, add):
            refusals.append(
                f"a sum of shape {tape.shape(add.output)} adds a branch that reads a second stream (reversible or "
                "crossed streams are not of the form x + f(x))"
            )
        else:
            adds.append(add)
    return adds, refusals


def _reads_second_stream(tape: Tape, add: ResidualAdd) -> bool:
    """Whether something of the stream's own size that does not depend on the stream is added inside the branch."""
    size = tape.shape(add.output)
    for value in bits(add.interior):
        operation = tape.producer(value)
        if operation is None or tape.shape(value) != size:
            continue
        parts = addends(tape, operation)
        if len(parts) > 1 and not all(tape.depends(part, add.skip.leaf) for part in parts):
            return True
    return False


def _terms(
    tape: Tape,
    operation: Operation,
    spine: tuple[int, ...],
    multipliers: tuple[tuple[int, Multiplier], ...],
    absorbed: set[int],
) -> Iterator[Term]:
    """Flatten a sum into its terms; a partial sum that only this sum reads is part of it."""
    alpha = operation.kwargs.get("alpha", 1)  # add and sub multiply their second operand by it
    for start in addends(tape, operation):
        outer = (*multipliers, (start, float(alpha))) if alpha != 1 and start in refs(operation, 1) else multipliers
        value, path, factors, private = start, spine, outer, True
        while True:
            path = (*path, value)
            private = private and len(set(tape.readers[value])) == 1
            producer = tape.producer(value)
            if producer is None:
                break
            if len(addends(tape, producer)) > 1:
                if private:
                    absorbed.add(producer.index)
                    yield from _terms(tape, producer, path, factors, absorbed)
                    path = ()
                break
            step = _transparent(tape, producer)
            if step is None:
                break
            if step[1] is not None:
                factors = (*factors, (step[0], step[1]))
            value = step[0]
        if path:
            yield Term(start, value, path, factors, outer)


def _transparent(tape: Tape, operation: Operation) -> tuple[int, Multiplier | None] | None:
    """Return the input of an operation that is linear and homogeneous in it, with the multiplier if there is one."""
    moved = moved_input(operation)
    if moved is not None:
        # A part of a tensor is a stream of its own.
        whole = len(operation.outputs) == 1 and operation.name not in ("select", "slice", "index", "index_select")
        return (moved, None) if whole and tape.is_data(moved) else None
    multiplied = multiplied_input(tape, operation)
    if multiplied is not None:
        return multiplied
    shifted = [value for value in operation.inputs if tape.is_data(value)]
    if operation.name in ("add", "add_", "sub", "sub_") and len(shifted) == 1:
        return shifted[0], None
    return None


def _as_residual(tape: Tape, output: int, terms: list[Term], products: int) -> ResidualAdd | None:
    best: ResidualAdd | None = None
    for skip in terms:
        branches = []
        for term in terms:
            if term is skip or term.leaf == skip.leaf or not tape.depends(term.leaf, skip.leaf):
                continue
            inside = tape.ancestors[term.leaf] & products & ~((1 << skip.leaf) - 1)
            if any(tape.depends(value, skip.leaf) and value != skip.leaf for value in bits(inside)):
                branches.append(term)
        # Of several skips (a long skip joins the stream) the latest is the stream.
        if branches and (best is None or skip.leaf > best.skip.leaf):
            others = tuple(term for term in terms if term is not skip and term not in branches)
            best = ResidualAdd(output, skip, tuple(branches), others)
    if best is not None:
        # What multiplies the stream before the branches leave it (an embedding's scale, the gain of a norm behind the
        # last sum) is the stream's, not theirs.
        leaves = [term.leaf for term in best.branches]
        fork = next(value for value in best.skip.spine if all(tape.depends(leaf, value) for leaf in leaves))
        best.skip = replace(best.skip, leaf=fork)
        for term in best.branches:
            for value in tape.between(best.skip.leaf, term.start):
                if value != best.skip.leaf:
                    best.interior |= 1 << value
    return best


def _outermost(tape: Tape, adds: list[ResidualAdd]) -> list[ResidualAdd]:
    """Drop the adds inside another's branch, and the long skips that span a chain of blocks."""
    dropped: set[int] = set()
    for add in sorted(adds, key=lambda item: -item.interior.bit_count()):
        if add.output in dropped:
            continue
        inner = [
            other
            for other in adds
            if other is not add and other.output not in dropped and add.interior >> other.output & 1
        ]
        outputs = {other.output for other in inner}
        chained = any(stream_source(tape, other.skip.leaf, outputs) is not None for other in inner)
        if chained:
            dropped.add(add.output)
        else:
            dropped |= outputs
    return [add for add in adds if add.output not in dropped]


def stream_source(tape: Tape, value: int, outputs: set[int]) -> int | None:
    """Walk from a value up the residual stream, through norms and constants, to one of the given sums."""
    while value not in outputs:
        producer = tape.producer(value)
        if producer is None:
            return None
        step = _transparent(tape, producer)
        source = step[0] if step is not None else _normalized_input(tape, producer)
        if source is None:
            return None
        value = source
    return value


def _normalized_input(tape: Tape, operation: Operation) -> int | None:
    """Return the value that a fused norm, or a product with a statistic of the value itself, normalizes."""
    if is_norm(operation):
        return operation.inputs[0]
    if operation.name not in ("mul", "div", "sub", "mul_", "div_", "sub_") or len(operation.inputs) != 2:
        return None
    first, second = operation.inputs
    for value, statistic in ((first, second), (second, first)):
        if tape.depends(statistic, value) and tape.shape(value) == tape.shape(operation.outputs[0]):
            return value
    return None

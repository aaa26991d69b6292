"""Find the residual adds of a recorded forward pass: where the stream meets the output of a branch.

Nothing here reads a name. A residual add is a sum of which one term, the skip, is an ancestor of another, the branch,
with a product with a weight in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_spectral.discovery.structure.stacks import Stack, stack_at
from lightning_spectral.discovery.trace.operands import is_statistic, normalized_operand
from lightning_spectral.discovery.trace.operations import (
    Multiplier,
    addends,
    base_name,
    is_attention,
    is_mixing_without_weights,
    is_multiplication,
    is_norm,
    is_part,
    is_product,
    moved_input,
    multiplied_input,
    refs,
)
from lightning_spectral.discovery.trace.probe import Prober
from lightning_spectral.discovery.trace.tape import Operation, Tape, bits

__all__ = [
    "Refusal",
    "ResidualAdd",
    "Term",
    "goes_on",
    "leads_only_to",
    "residual_adds",
    "stream_source",
    "stream_step",
    "stream_values",
]


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a sum.

    Attributes:
        start: The value that is added: an operand of the sum, in the layout of the stream.
        leaf: The value at which data movement and multiplication by constants end, read backwards from the start.
        spine: Every value from the whole sum down to the leaf, partial sums included.
        multipliers: The constants on the way (numbers or values), outermost first, each with the value it multiplies.
        outer: The multipliers among them that act on a partial sum, above the start.
        gated: The values behind the leaf that gates multiply, nearest first: scaling one of them scales the term.
    """

    start: int
    leaf: int
    spine: tuple[int, ...]
    multipliers: tuple[tuple[int, Multiplier], ...] = ()
    outer: tuple[tuple[int, Multiplier], ...] = ()
    gated: tuple[int, ...] = ()

    def inside(self, total: int) -> Term:
        """Return the term as one of a partial sum: what happens to the sum afterwards happens to the stream as well."""
        spine = self.spine[self.spine.index(total) :]
        multipliers, outer = (
            tuple(item for item in items if item[0] < total) for items in (self.multipliers, self.outer)
        )
        return replace(self, spine=spine, multipliers=multipliers, outer=outer)


@dataclass(slots=True)
class ResidualAdd:
    """A sum that adds branches to the stream.

    Attributes:
        output: The value of the sum.
        skip: The term that carries the stream.
        branches: The terms that were computed from it.
        others: What else is added: nothing in a plain block.
        interior: Bit set of the values strictly between the skip and the sum.
        stack: The streams that the sum writes to, where there are several side by side.
    """

    output: int
    skip: Term
    branches: tuple[Term, ...]
    others: tuple[Term, ...] = ()
    interior: int = 0
    stack: Stack | None = None

    @property
    def stream(self) -> int:
        """What the branches read: the stream, or the one that was read from a stack of streams."""
        return self.skip.leaf if self.stack is None else self.stack.read


@dataclass(frozen=True, slots=True)
class Refusal:
    """A sum that looks like a residual add and is none.

    Attributes:
        output: The value of the sum.
        reason: Why it is none.
    """

    output: int
    reason: str


def residual_adds(tape: Tape, prober: Prober) -> tuple[list[ResidualAdd], list[Refusal]]:
    """Find the residual adds of the outermost level.

    Args:
        tape: The recorded forward pass.
        prober: Remembers what maps of several streams are.

    Returns:
        The adds in the order of execution, and the sums that look like one and were refused.
    """
    _begin_streams(tape)
    adds, refusals = [], []
    for add in _outermost(tape, _candidates(tape, prober)):
        if _reads_second_stream(tape, add):
            reason = (
                f"a sum of shape {tape.shape(add.output)} adds a branch that reads a second stream (reversible or "
                "crossed streams are not of the form x + f(x))"
            )
            refusals.append(Refusal(add.output, reason))
        else:
            adds.append(add)
    return adds, refusals or ([] if adds else list(_gated_streams(tape)))


def _gated_streams(tape: Tape) -> Iterator[Refusal]:
    """Yield the sums of which one term is a stream times a gate: highways, and gates as in a GRU."""
    for operation in tape.operations:
        parts = addends(tape, operation)
        for part in parts:
            producer = tape.producer(part)
            if producer is None or base_name(producer) != "mul" or len(producer.inputs) != 2:
                continue
            others = [other for other in parts if other != part]
            if any(_leads_through_weight(tape, value, other) for value in producer.inputs for other in others):
                reason = (
                    f"a sum of shape {tape.shape(part)} multiplies its stream by a gate of data (a highway, "
                    "a GRU): it is not of the form x + f(x)"
                )
                yield Refusal(operation.outputs[0], reason)
                break


def _leads_through_weight(tape: Tape, value: int, end: int) -> bool:
    """Whether data of one shape leads to a value through a product with a weight."""
    if not tape.is_data(value) or tape.shape(value) != tape.shape(end) or not tape.depends(end, value):
        return False
    between = (tape.producer(item) for item in tape.between(value, end)[1:])
    return any(operation is not None and is_product(tape, operation) for operation in between)


def _candidates(tape: Tape, prober: Prober) -> list[ResidualAdd]:
    """Return every sum that adds a branch to a stream, in the order of execution."""
    products = 0
    for operation in tape.operations:
        if is_product(tape, operation) or is_mixing_without_weights(operation):
            for output in operation.outputs:
                products |= 1 << output
    absorbed: set[int] = set()
    found = []
    for operation in reversed(tape.operations):
        if operation.index in absorbed:
            continue
        stack = stack_at(tape, prober, operation)
        if stack is not None:
            found.append(_on_stack(tape, operation, stack, absorbed))
        elif len(addends(tape, operation)) > 1:
            add = _as_residual(tape, operation.outputs[0], _terms(tape, operation, absorbed), products)
            if add is not None:
                found.append(add)
    return found[::-1]


def _begin_streams(tape: Tape) -> None:
    """Count parameters as data that a stream begins with: learned queries, latents, a class token.

    Such a parameter is added to something that was computed from it, in its own shape, by products with other weights:
    of data, or by attention before any data comes in (the object queries of DETR, whose stream begins at zero).
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
    """Whether a value is a residual sum, up to norms: positions are added to it, and no stream begins with them."""
    sums = (operation for item in stream_values(tape, value) if (operation := tape.producer(item)) is not None)
    return any(
        base_name(operation) == "add" and tape.depends(one, other) and tape.shape(one) == tape.shape(other)
        for operation in sums
        for one, other in itertools.permutations(operation.inputs, 2)
    )


def _attends(tape: Tape, start: int, end: int) -> bool:
    operations = (tape.producer(value) for value in tape.between(start, end))
    return tape.made_of_parameters(end) and any(item is not None and is_attention(item) for item in operations)


def _reads_second_stream(tape: Tape, add: ResidualAdd) -> bool:
    """Whether the branch adds to something a value of the stream's size that goes on as a stream of its own.

    Positions or the first stream may be added inside of a branch: nobody but the branch reads such a sum.
    """
    size = tape.shape(add.output if add.stack is None else add.stack.read)
    for value in bits(add.interior):
        operation = tape.producer(value)
        if operation is None or tape.shape(value) != size:
            continue
        parts = addends(tape, operation)
        foreign = len(parts) > 1 and not all(tape.depends(part, add.skip.leaf) for part in parts)
        if foreign and not leads_only_to(tape, value, add.output):
            return True
    return False


def goes_on(tape: Tape, value: int) -> bool:
    """Whether a sum is read as a stream is: by a norm, a product, another sum, or the caller.

    Inside of a recurrent cell, sums are read by gates and activations alone.
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
    """Whether every use of a value ends in another one. Views that nobody computes with do not count."""
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


def _on_stack(tape: Tape, operation: Operation, stack: Stack, absorbed: set[int]) -> ResidualAdd:
    """Return a sum that writes to a stack of streams as a residual add of the branches that it writes."""
    output, written = operation.outputs[0], stack.written
    value, path, _ = _followed(tape, written, stack.spine[:-1], ())
    producer = tape.producer(value)
    if producer is not None and len(addends(tape, producer)) > 1:
        absorbed.add(producer.index)
        branches = _terms(tape, producer, absorbed, path)
    else:
        branches = [Term(written, value, path, gated=tuple(_gated(tape, value)))]
    add = ResidualAdd(output, Term(stack.kept, stack.before, (output, stack.kept)), tuple(branches), stack=stack)
    for value in tape.between(stack.before, output):
        if value not in (stack.before, output):
            add.interior |= 1 << value
    return add


def _terms(tape: Tape, whole: Operation, absorbed: set[int], above: tuple[int, ...] = ()) -> list[Term]:
    """Flatten a sum into its terms; a partial sum that only this sum reads is part of it."""
    found = []
    # A sum over hundreds of experts is as deep: a stack of our own has no limit.
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
            value, path, factors = _followed(tape, start, spine, outer)
            producer = tape.producer(value)
            private = _is_private(tape, path[len(spine) :]) and _has_channels(tape, value, whole.outputs[0])
            if producer is not None and len(addends(tape, producer)) > 1 and private:
                absorbed.add(producer.index)
                inner.append((producer, path, factors))
            else:
                found.append(Term(start, value, path, factors, outer, tuple(_gated(tape, value))))
        stack += reversed(inner)
    return found


def _operands(tape: Tape, operation: Operation) -> list[int]:
    """Return the terms of one sum, each as often as it is added."""
    parts = addends(tape, operation)
    if base_name(operation) == "sum":
        return list(parts)
    return [value for position in (0, 1) for value in refs(operation, position) if value in parts]


def _followed(
    tape: Tape, value: int, spine: tuple[int, ...], factors: tuple[tuple[int, Multiplier], ...]
) -> tuple[int, tuple[int, ...], tuple[tuple[int, Multiplier], ...]]:
    """Walk from a term backwards through data movement and multipliers, down to a sum or to the leaf."""
    while True:
        spine = (*spine, value)
        producer = tape.producer(value)
        if producer is None or len(addends(tape, producer)) > 1:
            return value, spine, factors
        step = _transparent(tape, producer)
        if step is None:
            return value, spine, factors
        if step[1] is not None:
            factors = (*factors, (step[0], step[1]))
        value = step[0]


def _is_private(tape: Tape, values: Sequence[int]) -> bool:
    return all(len(set(tape.readers[value])) == 1 for value in values)


def _has_channels(tape: Tape, value: int, whole: int) -> bool:
    """Whether a value has the channels of a sum, last or second, in a dimension of their own."""
    shape = tape.shape(whole)
    return not shape or not {shape[-1], *shape[1:2]}.isdisjoint(tape.shape(value))


def _gated(tape: Tape, leaf: int) -> Iterator[int]:
    """Yield what stands behind gates in front of a leaf, as long as one operand alone can be the branch.

    A gate that is made of other data (of a conditioning vector), or that has one entry for all channels, is not.
    """
    value = leaf
    while True:
        producer = tape.producer(value)
        if producer is None or not is_multiplication(producer) or len(producer.inputs) != 2:
            return
        if normalized_operand(tape, producer) is not None:
            return  # a norm takes back what scales its input
        size = tape.tensors[value].numel()
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
    producer = tape.producer(value)
    if producer is None or len(addends(tape, producer)) > 1:
        return None
    step = _transparent(tape, producer)
    return None if step is None else step[0]


def _transparent(tape: Tape, operation: Operation) -> tuple[int, Multiplier | None] | None:
    """Return the input of an operation that is linear and homogeneous in it, with the multiplier if there is one."""
    moved = moved_input(operation)
    if moved is not None:
        # A part of a tensor is a stream of its own.
        whole = len(operation.outputs) == 1 and not is_part(operation)
        return (moved, None) if whole and tape.is_data(moved) else None
    multiplied = multiplied_input(tape, operation)
    if multiplied is not None:
        return multiplied
    shifted = [value for value in operation.inputs if tape.is_data(value)]
    if operation.name in ("add", "add_", "sub", "sub_") and len(shifted) == 1:
        return shifted[0], None
    return None


def _as_residual(tape: Tape, output: int, terms: list[Term], products: int) -> ResidualAdd | None:
    found = []
    for skip in terms:
        branches = []
        for term in terms:
            if term is skip or term.leaf == skip.leaf or not tape.depends(term.leaf, skip.leaf):
                continue
            inside = tape.ancestors[term.leaf] & products & ~((1 << skip.leaf) - 1)
            if any(tape.depends(value, skip.leaf) and value != skip.leaf for value in bits(inside)):
                branches.append(term)
        if branches:
            others = tuple(term for term in terms if term is not skip and term not in branches)
            found.append(ResidualAdd(output, skip, tuple(branches), others))
    # Of several skips (a long skip joins the stream) the latest is the stream; where the stream itself is added once
    # more behind the sum, the first.
    best = max(found, key=lambda add: (add.skip.leaf, -_partial_sum(add)), default=None)
    return None if best is None else _completed(tape, _smallest(best))


def _partial_sum(add: ResidualAdd) -> int:
    """Return the smallest partial sum that has the stream and all branches."""
    return min(set(add.skip.spine).intersection(*(term.spine for term in add.branches)))


def _smallest(add: ResidualAdd) -> ResidualAdd:
    """Return the smallest partial sum that has the stream and all branches, as a sum.

    What multiplies or joins this sum afterwards happens to the whole stream, and belongs to no branch.
    """
    total = _partial_sum(add)
    others = tuple(term.inside(total) for term in add.others if total in term.spine)
    return ResidualAdd(total, add.skip.inside(total), tuple(term.inside(total) for term in add.branches), others)


def _completed(tape: Tape, add: ResidualAdd) -> ResidualAdd:
    # What multiplies the stream before the branches leave it (an embedding's scale, the gain of a norm behind the
    # last sum) is the stream's, not theirs.
    leaves = [term.leaf for term in add.branches]
    depth = next(i for i, value in enumerate(add.skip.spine) if all(tape.depends(leaf, value) for leaf in leaves))
    add.skip = replace(add.skip, leaf=_first_view(tape, add.skip.spine[depth:], leaves))
    for term in add.branches:
        for value in tape.between(add.skip.leaf, term.start):
            if value != add.skip.leaf:
                add.interior |= 1 << value
    return add


def _first_view(tape: Tape, spine: Sequence[int], leaves: Sequence[int]) -> int:
    """Return the first of several views of the stream that a branch reads: a view of a view can be an earlier one."""
    fork, size = spine[0], tape.tensors[spine[0]].numel()
    for view, value in itertools.pairwise(spine):
        producer = tape.producer(view)
        if producer is None or moved_input(producer) != value or tape.tensors[value].numel() != size:
            break
        readers = set(tape.readers[value]) - {producer.index}
        outputs = (item for reader in readers for item in tape.operations[reader].outputs)
        if any(tape.depends(leaf, item) for item in outputs for leaf in leaves):
            fork = value
    return fork


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
        # The first stream added again behind one block: what is added to it is the stream, and no branch.
        chained |= any(term.leaf in outputs for term in add.branches)
        if chained:
            dropped.add(add.output)
        else:
            dropped |= outputs
    return [add for add in adds if add.output not in dropped]


def stream_source(tape: Tape, value: int, outputs: set[int]) -> int | None:
    """Walk from a value up the residual stream, through norms and constants, to one of the given sums."""
    return next((item for item in stream_values(tape, value) if item in outputs), None)


def stream_values(tape: Tape, value: int) -> Iterator[int]:
    """Yield a value and what it was passed on from as a stream, through norms and constants, the nearest first."""
    source: int | None = value
    while source is not None:
        yield source
        producer = tape.producer(source)
        source = None if producer is None else stream_step(tape, producer)


def stream_step(tape: Tape, operation: Operation) -> int | None:
    """Return the value that an operation passes on as a stream: moved, multiplied by constants, or normalized."""
    step = _transparent(tape, operation)
    if step is not None:
        return step[0]
    if is_norm(operation):
        return operation.inputs[0]
    if base_name(operation) == "sub" and len(operation.inputs) == 2:  # the mean is taken off
        value, mean = operation.inputs
        return value if tape.depends(mean, value) and is_statistic(tape, mean, value) else None
    return normalized_operand(tape, operation)

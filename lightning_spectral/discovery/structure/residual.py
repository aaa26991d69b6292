"""Find the residual adds of a recorded forward pass: where the stream meets the output of a branch.

Nothing here reads a name. In a residual add, one term, the skip, is an ancestor of another term, the branch, and a
product with a weight lies in between::

            ┌──────────────── skip ────────────────┐
    leaf ───┤                                      + ── output
            └─ norm ─ product ─ … ─ × s ─ branch ──┘
               (these values are the interior)

Four traps:

* A sum of many terms is a tree of adds. It is flattened first, and then cut back to the smallest partial sum that has
  the skip and all branches: what happens to the sum later happens to the whole stream.
* A branch contains sums of its own (biases, a residual MLP inside of it). Only the outermost adds count.
* A long skip over several blocks looks like a residual add around them. It is dropped if blocks are chained inside.
* A stream can begin with a parameter, such as learned queries, which then counts as data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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


@dataclass(slots=True)
class ResidualAdd:
    """A sum that adds branches to the stream.

    Attributes:
        output: The value of the sum.
        skip: The term that carries the stream.
        branches: The terms that were computed from the stream by weights.
        others: The other terms, such as position codes; none in a plain block.
        interior: Bit set of the values on ways from the skip to the branches, the skip's leaf excluded.
        stack: The streams that the sum writes to, for a model with several streams side by side.
    """

    output: int
    skip: Term
    branches: tuple[Term, ...]
    others: tuple[Term, ...] = ()
    interior: int = 0
    stack: Stack | None = None

    @property
    def stream(self) -> int:
        """The value that the branches read: the stream, or the one stream that is read from a stack of streams."""
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
        prober: Answers numerical questions about maps of several streams.

    Returns:
        The adds in the order of execution, and the refused sums, which look like residual adds.
    """
    _begin_streams(tape)
    adds, refusals = [], []
    # Streams have to begin before the search: a term can only be a skip if it is data.
    candidates = _candidates(tape, prober)
    origins = _origins(tape, candidates)
    for add in _outermost(tape, candidates, origins):
        others = [other.output for other in candidates if _passes_by(add, other, origins)]
        if _reads_second_stream(tape, add) or _reads_only_through(tape, add, others):
            reason = (
                f"a sum of shape {tape.shape(add.output)} adds a branch that reads a second stream (reversible or "
                "crossed streams are not of the form x + f(x))"
            )
            refusals.append(Refusal(add.output, reason))
        else:
            adds.append(add)
    return adds, refusals or ([] if adds else list(_gated_streams(tape)))


def _gated_streams(tape: Tape) -> Iterator[Refusal]:
    """Yield the sums that have a stream times a gate of data as a term: highways, and gates as in a GRU."""
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
    """Whether a value is data, and leads to another value of its shape through a product with a weight."""
    if not tape.is_data(value) or tape.shape(value) != tape.shape(end) or not tape.depends(end, value):
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
            found.append(_on_stack(tape, operation, stack, absorbed))
        elif len(addends(tape, operation)) > 1:
            add = _as_residual(tape, operation.outputs[0], _terms(tape, operation, absorbed), products)
            if add is not None:
                found.append(add)
    return found[::-1]


def _begin_streams(tape: Tape) -> None:
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


def _on_stack(tape: Tape, operation: Operation, stack: Stack, absorbed: set[int]) -> ResidualAdd:
    """Return a sum that writes to a stack of streams as a residual add of the branches that are written."""
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
            value, path, factors = _followed(tape, start, spine, outer)
            producer = tape.producer(value)
            # Readers other than this sum would see the partial sum: then it is a value of its own, a term. So is a sum
            # without channels, such as a sum of routing weights.
            private = _is_private(tape, path[len(spine) :]) and _has_channels(tape, value, whole.outputs[0])
            if producer is not None and len(addends(tape, producer)) > 1 and private:
                absorbed.add(producer.index)
                inner.append((producer, path, factors))
            else:
                found.append(Term(start, value, path, factors, outer, tuple(_gated(tape, value))))
        stack += reversed(inner)
    return found


def _operands(tape: Tape, operation: Operation) -> list[int]:
    """Return the terms of one addition, each as often as it is added: x + x has two."""
    parts = addends(tape, operation)
    if base_name(operation) == "sum":
        return list(parts)
    return [value for position in (0, 1) for value in refs(operation, position) if value in parts]


def _followed(
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
        step = _transparent(tape, producer)
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


def _gated(tape: Tape, leaf: int) -> Iterator[int]:
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
    step = _transparent(tape, producer)
    return None if step is None else step[0]


def _transparent(tape: Tape, operation: Operation) -> tuple[int, Multiplier | None] | None:
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


def _as_residual(tape: Tape, output: int, terms: list[Term], products: int) -> ResidualAdd | None:
    """Return a sum as a residual add, ``None`` if no term was computed from another one by a weight.

    Args:
        tape: The recorded forward pass.
        output: The sum.
        terms: The terms of the sum.
        products: Bit set of the values that a product has made.
    """
    found = []
    for skip in terms:
        branches = []
        for term in terms:
            if term is skip or term.leaf == skip.leaf or not tape.depends(term.leaf, skip.leaf):
                continue
            # Products among the ancestors of the branch that are later than the skip: is one on the way between them?
            inside = tape.ancestors[term.leaf] & products & ~((1 << skip.leaf) - 1)
            if any(tape.depends(value, skip.leaf) and value != skip.leaf for value in bits(inside)):
                branches.append(term)
        if branches:
            others = tuple(term for term in terms if term is not skip and term not in branches)
            found.append(ResidualAdd(output, skip, tuple(branches), others))
    # If a long skip joins the stream, there are several skips: the latest one is the stream. If the stream is added
    # twice, the skips have one leaf: the one with the smallest partial sum counts.
    best = max(found, key=lambda add: (add.skip.leaf, -_partial_sum(add)), default=None)
    return None if best is None else _completed(tape, _smallest(best))


def _partial_sum(add: ResidualAdd) -> int:
    """Return the smallest partial sum that contains the stream and all branches: the lowest value common to spines."""
    return min(set(add.skip.spine).intersection(*(term.spine for term in add.branches)))


def _smallest(add: ResidualAdd) -> ResidualAdd:
    """Return a residual add cut back to its smallest partial sum.

    Multipliers and addends of that partial sum act on the whole stream, so they belong to no branch.
    """
    total = _partial_sum(add)
    others = tuple(term.inside(total) for term in add.others if total in term.spine)
    return ResidualAdd(total, add.skip.inside(total), tuple(term.inside(total) for term in add.branches), others)


def _completed(tape: Tape, add: ResidualAdd) -> ResidualAdd:
    """Move the leaf of the skip to the point where the branches leave the stream, and collect the interior.

    The skip was followed backwards through constants, possibly beyond that point. An embedding's scale or the gain of
    a norm behind the last sum multiplies the stream before the branches read it, so it is no multiplier of the skip.
    """
    # The first value down the spine that all branches depend on.
    leaves = [term.leaf for term in add.branches]
    depth = next(i for i, value in enumerate(add.skip.spine) if all(tape.depends(leaf, value) for leaf in leaves))
    add.skip = replace(add.skip, leaf=_first_view(tape, add.skip.spine[depth:], leaves))
    for term in add.branches:
        for value in tape.between(add.skip.leaf, term.start):
            if value != add.skip.leaf:
                add.interior |= 1 << value
    return add


def _first_view(tape: Tape, spine: Sequence[int], leaves: Sequence[int]) -> int:
    """Return the earliest value that equals the head of a spine up to views and that a branch reads.

    A skip and a branch can read the same stream through different views, x.view(a) and x.view(b) of one x.
    """
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


class _Origin(NamedTuple):
    """Where the stream of a sum comes from: all values up the stream as a bit set, and the first of them."""

    values: int
    first: int


def _origins(tape: Tape, adds: Sequence[ResidualAdd]) -> dict[int, _Origin]:
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


def _outermost(tape: Tape, adds: list[ResidualAdd], origins: Mapping[int, _Origin]) -> list[ResidualAdd]:
    """Drop the adds inside another add's branch, and the long skips around a chain of blocks.

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
    return [add for add in adds if add.output not in dropped]


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
    step = _transparent(tape, operation)
    if step is not None:
        return step[0]
    if is_norm(operation):
        return operation.inputs[0]
    if base_name(operation) == "sub" and len(operation.inputs) == 2:  # x − mean(x)
        value, mean = operation.inputs
        return value if tape.depends(mean, value) and is_statistic(tape, mean, value) else None
    return normalized_operand(tape, operation)

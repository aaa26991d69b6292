"""One residual add: the smallest sum that has the stream and all its branches.

In a residual add, one term, the skip, is an ancestor of another term, the branch, and a product with a weight lies in
between::

            ┌──────────────── skip ────────────────┐
    leaf ───┤                                      + ── output
            └─ norm ─ product ─ … ─ × s ─ branch ──┘
               (these values are the interior)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_spectral.discovery.structure.stacks import Stack
from lightning_spectral.discovery.structure.terms import Term, followed, gated_by, terms_of
from lightning_spectral.discovery.trace.operations import addends, moved_input
from lightning_spectral.discovery.trace.tape import Operation, Tape, bits

__all__ = ["Refusal", "ResidualAdd", "as_residual", "on_stack"]


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


def as_residual(tape: Tape, output: int, terms: list[Term], products: int) -> ResidualAdd | None:
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


def on_stack(tape: Tape, operation: Operation, stack: Stack, absorbed: set[int]) -> ResidualAdd:
    """Return a sum that writes to a stack of streams as a residual add of the branches that are written."""
    output, written = operation.outputs[0], stack.written
    value, path, _ = followed(tape, written, stack.spine[:-1], ())
    producer = tape.producer(value)
    if producer is not None and len(addends(tape, producer)) > 1:
        absorbed.add(producer.index)
        branches = terms_of(tape, producer, absorbed, path)
    else:
        branches = [Term(written, value, path, gated=tuple(gated_by(tape, value)))]
    add = ResidualAdd(output, Term(stack.kept, stack.before, (output, stack.kept)), tuple(branches), stack=stack)
    for value in tape.between(stack.before, output):
        if value not in (stack.before, output):
            add.interior |= 1 << value
    return add


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

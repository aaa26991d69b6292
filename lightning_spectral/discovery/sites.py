"""Choose, for each branch, the module whose output is added to the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_spectral.discovery.residual import ResidualAdd, Term, stream_source
from lightning_spectral.discovery.tape import Call, Tape

__all__ = ["Site", "choose_site"]


@dataclass(frozen=True, slots=True)
class Site:
    """A module (or, failing that, a parameter) that carries a branch.

    Attributes:
        path: Module path, or ``param:<path>``.
        output_index: Element of the output tuple, ``None`` for a tensor.
        value: The value of the tape that stands at the site.
    """

    path: str
    output_index: int | str | None
    value: int


def choose_site(
    tape: Tape, add: ResidualAdd, terms: Sequence[Term], others: Iterable[Term], serves: Counter[str]
) -> Site | None:
    """Return the site of one branch, ``None`` where no module carries it.

    A candidate returns the branch itself, or the branch before constants multiply it. Of several, those come first
    whose output is exactly what is added, which serve no other branch, are called once per forward pass, and stand
    outermost (fused kernels bypass inner projections); of equals, the one called first.

    Args:
        tape: The recorded forward pass.
        add: The residual add.
        terms: The terms of the sum that form the branch.
        others: The other terms of the sum.
        serves: How many branches each module path is a candidate of.
    """
    shared = set(terms[0].spine).intersection(*(term.spine for term in terms[1:]))
    shared -= {value for term in others for value in term.spine} | {add.output}
    inner_multiplied = {value for term in terms for value, _ in term.multipliers}
    calls_per_path = Counter(call.path for call in tape.calls)
    ranked = []
    for value in sorted(shared):
        exact = not any(value <= multiplied for multiplied in inner_multiplied)
        for call in tape.calls_that_return(value):
            if tape.depends(value, add.skip.leaf) and _feeds_only(tape, value, add) and not _contains_skip(tape, call, add):
                index = next(key for key, output in call.outputs if output == value)
                rank = (serves[call.path] > 1, not exact, calls_per_path[call.path], call.path.count("."), call.index)
                ranked.append((rank, Site(call.path, index, value)))
    return min(ranked, key=lambda item: item[0])[1] if ranked else None


def candidates(tape: Tape, add: ResidualAdd, term: Term) -> set[str]:
    """Return the paths of the modules that return a value on the spine of a term."""
    return {call.path for value in term.spine if value != add.output for call in tape.calls_that_return(value)}


def _contains_skip(tape: Tape, call: Call, add: ResidualAdd) -> bool:
    # A block that was skipped as a whole (stochastic depth over blocks) is not a branch.
    return any(output == add.output for _, output in call.outputs)


def _feeds_only(tape: Tape, value: int, add: ResidualAdd) -> bool:
    """Whether everything that reads the value leads to the add and to nothing else."""
    seen, queue = {value}, [value]
    while queue:
        current = queue.pop()
        for reader in tape.readers[current]:
            for output in tape.operations[reader].outputs:
                if output == add.output or output in seen:
                    continue
                if not tape.depends(add.output, output):
                    if tape.readers[output]:
                        return False
                    continue
                seen.add(output)
                queue.append(output)
    return True


def linked(tape: Tape, later: ResidualAdd, earlier: ResidualAdd) -> bool:
    """Whether the stream of one add is the output of another, up to norms and constants."""
    return stream_source(tape, later.skip.leaf, {earlier.output}) is not None

"""Choose, for each branch, the module whose output is added to the residual stream."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from lightning_spectral.discovery.structure.adds import ResidualAdd
from lightning_spectral.discovery.structure.residual_stream import leads_only_to, stream_source
from lightning_spectral.discovery.structure.terms import Term
from lightning_spectral.discovery.trace.tape import Tape

__all__ = ["Site", "choose_site", "linked", "usable_modules"]


@dataclass(frozen=True, slots=True)
class Site:
    """A module (or, failing that, a parameter) that carries a branch.

    Attributes:
        path: Module path, or ``param:<path>``.
        output_index: Element of the output tuple, ``None`` for a tensor.
        value: The value of the tape at the site.
        carries: Whether a factor at the site multiplies the branch. A gate's weight only gives the branch a name.
    """

    path: str
    output_index: int | str | None
    value: int
    carries: bool = True


def choose_site(
    tape: Tape, add: ResidualAdd, terms: Sequence[Term], others: Iterable[Term], usable: Container[str]
) -> Site | None:
    """Return the site of one branch, ``None`` where no module carries it.

    A candidate returns the branch itself, or the branch before constants or gates multiply it. Of several candidates, a
    module whose output is exactly the added value comes first, then the outermost one, because fused kernels bypass
    inner projections. Of equals, the module that was called first is chosen.

    Args:
        tape: The recorded forward pass.
        add: The residual add.
        terms: The terms of the sum that form the branch.
        others: The other terms of the sum.
        usable: Paths of the modules that serve one branch, in every call.
    """
    spines = [{*term.spine, *term.gated} for term in terms]
    shared = spines[0].intersection(*spines[1:]) - {value for term in others for value in term.spine} - {add.output}
    inner_multiplied = {value for term in terms for value in (*dict(term.multipliers), *term.gated)}
    ranked = []
    for value in sorted(shared):
        exact = not any(value <= multiplied for multiplied in inner_multiplied)
        for call in tape.calls_that_return(value):
            carries = tape.depends(value, add.skip.leaf) and leads_only_to(tape, value, add.output)
            if call.path not in usable or not carries:
                continue
            index = next(key for key, output in call.outputs if output == value)
            rank = (not exact, call.path.count("."), call.index)
            ranked.append((rank, Site(call.path, index, value)))
    return min(ranked, key=lambda item: item[0])[1] if ranked else None


def usable_modules(tape: Tape, adds: Iterable[ResidualAdd]) -> set[str]:
    """Return the paths of the modules that carry one branch each: scaling the output scales that branch and no other.

    A dropout that several branches share, or that is also applied to attention weights, is not usable. A module of a
    shared block, called at several depths, is usable if the same modules return its branch each time.
    """
    places: defaultdict[str, set[frozenset[str]]] = defaultdict(set)
    uses: Counter[str] = Counter()
    for add in adds:
        beside: defaultdict[int, set[str]] = defaultdict(set)
        for term in add.branches:
            values = [value for value in (*term.spine, *term.gated) if value != add.output]
            returned = [call for value in values for call in tape.calls_that_return(value)]
            for call in returned:
                beside[call.index].update(other.path for other in returned)
        for index, paths in beside.items():
            path = tape.calls[index].path
            places[path].add(frozenset(paths))
            uses[path] += 1
    calls = Counter(call.path for call in tape.calls)
    return {path for path, others in places.items() if calls[path] == uses[path] and len(others) == 1}


def linked(tape: Tape, later: ResidualAdd, earlier: ResidualAdd) -> bool:
    """Whether the stream of one add is the output of another, up to norms and constants."""
    return stream_source(tape, later.skip.leaf, {earlier.output}) is not None
